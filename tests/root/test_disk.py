"""Disk space: what containers write is counted and limited, on a store of the server's own (btrfs on a loop device)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.disk import MIB, limited, write
from kit.garden import text_of
from kit.oci_images import Layout, busybox_layer, entry
from kit.server import ServerProcess, running_server

from garden_py.client import (
    ContainerSpec,
    DiskScope,
    GardenClient,
    InvalidArgument,
    Limits,
    ProcessSpec,
    ServerFault,
    Sidecar,
    Unimplemented,
)

pytestmark = [pytest.mark.root, pytest.mark.host]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--store-size", "2G") as server:
        yield server


@pytest.fixture(scope="module")
def garden(server: ServerProcess) -> Iterator[GardenClient]:
    with GardenClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of about 5 MiB, for users alice and root."""
    layout = Layout(tmp_path_factory.mktemp("image") / "layout")
    layout.add("1", [busybox_layer(entry("ballast", os.urandom(3 * MIB)))])
    return layout.reference("1")


def qgroups(server: ServerProcess) -> int:
    """How many qgroups there are for volumes."""
    store = str(server.place / "state/store")
    for what in ("filesystem", "subvolume"):
        subprocess.run(["btrfs", what, "sync", store], check=True, capture_output=True)
    done = subprocess.run(["btrfs", "qgroup", "show", store], check=True, capture_output=True, text=True)
    return sum(line.startswith("0/") and not line.startswith("0/5 ") for line in done.stdout.splitlines())


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_a_writer_over_the_limit_gets_an_error(garden: GardenClient, privileged: bool) -> None:
    """Statements D2, D5: 9 of 10 MiB can be written, 11 cannot; nobody is killed, and removing makes room."""
    with limited(garden, 10, privileged=privileged) as container:
        assert write(container, "/root/nine", 9)
        output = container.run(
            ["sh", "-c", "dd if=/dev/zero of=/root/more bs=1M count=2 conv=fsync"]
        ).output()
        assert output.exit.code == 1
        assert b"quota exceeded" in output.stderr.lower()
        text_of(container, "rm /root/nine /root/more")
        assert not write(container, "/root/eleven", 11)
        text_of(container, "rm /root/eleven")
        assert write(container, "/root/again", 8)


def test_all_users_share_it_and_other_containers_do_not(garden: GardenClient, image: str) -> None:
    with limited(garden, 10, image=image) as one, limited(garden, 10, image=image) as other:
        assert write(one, "/tmp/a", 8, user="alice")
        assert not write(one, "/tmp/b", 3)
        assert write(other, "/tmp/a", 8, user="alice")


def test_with_the_image_counted(garden: GardenClient, image: str) -> None:
    """Statements D3, D4."""
    with limited(garden, 20, image=image, scope=DiskScope.TOTAL) as container:
        limits = container.limits()
        assert (limits.disk_bytes, limits.disk_scope) == (20 * MIB, DiskScope.TOTAL)
        assert write(container, "/root/a", 7)
        assert not write(container, "/root/b", 13)
    with pytest.raises(InvalidArgument, match="disk limit is smaller than volume size") as caught:
        limited(garden, 2, image=image, scope=DiskScope.TOTAL)
    assert caught.value.fields[0].field == "spec.limits.disk_bytes"


def test_a_plain_directory_counts_as_an_image_too(garden: GardenClient, tmp_path: Path) -> None:
    (tmp_path / "ballast").write_bytes(os.urandom(4 * MIB))
    tmp_path.chmod(0o755)
    with pytest.raises(InvalidArgument, match="the image takes"):
        limited(garden, 3, image=str(tmp_path), scope=DiskScope.TOTAL)


