"""External image plugins: what they may do, and what happens when one does not do as it should.

The statements about them: test_garden_plugins.py.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import wait_until
from kit.garden_http import GardenHttp, GardenHttpError
from kit.patience import FACTOR
from plugin_lab import PluginLab, obedient, open_plugin_lab  # noqa: F401 - a fixture

from garden_py.client import (
    ContainerSpec,
    DiskScope,
    GardenClient,
    Limits,
    RegistryAuth,
    Sidecar,
    Unimplemented,
)

pytestmark = pytest.mark.root
IMAGE = "docker:///cloudfoundry/cflinuxfs4#1.2"


@pytest.fixture(scope="module")
def lab(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginLab]:
    with open_plugin_lab(tmp_path_factory.mktemp("plugins"), network=False) as found:
        yield found


@pytest.fixture
def garden(lab: PluginLab) -> GardenHttp:
    return lab.garden


def start_sidecar(garden: GardenHttp, handle: str, process_id: str) -> None:
    """A process with an image of its own, that goes on."""
    garden.run(handle, "sleep", "600", id=process_id, image={"uri": IMAGE}, sides=()).leave()


def test_metrics_say_that_the_plugin_does_not_know(lab: PluginLab, garden: GardenHttp) -> None:
    """One container's trouble is not another's."""
    with garden.container(image={"uri": IMAGE}) as one, garden.container() as other:
        lab.order("stats", "fail")
        found = garden.json("GET", f"/containers/bulk_metrics?handles={one},{other}")
        assert found[one]["Err"]["Message"] == "running image plugin stats: said on stdout"
        assert found[other]["Err"] is None


def answers(lab: PluginLab, handle: str) -> bool:
    return lab.garden.call("GET", f"/containers/{handle}/metrics").status == 200


def test_a_plugin_that_does_not_answer_holds_up_no_more_than_itself(no_trace: None, tmp_path: Path) -> None:
    """Many containers are counted at a time: after one question without an answer the others are not asked in vain."""
    with open_plugin_lab(tmp_path, network=False) as lab:
        handles = [lab.garden.create(image={"uri": IMAGE}) for _ in range(9)]
        lab.order("stats", "hang")
        asking = threading.Thread(
            target=lab.garden.json, args=("GET", f"/containers/bulk_metrics?handles={','.join(handles)}")
        )
        asking.start()
        wait_until(lambda: lab.alive(), "it is asked")
        lab.garden.destroy(handles.pop())
        with lab.garden.container(image={"uri": IMAGE}):
            assert asking.is_alive()
        asking.join(60 * FACTOR)
        assert not asking.is_alive()
        assert len(lab.image.calls("stats")) <= 4 * 2
        lab.order("stats", "")
        wait_until(lambda: answers(lab, handles[0]), "it is asked again")


def test_a_container_takes_its_sidecars_along(lab: PluginLab, garden: GardenHttp) -> None:
    handle = garden.create(image={"uri": IMAGE})
    for number in range(2):
        start_sidecar(garden, handle, f"s{number}")
    assert lab.image.roots() == sorted([handle, "s0", "s1"])
    garden.destroy(handle)
    assert lab.image.roots() == []


def test_directories_and_stored_images_are_not_the_plugins(lab: PluginLab, garden: GardenHttp) -> None:
    calls = len(lab.image.calls("create"))
    with garden.container(image={"uri": f"raw://{lab.source}"}) as handle:
        garden.text_of(handle, "echo mine > /root/x")
        assert not (lab.source / "root/x").exists()
    assert len(lab.image.calls("create")) == calls


def test_mounts_of_the_plugin_come_first(lab: PluginLab, garden: GardenHttp, tmp_path: Path) -> None:
    """Whatever else is mounted lies over them."""
    given, own = tmp_path / "given", tmp_path / "own"
    for place, text in ((given, "plugin"), (own, "caller")):
        place.mkdir(mode=0o755)
        (place / "who").write_text(text)
    tmp_path.chmod(0o755)
    mounts = [
        {"destination": "/a", "type": "bind", "source": str(given), "options": ["bind"]},
        {"destination": "/b", "type": "bind", "source": str(given), "options": ["bind"]},
    ]
    lab.order("create", json.dumps({"mounts": mounts}))
    bind = {"src_path": str(own), "dst_path": "/b", "mode": 0}
    with garden.container(image={"uri": IMAGE}, bind_mounts=[bind]) as handle:
        assert garden.text_of(handle, "cat /a/who /b/who") == "plugincaller"


@pytest.mark.parametrize("privileged", [False, True])
def test_a_mount_may_be_the_root_itself(no_trace: None, tmp_path: Path, privileged: bool) -> None:
    """As plugins without the right to mount have it done by the runtime, who does it as root of the container."""
    root = 0 if privileged else 0xFFFF_FFFE
    with open_plugin_lab(tmp_path, "--compat", "garden", network=False) as lab:
        shifted(lab, maximus=root)
        lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
        shutil.copytree(lab.source, lower, symlinks=True)
        (lower / "below").write_text("seen")
        upper.mkdir(mode=0o755)
        work.mkdir(mode=0o755)
        for place in (upper, work, lower, *lower.rglob("*")):
            os.chown(place, root, root, follow_symlinks=False)
        options = [f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}"]
        mount = {"destination": "/", "type": "overlay", "source": "overlay", "options": options}
        lab.order("create", json.dumps({"mounts": [mount]}))
        with lab.garden.container(image={"uri": IMAGE}, privileged=privileged) as handle:
            assert lab.garden.text_of(handle, "cat /below") == "seen"
            lab.garden.text_of(handle, "mkdir /made && echo mine > /made/x")
            assert (upper / "made/x").read_text() == "mine\n"
            assert (upper / "made/x").stat().st_uid == root


# --- ids


def shifted(lab: PluginLab, **settings: int) -> None:
    """Have plugins make roots in another way; nothing given: as at first."""
    for plugin in (lab.image, lab.privileged_image):
        (plugin.place / "settings.json").write_text(json.dumps({"image": str(lab.source), **settings}))


@pytest.mark.parametrize("flags", [(), ("--compat", "garden")])
def test_a_plugin_may_map_ids_as_the_reference_does(
    no_trace: None, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Root is the highest id on the host then: under either mapping of ours it is root in the container."""
    with open_plugin_lab(tmp_path, *flags, network=False) as lab:
        shifted(lab, maximus=0xFFFF_FFFE)
        with lab.garden.container(image={"uri": IMAGE}) as handle:
            owners = lab.garden.text_of(handle, "stat -c %U:%G / /root /home/alice /bin/busybox").split()
            assert owners == ["root:root", "root:root", "alice:alice", "root:root"]
            lab.garden.text_of(handle, "touch /root/new && touch /home/alice/a && chown alice /home/alice/a")
            root = lab.image.place / "store" / handle / "rootfs"
            assert (root / "root/new").stat().st_uid == 0xFFFF_FFFE
            assert (root / "home/alice/a").stat().st_uid == 1001


