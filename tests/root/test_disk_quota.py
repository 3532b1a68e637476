"""Disk limits by project quotas of ext4 and xfs, on file systems of this module's own; test_disk.py is about btrfs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.disk import MIB, limited, write
from kit.garden import sh, text_of, wait_until
from kit.oci_images import Layout, busybox_layer, entry
from kit.server import ServerProcess, running_server

from garden_py.backend.disk.driver import DiskLimits
from garden_py.backend.disk.project import ProjectQuota
from garden_py.backend.disk.volumes import find_driver
from garden_py.client import (
    Container,
    ContainerSpec,
    DiskScope,
    GardenClient,
    InvalidArgument,
    Limits,
    ProcessSpec,
    Sidecar,
    Unimplemented,
)

pytestmark = [pytest.mark.root, pytest.mark.quota]
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-O", "quota,project"],
    "ext4 without the feature": ["mkfs.ext4", "-q", "-O", "^quota,^project"],
    "xfs": ["mkfs.xfs", "-q"],
}
OVER = (
    b"quota exceeded",
    b"no space left",
)  # EDQUOT of ext4, and ENOSPC, which xfs has for projects (xfs_quota(8))


# Writes 30 MiB through a shared mapping of a sparse file; a page that gets no space is a SIGBUS (mmap(2)).
MAPPER = """
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv) {
  size_t size = 30 << 20;
  int fd = open(argv[1], O_RDWR | O_CREAT, 0600);
  if (fd < 0 || ftruncate(fd, size)) return 3;
  char *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return 4;
  for (size_t i = 0; i < size; i += 512) memory[i] = 1;
  return msync(memory, size, MS_SYNC) ? 5 : 0;
}
"""


@contextmanager
def mounted(place: Path, kind: str, options: str) -> Iterator[Path]:
    """A file system of 1 GiB in a sparse file."""
    disk, top = place / "disk", place / "top"
    top.mkdir()
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run([*MKFS[kind], str(disk)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", f"loop,{options}", str(disk), str(top)], check=True)
    try:
        top.chmod(0o755)
        yield top
    finally:
        subprocess.run(["umount", str(top)], check=True)
        disk.unlink()


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def top(
    request: pytest.FixtureRequest, no_trace: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Where a file system with project quotas in force is mounted."""
    with mounted(tmp_path_factory.mktemp("quota"), request.param, "prjquota") as top:
        yield top


@pytest.fixture(scope="module")
def server(top: Path) -> Iterator[ServerProcess]:
    with running_server("--state-dir", str(top / "state")) as server:
        yield server