def test_changed_while_the_container_runs(garden: GardenClient) -> None:
    """Raised, lowered below what is used, and taken away."""
    with limited(garden, 5) as container:
        assert not write(container, "/root/a", 6)
        assert container.update_limits(Limits(disk_bytes=20 * MIB)).disk_bytes == 20 * MIB
        assert write(container, "/root/a", 12)
        assert container.update_limits(Limits(disk_bytes=1 * MIB)).disk_bytes == 1 * MIB
        assert not write(container, "/root/b", 1)
        assert text_of(container, "wc -c </root/a") == f"{12 * MIB}\n"
        assert container.update_limits(Limits(disk_bytes=0)).disk_bytes == 0
        assert write(container, "/root/b", 30)
        assert container.update_limits(Limits(pids=50)).pids == 50


def test_a_container_without_limits_has_none_and_can_get_one(garden: GardenClient) -> None:
    with garden.create() as container:
        limits = container.limits()
        assert (limits.disk_bytes, limits.disk_inodes, limits.disk_scope) == (0, 0, None)
        container.update_limits(Limits(disk_bytes=5 * MIB))
        assert not write(container, "/root/a", 6)


def test_usage_is_counted_in_both_scopes(garden: GardenClient, image: str) -> None:
    """Statement D7: within a MiB, after 3 and 13 MiB, whether it has been written out or not."""
    with limited(garden, 50, image=image) as container:
        (start,) = garden.metrics([container.handle])
        image_bytes = garden.images.inspect(image).bytes
        assert start.disk_exclusive_bytes < MIB
        assert start.disk_total_bytes == start.disk_exclusive_bytes + image_bytes
        written = 0
        for mib in (3, 10):
            text_of(container, f"dd if=/dev/urandom of=/root/{mib} bs=1M count={mib} 2>/dev/null")
            written += mib * MIB
            (now,) = garden.metrics([container.handle])
            assert abs(now.disk_exclusive_bytes - start.disk_exclusive_bytes - written) < MIB
            assert now.disk_total_bytes - now.disk_exclusive_bytes == image_bytes


def test_a_sidecar_has_a_limit_of_its_own(garden: GardenClient, image: str) -> None:
    with limited(garden, 4) as container:
        spec = ProcessSpec(
            "sh", ("-c", "for f in a b; do dd if=/dev/zero of=/root/$f bs=1M count=6 conv=fsync || exit; done"),
            sidecar=Sidecar(image), limits=Limits(disk_bytes=10 * MIB),
        )  # fmt: skip
        output = container.run(spec).output()
        assert output.exit.code == 1
        assert b"/root/b" in output.stderr or b"quota" in output.stderr.lower()
        assert write(container, "/root/a", 3)
    with garden.create() as container, pytest.raises(InvalidArgument, match="only containers and sidecars"):
        container.run(ProcessSpec("true", limits=Limits(disk_bytes=10 * MIB)))


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_a_sidecars_limit_is_changed_and_its_use_is_counted(
    garden: GardenClient, image: str, privileged: bool
) -> None:
    """In both scopes, while it runs, and apart from its container's."""
    with garden.create(ContainerSpec(privileged=privileged)) as container:
        write_one = "dd if=/dev/urandom of=/root/$mib bs=1M count=$mib conv=fsync 2>/dev/null"
        script = f"while read mib; do {write_one}; echo $?; done"
        pea = container.run(
            ProcessSpec(
                "sh", ("-c", script), id="pea", sidecar=Sidecar(image), limits=Limits(disk_bytes=4 * MIB)
            )
        )
        told = iter(pea)

        def write_in_pea(mib: int) -> bool:
            pea.stdin.write(f"{mib}\n".encode())
            return next(told).data == b"0\n"

        image_bytes = garden.images.inspect(image).bytes
        limits = container.limits("pea")
        assert (limits.disk_bytes, limits.disk_scope) == (4 * MIB, DiskScope.EXCLUSIVE)
        assert write_in_pea(3)
        assert not write_in_pea(5)
        assert container.update_limits(Limits(disk_bytes=20 * MIB, pids=9), "pea").disk_bytes == 20 * MIB
        assert write_in_pea(8)
        total = Limits(disk_bytes=30 * MIB, disk_scope=DiskScope.TOTAL)
        assert container.update_limits(total, "pea").disk_scope is DiskScope.TOTAL
        assert (container.limits("pea").disk_bytes, container.limits("pea").pids) == (30 * MIB, 9)
        with pytest.raises(InvalidArgument, match="the image takes"):
            container.update_limits(Limits(disk_bytes=2 * MIB, pids=3), "pea")
        with pytest.raises(Unimplemented, match="btrfs"):
            container.update_limits(Limits(disk_inodes=100, pids=3), "pea")
        assert (container.limits("pea").disk_bytes, container.limits("pea").pids) == (30 * MIB, 9)
        (use,) = garden.metrics(processes=[(container.handle, "pea")])
        assert use.disk_total_bytes == use.disk_exclusive_bytes + image_bytes
        assert use.disk_exclusive_bytes > 11 * MIB
        (own,) = garden.metrics([container.handle])
        assert own.disk_exclusive_bytes < MIB
        assert container.update_limits(Limits(disk_bytes=0), "pea").disk_bytes == 0
        assert write_in_pea(40)