def test_a_root_that_is_nobodys_is_refused(lab: PluginLab, garden: GardenHttp) -> None:
    shifted(lab, shift=77)
    try:
        with pytest.raises(GardenHttpError, match="belongs to the host's user 77"):
            garden.create(image={"uri": IMAGE})
    finally:
        shifted(lab)
    assert lab.image.roots() == []


def test_a_plugin_may_mount(no_trace: None, tmp_path: Path) -> None:
    """On the host, after the server was started, as GrootFS does; it says `--compat garden` in its documentation."""
    with open_plugin_lab(tmp_path, "--compat", "garden", network=False) as lab:
        shifted(lab, overlay=1, maximus=0xFFFF_FFFE)
        with lab.garden.container(image={"uri": IMAGE}) as handle:
            lab.garden.text_of(
                handle, "echo mine > /root/x; echo hers > /home/alice/y; chown alice /home/alice/y"
            )
            upper = lab.image.place / "store" / handle / "upper"
            assert (upper / "root/x").stat().st_uid == 0xFFFF_FFFE
            assert (upper / "home/alice/y").stat().st_uid == 1001
        shifted(lab, overlay=1)
        with lab.garden.container(image={"uri": IMAGE}, privileged=True) as handle:
            lab.garden.text_of(handle, "echo mine > /root/x")
            assert (lab.privileged_image.place / "store" / handle / "upper/root/x").stat().st_uid == 0
        with pytest.raises(
            GardenHttpError, match="does not support id-mapped mounts: have the plugin map ids"
        ):
            lab.garden.create(image={"uri": IMAGE})
        assert lab.image.roots() == lab.privileged_image.roots() == []


# --- over gRPC


def test_grpc_callers_get_the_same(lab: PluginLab) -> None:
    limits = Limits(disk_bytes=30 << 20, disk_scope=DiskScope.TOTAL)
    auth = RegistryAuth("u", "sesame")
    with GardenClient(lab.server.address) as client:
        box = client.create(ContainerSpec(image=IMAGE, image_auth=auth, limits=limits))
        try:
            call = lab.image.calls("create")[-1]
            assert (call["disk_limit_size_bytes"], call["password"]) == (30 << 20, "sesame")
            found = box.limits()
            assert (found.disk_bytes, found.disk_scope) == (30 << 20, DiskScope.TOTAL)
            with pytest.raises(Unimplemented, match="image plugin"):
                box.update_limits(Limits(disk_bytes=40 << 20, memory_bytes=64 << 20))
            assert box.limits().memory_bytes == 0
            box.start(["sleep", "600"], id="side", sidecar=Sidecar(image=IMAGE))
            with pytest.raises(Unimplemented, match="image plugin"):
                box.update_limits(Limits(disk_bytes=40 << 20), "side")
            assert box.metrics().disk_total_bytes > 0
            box.signal("side", "KILL")
        finally:
            box.destroy()
        with pytest.raises(Unimplemented, match="image plugins know none"):
            client.create(ContainerSpec(image=IMAGE, limits=Limits(disk_inodes=100)))
    assert lab.image.roots() == []