@pytest.fixture(scope="module")
def garden(server: ServerProcess) -> Iterator[GardenClient]:
    with GardenClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of about 5 MiB, for users alice and root, with MAPPER as /mapper."""
    place = tmp_path_factory.mktemp("image")
    (place / "mapper.c").write_text(MAPPER)
    subprocess.run(["gcc", "-static", "-o", place / "mapper", place / "mapper.c"], check=True)
    mapper = entry("mapper", (place / "mapper").read_bytes(), mode=0o755)
    layout = Layout(place / "layout")
    layout.add("1", [busybox_layer(entry("ballast", os.urandom(3 * MIB)), mapper)])
    return layout.reference("1")


def records(top: Path) -> dict[int, list[int]]:
    """What the kernel has on each project but 0, in words of another program: use and limits of blocks and inodes."""
    found = {}
    for resource in ("-b", "-i"):
        argv = ["xfs_quota", "-f", "-x", "-c", f"report -p -n -N {resource}", str(top)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        assert not done.stderr
        for line in done.stdout.splitlines():
            if line.startswith("#"):
                number, *figures = line.split()
                found.setdefault(int(number[1:]), []).extend(int(figure) for figure in figures[:3])
    return {project: figures for project, figures in found.items() if project and any(figures)}


def make_files(container: Container, count: int, user: str = "") -> bool:
    """Whether so many empty files could be made below /tmp."""
    script = f"mkdir /tmp/$$ && cd /tmp/$$ || exit; i=0; while [ $i -lt {count} ]; do : >$i || exit; i=$((i+1)); done"
    return container.run(sh(script), user=user).output().exit.code == 0


@pytest.mark.parametrize("scope", [None, DiskScope.TOTAL], ids=["exclusive", "total"])
@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_a_writer_over_the_limit_gets_an_error(
    garden: GardenClient, image: str, privileged: bool, scope: DiskScope | None
) -> None:
    """Statements D2 to D5. Root is bound as well: overlayfs writes without CAP_SYS_RESOURCE, which ext4 asks for."""
    image_mib = -(-garden.images.pull(image).bytes // MIB) if scope else 0
    with limited(garden, 10 + image_mib, image=image, privileged=privileged, scope=scope) as container:
        assert write(container, "/root/nine", 9)
        output = container.run(sh("dd if=/dev/zero of=/root/more bs=1M count=3 conv=fsync")).output()
        assert output.exit.code == 1
        assert any(words in output.stderr.lower() for words in OVER)
        text_of(container, "rm /root/nine /root/more")
        assert not write(container, "/root/eleven", 12)
        text_of(container, "rm /root/eleven")
        assert write(container, "/root/again", 8)
        assert not write(container, "/tmp/alice", 3, user="alice")
        assert write(container, "/tmp/alice", 1, user="alice")
        limits = container.limits()
        assert limits.disk_bytes == (10 + image_mib) * MIB
        assert scope in (None, limits.disk_scope)


@pytest.mark.parametrize("scope", [None, DiskScope.TOTAL], ids=["exclusive", "total"])
@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_inodes_are_limited(
    garden: GardenClient, image: str, privileged: bool, scope: DiskScope | None
) -> None:
    """Of root and users together, and given back; an image's inodes never count."""
    with limited(garden, 50, inodes=100, image=image, privileged=privileged, scope=scope) as container:
        assert container.limits().disk_inodes == 100
        assert make_files(container, 50)
        assert make_files(container, 20, user="alice")
        assert not make_files(container, 40)
        assert not make_files(container, 40, user="alice")
        (metrics,) = garden.metrics([container.handle])
        assert metrics.disk_exclusive_inodes == 100
        text_of(container, "rm -r /tmp/*")
        assert make_files(container, 70)


@pytest.mark.parametrize("user", ["root", "alice"])
def test_a_mapped_file_is_no_way_around_it(garden: GardenClient, image: str, user: str) -> None:
    """A page fault has the task's own rights, not overlayfs's: which lack CAP_SYS_RESOURCE over the host."""
    with limited(garden, 10, image=image) as container:
        done = container.run(["/mapper", "/tmp/mapped"], user=user).output()
        assert done.exit.signal == signal.SIGBUS
        (metrics,) = garden.metrics([container.handle])
        assert metrics.disk_exclusive_bytes <= 10 * MIB


def test_an_image_that_is_too_large_is_refused(garden: GardenClient, image: str) -> None:
    with pytest.raises(InvalidArgument, match="disk limit is smaller than volume size"):
        limited(garden, 2, image=image, scope=DiskScope.TOTAL)


def test_other_containers_do_not_share_it(garden: GardenClient) -> None:
    with limited(garden, 10) as one, limited(garden, 10) as other, garden.create() as free:
        assert not write(one, "/root/a", 12)
        assert write(other, "/root/a", 8)
        assert write(free, "/root/a", 30)