def test_inodes_are_refused_on_btrfs(garden: GardenClient) -> None:
    """And nothing is made, nothing is changed."""
    with pytest.raises(Unimplemented, match="btrfs"):
        garden.create(ContainerSpec(handle="inodes", limits=Limits(disk_inodes=100)))
    assert [each.handle for each in garden.list(all_states=True)] == []
    with limited(garden, 10) as container:
        with pytest.raises(Unimplemented, match="btrfs"):
            container.update_limits(Limits(disk_inodes=100, pids=7))
        limits = container.limits()
        assert (limits.disk_bytes, limits.pids) == (10 * MIB, 0)


@pytest.mark.parametrize(
    "limits", [Limits(disk_bytes=1000), Limits(disk_inodes=3), Limits(disk_scope=DiskScope.TOTAL)]
)
def test_bad_limits_are_refused_by_field(garden: GardenClient, limits: Limits) -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.limits\.disk_"):
        garden.create(ContainerSpec(limits=limits))


def test_nothing_is_left_of_a_volume(garden: GardenClient, server: ServerProcess, image: str) -> None:
    """Neither directories nor subvolumes nor qgroups, of containers and sidecars."""
    before = qgroups(server)
    container = limited(garden, 10)
    spec = ProcessSpec("sleep", ("100",), sidecar=Sidecar(image), limits=Limits(disk_bytes=10 * MIB))
    container.run(spec)
    container.run(ProcessSpec("true", sidecar=Sidecar(image))).output()
    assert write(container, "/root/a", 5)
    container.destroy()
    assert list((server.place / "state/store/volumes").iterdir()) == []
    assert qgroups(server) == before
    assert garden.check_leaks() == []


def test_limits_and_use_outlive_the_server(image: str) -> None:
    """Killed and started again, with the store mounted as it was; unmounted at the end, when no container is left."""
    with running_server("--store-size", "1G") as server, GardenClient(server.address) as garden:
        store = server.place / "state/store"
        container = limited(garden, 20, image=image, scope=DiskScope.TOTAL)
        assert write(container, "/root/a", 5)
        container.run(ProcessSpec("sleep", ("1000",), id="pea", sidecar=Sidecar(image)))
        container.update_limits(Limits(disk_bytes=30 * MIB, disk_scope=DiskScope.TOTAL), "pea")
        server.kill()
        assert store.is_mount()
        server.start()
        limits = container.limits()
        assert (limits.disk_bytes, limits.disk_scope) == (20 * MIB, DiskScope.TOTAL)
        limits = container.limits("pea")
        assert (limits.disk_bytes, limits.disk_scope) == (30 * MIB, DiskScope.TOTAL)
        (metrics,) = garden.metrics([container.handle])
        assert (
            5 * MIB <= metrics.disk_exclusive_bytes < 6 * MIB
        )  # with or without the file system's own, so far
        assert not write(container, "/root/b", 14)
        server.stop()
        assert store.is_mount()
        server.start()
        assert text_of(container, "ls /root | head -1") == "a\n"
        container.destroy()
        server.stop()
        assert not store.is_mount()
        server.start()
        assert len(garden.images.list()) == 1