# --- when it fails


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("garbage", "its answer is not what it should be: Invalid JSON"),
        ('{"root": {}}', "its answer is not what it should be: root.path: Field required"),
        ('{"root": {"path": "/no/such/directory"}}', "there is no directory /no/such/directory"),
        ('{"mounts": [{"type": "tmpfs"}]}', "its answer is not what it should be: mounts.0.destination"),
        ("flood", "it wrote more than 262144 bytes"),
    ],
)
def test_an_answer_that_is_none_fails_the_create(
    lab: PluginLab, garden: GardenHttp, order: str, said: str
) -> None:
    lab.order("create", order)
    with pytest.raises(GardenHttpError) as caught:
        garden.create(image={"uri": IMAGE})
    assert caught.value.error["Message"].startswith("running image plugin create: ")
    assert said in caught.value.error["Message"]
    assert garden.list() == []
    assert lab.image.roots() == []


def test_an_id_by_which_a_root_is_known_is_refused(lab: PluginLab, garden: GardenHttp) -> None:
    """The plugin would refuse it too, and then be told to delete what is the other's."""
    with garden.container(image={"uri": IMAGE}) as first, garden.container(image={"uri": IMAGE}) as second:
        start_sidecar(garden, first, "db")
        for handle, process_id in ((first, first), (first, second), (second, "db")):
            with pytest.raises(GardenHttpError, match="already in use"):
                garden.run(handle, "true", id=process_id, image={"uri": IMAGE})
        with pytest.raises(GardenHttpError, match="already in use"):
            garden.create(image={"uri": IMAGE}, handle="db")
        assert lab.image.roots() == sorted([first, second, "db"])
        assert garden.text_of(first, "echo $FROM_PLUGIN") == "yes\n"


def test_variables_that_are_none_are_left_out(lab: PluginLab, garden: GardenHttp) -> None:
    """As those of the server's own images: else no program could be started."""
    lab.order("create", json.dumps({"process": {"env": ["none", "=x", "A=\0", "B=b", "PATH=/bin"]}}))
    with garden.container(image={"uri": IMAGE}) as handle:
        assert garden.text_of(handle, "echo $B") == "b\n"


def test_a_password_that_cannot_be_an_argument_is_refused(garden: GardenHttp) -> None:
    with pytest.raises(GardenHttpError, match=r"image_auth\.password: cannot be an argument"):
        garden.create(image={"uri": IMAGE, "username": "u", "password": "a\0b"})


def test_a_failing_sidecar_leaves_its_container_alone(lab: PluginLab, garden: GardenHttp) -> None:
    with garden.container(image={"uri": IMAGE}) as handle:
        lab.order("create", "fail")
        with pytest.raises(GardenHttpError, match="running image plugin create: said on stdout"):
            garden.run(handle, "true", id="side", image={"uri": IMAGE})
        lab.order("create", "")
        assert garden.run(handle, "true", id="side", image={"uri": IMAGE}).wait() == 0
        garden.text_of(handle, "true")


def test_a_failing_delete_keeps_the_container_till_it_succeeds(lab: PluginLab, garden: GardenHttp) -> None:
    handle = garden.create(image={"uri": IMAGE})
    lab.order("delete", "fail")
    with pytest.raises(GardenHttpError, match="running image plugin delete: said on stdout"):
        garden.destroy(handle)
    with GardenClient(lab.server.address) as client:
        assert [each.handle for each in client.list(all_states=True)] == [handle]
        lab.order("delete", "")
        wait_until(lambda: not list(client.list(all_states=True)), "destroyed in the background")
    assert lab.image.roots() == []


def test_a_destroy_ends_a_create_under_way(lab: PluginLab, garden: GardenHttp) -> None:
    """Fetching an image can take minutes; the program is killed, and told to delete what it may have begun."""
    lab.order("create", "hang")
    failures: list[GardenHttpError] = []

    def create() -> None:
        try:
            garden.create(image={"uri": IMAGE}, handle="slow")
        except GardenHttpError as error:
            failures.append(error)

    caller = threading.Thread(target=create)
    caller.start()
    wait_until(lambda: lab.alive(), "the plugin runs")
    began = time.monotonic()
    garden.destroy("slow")
    assert time.monotonic() - began < 20 * FACTOR
    caller.join(20 * FACTOR)
    assert failures
    assert not lab.alive()
    assert lab.image.calls("delete")[-1]["id"] == "slow"
    assert garden.list("?garden.state=all") == []


