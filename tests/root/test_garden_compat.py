"""`--compat garden`: where we are stricter by default, what the statements say, to the letter."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from garden_image import make_garden_image
from kit.garden_foreign import ForeignGarden
from kit.garden_http import GardenClientBase, GardenHttp
from kit.places import open_to_all
from kit.server import ServerProcess, running_server

pytestmark = pytest.mark.root

SETS = ("Inh", "Prm", "Eff", "Bnd", "Amb")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("compat")
    open_to_all(place)
    return str(make_garden_image(place))


@pytest.fixture(scope="module")
def server(no_trace: None, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    door = f"unix:{tmp_path_factory.mktemp('door')}/garden.sock"
    with running_server(
        "--garden-http", door, "--default-rootfs", image, "--compat", "garden", "--uid-pool-size", "1"
    ) as server:
        yield server


@pytest.fixture(scope="module", params=["by hand", "foreign"])
def garden(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[GardenClientBase]:
    address = server.flags[server.flags.index("--garden-http") + 1]
    if request.param == "by hand":
        yield GardenHttp(address)
        return
    foreign = ForeignGarden(address)
    yield foreign
    foreign.close()


@pytest.fixture(scope="module")
def boxes(garden: GardenClientBase) -> Iterator[dict[str, str]]:
    with garden.container() as unprivileged, garden.container(privileged=True) as privileged:
        yield {"unprivileged": unprivileged, "privileged": privileged}


def test_NS2_single_mapping(garden: GardenClientBase, boxes: dict[str, str]) -> None:
    """Root is the highest id, every other one is itself; containers do not need ranges of the pool."""
    for kind in ("uid", "gid"):
        lines = garden.text_of(boxes["unprivileged"], f"cat /proc/self/{kind}_map").splitlines()
        assert [line.split() for line in lines] == [["0", "4294967294", "1"], ["1", "1", "4294967293"]]
    with garden.container() as second:
        garden.text_of(second, "id")


def test_NS1_cgroup_namespace_is_the_hosts(garden: GardenClientBase, boxes: dict[str, str]) -> None:
    found = garden.text_of(boxes["unprivileged"], "readlink /proc/self/ns/cgroup").strip()
    assert found == os.readlink("/proc/self/ns/cgroup")
    assert f"/{boxes['unprivileged']}" in garden.text_of(boxes["unprivileged"], "cat /proc/self/cgroup")


def test_U4_very_large_ids(garden: GardenClientBase, boxes: dict[str, str]) -> None:
    box = boxes["unprivileged"]
    assert (
        garden.text_of(box, "echo $(id -u) $(id -g)", user="1000000000:1000000000").split()
        == ["1000000000"] * 2
    )
    assert garden.text_of(box, "touch /tmp/x; stat -c %u /tmp/x", user="2000000000:1").strip() == "2000000000"


TABLE = {
    ("unprivileged", "init"): ["a80425fb"] * 4 + ["0"],
    ("unprivileged", "root"): ["a80425fb"] * 4 + ["0"],
    ("unprivileged", "alice"): ["a80425fb", "0", "0", "a80425fb", "0"],
    ("privileged", "root"): ["3fffffffff"] * 4 + ["0"],
    ("privileged", "alice"): ["a82425fb", "0", "0", "a82425fb", "0"],
}


@pytest.mark.parametrize("sidecar", [False, True], ids=["process", "pea"])
@pytest.mark.parametrize(("kind", "user"), TABLE)
def test_C_capabilities(
    garden: GardenClientBase, boxes: dict[str, str], image: str, kind: str, user: str, sidecar: bool
) -> None:
    """The table as it stands, as far as the host has them."""
    file, name = ("/proc/1/status", "root") if user == "init" else ("/proc/self/status", user)
    spec = {"image": {"uri": f"raw://{image}"}} if sidecar else {}
    text = garden.text_of(boxes[kind], f"grep ^Cap {file}", user=name, **spec)
    found = dict(line.split(":\t") for line in text.splitlines())
    host = int(Path("/proc/self/status").read_text().split("CapBnd:")[1].split()[0], 16)
    expected = [int(mask, 16) & host for mask in TABLE[kind, user]]
    assert [int(found[f"Cap{each}"], 16) for each in SETS] == expected


def test_SE1_seccomp_is_in_force(garden: GardenClientBase, boxes: dict[str, str]) -> None:
    box = boxes["unprivileged"]
    assert garden.text_of(box, "grep ^Seccomp: /proc/self/status").split()[1] == "2"
    assert garden.text_of(box, "grep ^Seccomp: /proc/1/status").split()[1] == "2"
    assert garden.sh(box, "mount -t tmpfs x /mnt")[0] != 0


def test_BI4_host_ownership_decides(garden: GardenClientBase, tmp_path: Path) -> None:
    """Container root is nobody that the host knows; in a privileged container it is the host's root."""
    open_to_all(tmp_path)
    bind = [{"src_path": str(tmp_path), "dst_path": "/bound", "mode": 1}]
    with garden.container(bind_mounts=bind) as box:
        assert garden.sh(box, "touch /bound/x")[0] != 0
    with garden.container(bind_mounts=bind, privileged=True) as box:
        assert garden.sh(box, "touch /bound/x")[0] == 0


def test_M7_owners_of_the_image(garden: GardenClientBase, boxes: dict[str, str]) -> None:
    for box in boxes.values():
        assert garden.text_of(box, "stat -c %u:%g / /etc /home/alice").split() == ["0:0", "0:0", "1001:1010"]
        garden.text_of(box, "touch /root/x /etc/hosts")
        garden.text_of(box, "touch ~/x", user="alice")


def test_socket_is_open_to_all(server: ServerProcess) -> None:
    """§1 statement 2."""
    path = server.flags[server.flags.index("--garden-http") + 1].removeprefix("unix:")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o777


def test_containers_keep_their_mapping_when_the_switch_is_turned(no_trace: None, tmp_path: Path) -> None:
    """The setting is about new containers; a restart without it takes the others over as they are."""
    open_to_all(tmp_path)
    door = f"unix:{tmp_path}/g.sock"
    with running_server("--garden-http", door, "--compat", "garden") as server:
        garden = GardenHttp(door)
        handle = garden.create()
        server.stop()
        at = server.flags.index("--compat")
        del server.flags[at : at + 2]
        server.start()
        assert garden.text_of(handle, "cat /proc/self/uid_map").split()[:3] == ["0", "4294967294", "1"]
        with garden.container() as other:
            assert garden.text_of(other, "cat /proc/self/uid_map").split()[2] == "65536"