def test_a_store_that_a_killed_server_left_mounted_is_found() -> None:
    """With no container left it is an orphan, which `garden doctor --leaks --fix` unmounts."""
    with running_server("--store-size", "300M") as server:
        store = server.place / "state/store"
        server.kill()
        assert store.is_mount()
        doctor = [
            sys.executable,
            "-m",
            "garden_py",
            "doctor",
            "--leaks",
            "--state-dir",
            str(server.place / "state"),
        ]
        found = subprocess.run(
            [*doctor, "-o", "json"], capture_output=True, text=True, check=False, timeout=60
        )
        assert [leak["name"] for leak in json.loads(found.stdout) if leak["kind"] == "MOUNT"] == [str(store)]
        subprocess.run([*doctor, "--fix"], capture_output=True, check=True, timeout=60)
        assert not store.is_mount()
        server.start()


def test_a_store_grows_with_its_setting(tmp_path: Path) -> None:
    with running_server("--store-size", "300M") as server, GardenClient(server.address) as garden:
        assert garden.capacity().disk_bytes == 300 * MIB
        with garden.create() as container:
            assert not write(container, "/root/a", 320)
            text_of(container, "rm /root/a")
            server.stop()
            server.flags[server.flags.index("--store-size") + 1] = "1G"
            server.start()
            assert garden.capacity().disk_bytes == 1 << 30
            assert write(container, "/root/a", 320)
        image = server.place / "state/store.img"
        assert image.stat().st_size == 1 << 30
        assert image.stat().st_blocks * 512 < 800 * MIB


def test_a_full_store_is_told_and_the_host_goes_on() -> None:
    """Creates fail with a typed error; what runs goes on, and room that is made can be used."""
    with running_server("--store-size", "300M") as server, GardenClient(server.address) as garden:
        with garden.create() as container:
            assert not write(container, "/root/fill", 400)
            (server.place / "of-the-host").write_bytes(bytes(MIB))
            with pytest.raises(ServerFault, match="no space left"):
                garden.images.import_tar("big:1", [busybox_layer(entry("x", os.urandom(100 * MIB)))])
            text_of(container, "rm /root/fill")
            # btrfs gives room back with the next transaction, and cleans up in the background.
            assert any(write(container, "/root/small", 10) or time.sleep(0.5) for _ in range(60))
        garden.images.prune(named=True)


def test_without_a_store_on_ext4_limits_are_refused(garden_server: ServerProcess) -> None:
    """Where the file system offers nothing; the message says what to do."""
    if (
        "btrfs"
        in subprocess.run(
            ["stat", "-f", "-c", "%T", "/var/tmp"], capture_output=True, text=True, check=True
        ).stdout
    ):
        pytest.fail("this test needs /var/tmp on a file system without qgroups")
    with GardenClient(garden_server.address) as garden:
        with pytest.raises(Unimplemented, match="--store-size"):
            limited(garden, 10)
        with garden.create() as container:
            with pytest.raises(Unimplemented, match="--store-size"):
                container.update_limits(Limits(disk_bytes=10 * MIB))
            (metrics,) = garden.metrics([container.handle])
            assert metrics.disk_exclusive_bytes == 0
            assert metrics.disk_total_bytes > MIB


def test_a_bad_size_stops_the_server(tmp_path: Path) -> None:
    places = ["--state-dir", str(tmp_path / "s"), "--run-dir", str(tmp_path / "r")]
    argv = [sys.executable, "-m", "garden_py", "server", "--store-size", "5M", *places]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--store-size: must be at least" in done.stderr