# --- restarts and settings


def test_a_server_that_stops_waits_for_no_root_of_a_sidecar(no_trace: None, tmp_path: Path) -> None:
    """Making one may take ten minutes; it is given up as that of a container is."""
    with open_plugin_lab(tmp_path, network=False) as lab:
        handle = lab.garden.create(image={"uri": IMAGE})
        lab.order("create", "hang")

        def start() -> None:
            with pytest.raises((GardenHttpError, OSError)):
                lab.garden.run(handle, "true", id="side", image={"uri": IMAGE})

        caller = threading.Thread(target=start)
        caller.start()
        wait_until(lambda: lab.alive(), "the plugin runs")
        lab.server.stop()
        caller.join(20 * FACTOR)
        assert not lab.alive()
        assert lab.image.calls("delete")[-1]["id"] == "side"
        lab.order("create", "")
        lab.server.start()
        assert lab.garden.text_of(handle, "echo $FROM_PLUGIN") == "yes\n"
        lab.garden.destroy(handle)


def test_the_first_client_is_told_what_the_plugin_says(no_trace: None, tmp_path: Path) -> None:
    """Diego's executor asks once, when it starts. One that does not say holds up nobody for long."""
    with open_plugin_lab(tmp_path, network=False) as lab:
        assert lab.garden.json("GET", "/capacity")["schedulable_disk_in_bytes"] == 12_345_678_912
        lab.server.stop()
        lab.order("capacity", "fail")
        lab.server.start()
        found = lab.garden.json("GET", "/capacity")
        assert found["schedulable_disk_in_bytes"] == found["disk_in_bytes"]


def test_a_killed_server_takes_its_plugin_along(no_trace: None, tmp_path: Path) -> None:
    with open_plugin_lab(tmp_path, network=False) as lab:
        kept = lab.garden.create(image={"uri": IMAGE})
        start_sidecar(lab.garden, kept, "s")
        lab.order("create", "hang")

        def create() -> None:
            with pytest.raises((GardenHttpError, OSError)):
                lab.garden.create(image={"uri": IMAGE}, handle="half")

        caller = threading.Thread(target=create)
        caller.start()
        wait_until(lambda: lab.alive(), "the plugin runs")
        lab.server.kill()
        wait_until(lambda: not lab.alive(), "it has ended with its server")
        caller.join(20 * FACTOR)
        lab.order("create", "")
        lab.server.start()
        wait_until(lambda: "half" in [call["id"] for call in lab.image.calls("delete")], "it is removed")
        assert lab.garden.text_of(kept, "echo $FROM_PLUGIN") == "yes\n"
        assert lab.garden.metrics(kept)["DiskStat"]["TotalBytesUsed"] > 0
        assert lab.image.roots() == sorted([kept, "s"])
        lab.garden.destroy(kept)
        assert lab.image.roots() == []


def test_a_server_without_plugins_asks_those_of_before(no_trace: None, tmp_path: Path) -> None:
    with open_plugin_lab(tmp_path, network=False) as lab:
        kept = lab.garden.create(image={"uri": IMAGE})
        start_sidecar(lab.garden, kept, "s")
        lab.server.stop()
        at = lab.server.flags.index("--image-plugin")
        del lab.server.flags[at : at + 5]
        lab.server.start()
        assert lab.garden.metrics(kept)["DiskStat"]["TotalBytesUsed"] > 0
        lab.garden.destroy(kept)
        assert lab.image.roots() == []


def test_one_plugin_is_for_its_own_kind(no_trace: None, tmp_path: Path) -> None:
    """In the reference's words."""
    with open_plugin_lab(tmp_path, network=False) as lab:
        lab.server.stop()
        at = lab.server.flags.index("--privileged-image-plugin")
        del lab.server.flags[at : at + 2]
        lab.server.start()
        with pytest.raises(GardenHttpError, match="no privileged_image_plugin provided"):
            lab.garden.create(image={"uri": IMAGE}, privileged=True)
        with lab.garden.container(image={"uri": IMAGE}):
            assert len(lab.garden.list()) == 1


def test_a_create_that_takes_too_long_is_given_up(no_trace: None, tmp_path: Path) -> None:
    with open_plugin_lab(tmp_path, "--image-plugin-timeout-s", "1", network=False) as lab:
        lab.order("create", "hang")
        with pytest.raises(GardenHttpError, match=r"running image plugin create: .* did not end in 1 s"):
            lab.garden.create(image={"uri": IMAGE})
        assert not lab.alive()
        assert lab.garden.list() == []