def test_changed_while_the_container_runs(garden: GardenClient) -> None:
    """Raised, lowered below what is used, and taken away; bytes and inodes apart."""
    with limited(garden, 5, inodes=50) as container:
        assert not write(container, "/root/a", 6)
        assert container.update_limits(Limits(disk_bytes=20 * MIB)).disk_bytes == 20 * MIB
        assert container.limits().disk_inodes == 50
        assert write(container, "/root/a", 12)
        assert container.update_limits(Limits(disk_bytes=1 * MIB)).disk_bytes == 1 * MIB
        assert not write(container, "/root/b", 1)
        assert text_of(container, "wc -c </root/a") == f"{12 * MIB}\n"
        assert container.update_limits(Limits(disk_bytes=0)).disk_bytes == 0
        assert write(container, "/root/b", 30)
        assert not make_files(container, 60)
        assert container.update_limits(Limits(disk_inodes=20)).disk_inodes == 20
        assert not make_files(container, 1)
        assert container.update_limits(Limits(disk_inodes=0)).disk_inodes == 0
        assert make_files(container, 100)


def test_usage_is_counted(garden: GardenClient, image: str) -> None:
    """Statement D7: bytes within a MiB, written out or not; inodes exactly."""
    with limited(garden, 50, image=image) as container:
        (start,) = garden.metrics([container.handle])
        image_bytes = garden.images.inspect(image).bytes
        assert start.disk_exclusive_bytes < MIB
        assert start.disk_exclusive_inodes > 0
        written = 0
        for number, mib in enumerate((3, 10), start=1):
            text_of(container, f"dd if=/dev/urandom of=/tmp/{mib} bs=1M count={mib} 2>/dev/null")
            written += mib * MIB
            (now,) = garden.metrics([container.handle])
            assert abs(now.disk_exclusive_bytes - start.disk_exclusive_bytes - written) < MIB
            assert now.disk_total_bytes - now.disk_exclusive_bytes == image_bytes
            # /tmp itself is copied up with the first file.
            assert now.disk_exclusive_inodes - start.disk_exclusive_inodes == number + 1


def test_a_sidecar_has_limits_of_its_own(garden: GardenClient, image: str) -> None:
    with limited(garden, 4) as container:
        spec = ProcessSpec(
            "sh", ("-c", "for f in a b; do dd if=/dev/zero of=/root/$f bs=1M count=6 conv=fsync || exit; done"),
            sidecar=Sidecar(image), limits=Limits(disk_bytes=10 * MIB),
        )  # fmt: skip
        output = container.run(spec).output()
        assert output.exit.code == 1
        assert any(words in output.stderr.lower() for words in OVER)
        script = "i=0; while [ $i -lt 80 ]; do : >/root/$i || exit 7; i=$((i+1)); done"
        few = ProcessSpec("sh", ("-c", script), sidecar=Sidecar(image), limits=Limits(disk_inodes=40))
        assert container.run(few).output().exit.code != 0
        assert write(container, "/root/a", 3)


def test_a_sidecars_limits_are_changed_and_its_use_is_counted(garden: GardenClient, image: str) -> None:
    """Bytes and inodes, while it runs."""
    with garden.create() as container:
        make = "i=0; while [ $i -lt $n ] && touch /root/$i 2>/dev/null; do i=$((i+1)); done"
        script = f"while read n; do {make}; echo $i; done"
        limits = Limits(disk_bytes=10 * MIB, disk_inodes=40)
        pea = container.run(
            ProcessSpec("sh", ("-c", script), id="pea", sidecar=Sidecar(image), limits=limits)
        )
        told = iter(pea)

        def files_made(wanted: int) -> int:
            pea.stdin.write(f"{wanted}\n".encode())
            return int(next(told).data)

        assert 20 < files_made(60) < 40
        found = container.update_limits(Limits(disk_inodes=100), "pea")
        assert (found.disk_bytes, found.disk_inodes) == (10 * MIB, 100)
        assert files_made(60) == 60
        (use,) = garden.metrics(processes=[(container.handle, "pea")])
        assert 60 < use.disk_exclusive_inodes < 80
        assert use.disk_total_bytes > use.disk_exclusive_bytes


