"""Disk limits as Garden specifies them; a test is named after its statement."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from garden_image import garden_door_of, garden_server_with
from kit.garden_foreign import ForeignGarden
from kit.garden_http import GardenClientBase, GardenHttp, GardenHttpError
from kit.oci_images import Layout, busybox_layer, entry
from kit.server import ServerProcess

pytestmark = [pytest.mark.root, pytest.mark.host]
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with garden_server_with(tmp_path_factory.mktemp("garden"), "--store-size", "1G") as server:
        yield server


@pytest.fixture(scope="module", params=["by hand", "foreign"])
def garden(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[GardenClientBase]:
    """The door's two clients; tests/root/test_disk.py is the same over gRPC."""
    if request.param == "by hand":
        yield GardenHttp(garden_door_of(server))
        return
    other = ForeignGarden(garden_door_of(server))
    yield other
    other.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of about 4 MiB."""
    layout = Layout(tmp_path_factory.mktemp("image") / "layout")
    layout.add(
        "1", [busybox_layer(entry("ballast", os.urandom(2 * MIB)), entry("home/bob", uid=1002, gid=1010))]
    )
    return layout.reference("1")


def limited(mib: int, scope: int = 1, **more: int) -> dict[str, object]:
    return {"disk_limits": {"byte_hard": mib * MIB, "scope": scope, **more}}


def write(garden: GardenClientBase, handle: str, name: str, mib: int, user: str = "") -> bool:
    process = garden.run(
        handle, "dd", "if=/dev/urandom", f"of={name}", "bs=1M", f"count={mib}", "conv=fsync", user=user
    )
    return process.wait() == 0


def test_D1_soft_limits_and_inodes_are_ignored(garden: GardenClientBase, image: str) -> None:
    limits = limited(10, byte_soft=1, inode_hard=1, inode_soft=1)
    with garden.container(image={"uri": image}, limits=limits) as handle:
        assert write(garden, handle, "/root/a", 9)
    with garden.container(image={"uri": image}, limits=limited(0)) as handle:
        assert write(garden, handle, "/root/a", 40)


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_D2_exclusive(garden: GardenClientBase, image: str, privileged: bool) -> None:
    spec = {"image": {"uri": image}, "limits": limited(10), "privileged": privileged}
    with garden.container(**spec) as handle:
        assert write(garden, handle, "/root/nine", 9)
    with garden.container(**spec) as handle:
        assert not write(garden, handle, "/root/eleven", 11)


def test_D3_total(garden: GardenClientBase, image: str) -> None:
    with garden.container(image={"uri": image}, limits=limited(20, scope=0)) as handle:
        assert write(garden, handle, "/root/a", 7)
        assert not write(garden, handle, "/root/b", 20)


def test_D4_an_image_larger_than_the_limit(garden: GardenClientBase, image: str) -> None:
    with pytest.raises(GardenHttpError, match="disk limit is smaller than volume size"):
        garden.create(image={"uri": image}, limits=limited(1, scope=0))


def test_D5_shared_by_users_and_not_by_containers(garden: GardenClientBase, image: str) -> None:
    with garden.container(image={"uri": image}, limits=limited(10)) as handle:
        assert write(garden, handle, "/tmp/a", 8, user="alice")
        assert not write(garden, handle, "/tmp/b", 3, user="1002:1010")
    with (
        garden.container(image={"uri": image}, limits=limited(50)) as one,
        garden.container(image={"uri": image}, limits=limited(50)) as other,
    ):
        assert write(garden, one, "/tmp/a", 40, user="alice")
        assert write(garden, other, "/tmp/a", 40, user="alice")


def test_D7_metrics(garden: GardenClientBase, image: str) -> None:
    with garden.container(image={"uri": image}, limits=limited(50)) as handle:
        start = garden.metrics(handle)["DiskStat"]
        assert 3 * MIB < start["TotalBytesUsed"] < 5 * MIB
        written = 0
        for mib in (3, 10):
            assert write(garden, handle, f"/root/{mib}", mib)
            written += mib * MIB
            now = garden.metrics(handle)["DiskStat"]
            for key in ("ExclusiveBytesUsed", "TotalBytesUsed"):
                assert abs(now[key] - start[key] - written) < MIB
            assert now["TotalBytesUsed"] > now["ExclusiveBytesUsed"]
            assert (now["TotalInodesUsed"], now["ExclusiveInodesUsed"]) == (0, 0)


def test_D8_small_limits_are_raised(garden: GardenClientBase, image: str) -> None:
    limits = {"disk_limits": {"byte_hard": 1, "scope": 1}}
    with garden.container(image={"uri": image}, limits=limits) as handle:
        assert garden.run(handle, "sh", "-c", "echo x >/root/small").wait() == 0
        assert not write(garden, handle, "/root/large", 1)