def test_nothing_is_left_of_a_volume(garden: GardenClient, top: Path, image: str) -> None:
    """Neither directories nor figures nor limits, of containers and sidecars; while they are there they are counted."""
    wait_until(lambda: not records(top), "the end of earlier containers")
    container = limited(garden, 10, inodes=200)
    spec = ProcessSpec(
        "sleep", ("100",), sidecar=Sidecar(image), limits=Limits(disk_bytes=11 * MIB, disk_inodes=300)
    )
    container.run(spec)
    assert write(container, "/root/a", 5)
    found = sorted(records(top).values(), key=lambda figures: figures[2])
    assert [figures[1:3] + figures[4:6] for figures in found] == [
        [10 * 1024, 10 * 1024, 200, 200],
        [11 * 1024, 11 * 1024, 300, 300],
    ]
    assert 5 * 1024 <= found[0][0] <= 6 * 1024
    container.run(ProcessSpec("true", sidecar=Sidecar(image))).output()
    container.destroy()
    assert list((top / "state/volumes").iterdir()) == []
    wait_until(lambda: not records(top), "the deletion of what they wrote")
    assert garden.check_leaks() == []


def test_limits_and_use_outlive_the_server(garden: GardenClient, server: ServerProcess, image: str) -> None:
    """Killed and started again; the limits are the kernel's."""
    with limited(garden, 20, inodes=60, image=image, scope=DiskScope.TOTAL) as container:
        assert write(container, "/root/a", 5)
        server.kill()
        server.start()
        limits = container.limits()
        assert (limits.disk_bytes, limits.disk_inodes, limits.disk_scope) == (20 * MIB, 60, DiskScope.TOTAL)
        (metrics,) = garden.metrics([container.handle])
        assert 5 * MIB <= metrics.disk_exclusive_bytes < 6 * MIB
        assert not write(container, "/root/b", 14)
        assert not make_files(container, 60)


def test_a_project_id_is_not_used_again_while_something_is_counted_under_it(top: Path) -> None:
    """What an earlier volume of the same name has left would count against the new one."""
    place = top / "direct"
    place.mkdir()
    driver, volume, rubbish = ProjectQuota(top), place / "same", place / "rubbish"
    driver.make(volume)
    driver.limit(volume, DiskLimits(3 * MIB, 30))
    (volume / "file").write_bytes(bytes(2 * MIB))
    before = set(records(top))
    assert driver.remove(volume) is False
    volume.rename(rubbish)
    driver.make(volume)
    assert set(records(top)) > before
    assert driver.limits(volume) == DiskLimits()
    assert driver.use(volume).bytes < MIB
    for file in rubbish.iterdir():
        file.unlink()
    for directory in (rubbish, volume, place):
        directory.rmdir()
    assert not set(records(top)) & before


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ext4 without the feature", "rw"),
        ("ext4", "rw"),  # counts, and limits nothing
        ("xfs", "rw"),
        ("xfs", "pqnoenforce"),  # likewise
        ("xfs", "usrquota"),
    ],
)
def test_a_mount_without_project_quotas_has_no_driver(
    no_trace: None, tmp_path: Path, kind: str, options: str
) -> None:
    """A limit that is taken and not enforced would be worse than none."""
    with mounted(tmp_path, kind, options) as top:
        assert find_driver(top) is None


def test_a_server_on_such_a_mount_refuses_limits(no_trace: None, tmp_path: Path) -> None:
    """With words that say what to do; containers without limits are made."""
    tmp_path.chmod(0o755)
    with (
        mounted(tmp_path, "ext4", "rw") as top,
        running_server("--state-dir", str(top / "state")) as server,
        GardenClient(server.address) as garden,
    ):
        for limits in (Limits(disk_bytes=10 * MIB), Limits(disk_inodes=100)):
            with pytest.raises(
                Unimplemented, match="project quotas in force; start the server with --store-size"
            ):
                garden.create(ContainerSpec(limits=limits))
        with garden.create() as container:
            assert write(container, "/root/a", 1)
