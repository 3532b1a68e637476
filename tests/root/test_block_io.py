"""Limits on a container's transfers with the disk that its writable layer is on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.garden import sh, wait_until
from kit.patience import FACTOR
from kit.server import ServerProcess, running_server
from own_server import own_garden, own_server

from garden_py.backend.host.block_device import device_below, scheduler_of
from garden_py.client import (
    Container,
    ContainerSpec,
    FailedPrecondition,
    GardenClient,
    GardenError,
    InvalidArgument,
    Limits,
    ProcessSpec,
    Sidecar,
)

KERNEL = tuple(int(word) for word in os.uname().release.split(".")[:2])
pytestmark = [
    pytest.mark.root,
    pytest.mark.host,
    pytest.mark.skipif(device_below(Path("/var/tmp")) is None, reason="/var/tmp is on no block device"),
]

__all__ = ["own_garden", "own_server"]  # the fixtures `server` and `garden`

MIB = 1 << 20
V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
SHARED = ("read", "write")


def moved_bytes(box: Container, direction: str) -> int:
    """What the kernel has let a container read or write so far, on all devices."""
    for directory in cgroups_of(box.handle):
        if V2:
            pairs = (pair.split("=") for pair in (directory / "io.stat").read_text().split() if "=" in pair)
            return sum(int(value) for key, value in pairs if key == f"{direction[0]}bytes")
        if (stat := directory / "blkio.throttle.io_service_bytes").exists():
            lines = (line.split() for line in stat.read_text().splitlines())
            return sum(int(line[2]) for line in lines if line[1:2] == [direction.capitalize()])
    raise AssertionError("its transfers are not counted")


def rate(box: Container, direction: str, seconds: float = 2.0) -> float:
    """Bytes per second that pass now, over a window that the clock measures afterwards."""
    wait_until(lambda: moved_bytes(box, direction), "the first transfer")
    before, started = moved_bytes(box, direction), time.monotonic()
    wait_until(lambda: time.monotonic() - started > seconds, "the window's end")
    return (moved_bytes(box, direction) - before) / (time.monotonic() - started)


def dd(direction: str, writes: int = 64) -> str:
    """A script that transfers past the page cache for ever; after so many writes it begins the file anew."""
    if direction == "write":
        transfer = f"dd if=/dev/zero of=/x bs=64k count={writes} oflag=direct conv=notrunc status=none"
        return f"while {transfer}; do :; done"
    make = "dd if=/dev/zero of=/x bs=1M count=8 oflag=direct status=none"
    return f"{make}; while dd if=/x of=/dev/null bs=64k iflag=direct status=none; do :; done"


@pytest.mark.parametrize("direction", SHARED)
def test_rate_is_kept_at_create_and_live(garden: GardenClient, direction: str) -> None:
    """Within a generous band below and above; raised on the running container it moves more."""
    field = f"io_{direction}_bytes_per_s"
    with garden.create(ContainerSpec(limits=Limits(**{field: 2 * MIB}))) as box:
        assert getattr(box.limits(), field) == 2 * MIB
        box.start(sh(dd(direction)))
        slow = rate(box, direction)
        assert 0.2 * MIB < slow < 3 * MIB
        assert getattr(box.update_limits(Limits(**{field: 0})), field) == 0
        wait_until(lambda: rate(box, direction, 0.5) > 6 * MIB, "full speed")
        now = box.update_limits(Limits(**{field: 1 * MIB}))
        assert getattr(now, field) == 1 * MIB
        rate(box, direction, 1.0)  # what was under way
        assert rate(box, direction) < 2 * MIB


def test_operations_are_limited(garden: GardenClient) -> None:
    """20 writes of 64 KiB a second are little over a MiB."""
    with garden.create(ContainerSpec(limits=Limits(io_write_ops_per_s=20))) as box:
        box.start(sh(dd("write")))
        assert rate(box, "write") < 2.5 * MIB
        limits = box.limits()
        assert (limits.io_write_ops_per_s, limits.io_read_ops_per_s) == (20, 0)


def test_a_sidecar_within_the_limits_counts(server: ServerProcess, garden: GardenClient) -> None:
    """Its layer is on the same device."""
    (image,) = (server.place / "state/rootfs").iterdir()
    with garden.create(ContainerSpec(limits=Limits(io_write_bytes_per_s=2 * MIB))) as box:
        box.start(ProcessSpec("sh", ("-c", dd("write")), id="pea", sidecar=Sidecar(str(image))))
        assert 0.2 * MIB < rate(box, "write") < 3 * MIB


def test_survives_a_restart_and_the_command_line_shows_it(
    server: ServerProcess, garden: GardenClient
) -> None:
    """`garden create --io-write`, `garden limits --io-read`, read from the kernel by the next server."""

    def cli(*args: str) -> str:
        command = [str(Path(sys.executable).with_name("garden")), *args, "--address", server.address]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    cli("create", "--handle", "box", "--io-write", "4M", "--io-read-ops", "500")
    cli("limits", "box", "--io-read", "8M")
    server.kill()
    server.start()
    found = json.loads(cli("limits", "box", "-o", "json"))
    assert (found["io_read_bytes_per_s"], found["io_write_bytes_per_s"]) == (8 * MIB, 4 * MIB)
    assert (found["io_read_ops_per_s"], found["io_write_ops_per_s"]) == (500, 0)
    assert "reads 8.0M/s and 500/s, writes 4.0M/s" in cli("limits", "box")
    garden.container("box").destroy()


def test_what_is_refused(garden: GardenClient) -> None:
    """Out of range, of a single process, and a weight where nothing divides by it; nothing is changed."""
    with garden.create(ContainerSpec(limits=Limits(pids=50))) as box:
        before = box.limits()
        for bad, field in (
            (Limits(io_write_bytes_per_s=1), "io_write_bytes_per_s"),
            (Limits(io_read_ops_per_s=1 << 32), "io_read_ops_per_s"),
            (Limits(io_weight=0), "io_weight"),
        ):
            with pytest.raises(InvalidArgument) as invalid:
                box.update_limits(bad)
            assert invalid.value.fields[0].field == f"limits.{field}"
        with pytest.raises(InvalidArgument):
            box.start(ProcessSpec("true", limits=Limits(io_write_bytes_per_s=MIB)))
        device = device_below(Path("/var/tmp"))
        assert device is not None
        if scheduler_of(device) != "bfq" and not V2:
            with pytest.raises(GardenError) as unsupported:
                box.update_limits(Limits(io_weight=200, io_write_bytes_per_s=MIB, pids=3))
            assert unsupported.value.code == "NOT_SUPPORTED"
            assert "bfq" in str(unsupported.value)
        box.run(sh("dd if=/dev/zero of=/dev/shm/a bs=1M count=40 2>/dev/null")).output()
        with pytest.raises(FailedPrecondition):  # of another limit: this one's is taken back
            box.update_limits(Limits(io_write_bytes_per_s=MIB, memory_bytes=8 * MIB))
        assert box.limits() == before


@pytest.mark.skipif(KERNEL < (6, 3), reason="no id-mapped mounts of a tmpfs before Linux 6.3")
def test_a_store_in_memory_cannot_be_limited(no_trace: None) -> None:
    """No block device, no limit: said at once, at create and live; "unlimited" is fine."""
    place = Path("/dev/shm") / f"gt-io-{os.getpid()}"
    try:
        with (
            running_server("--state-dir", str(place)) as server,
            GardenClient(server.address) as garden,
            garden.create(ContainerSpec(limits=Limits(io_read_bytes_per_s=0))) as box,
        ):
            assert box.limits().io_read_bytes_per_s is None
            for act in (
                lambda: box.update_limits(Limits(io_read_bytes_per_s=MIB)),
                lambda: garden.create(ContainerSpec(limits=Limits(io_read_bytes_per_s=MIB))),
            ):
                with pytest.raises(GardenError) as refused:
                    act()
                assert refused.value.code == "NOT_SUPPORTED"
                assert "no single block device" in str(refused.value)
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)


def test_defaults_of_the_server(no_trace: None) -> None:
    """OL3: for whoever states nothing; what is stated goes before."""
    flags = ("--container-io-max-write-bps", "2M", "--container-io-max-read-iops", "300")
    with running_server(*flags) as server, GardenClient(server.address) as garden:
        with garden.create() as box:
            limits = box.limits()
            assert (limits.io_write_bytes_per_s, limits.io_read_ops_per_s) == (2 * MIB, 300)
            box.start(sh(dd("write")))
            assert rate(box, "write") < 3 * MIB
        with garden.create(ContainerSpec(limits=Limits(io_write_bytes_per_s=0))) as box:
            assert box.limits().io_write_bytes_per_s == 0


# --- weights


@pytest.fixture
def bfq_disk(no_trace: None, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system on a device whose scheduler divides by weight, and where to choose its scheduler."""
    file, place = tmp_path / "disk", Path(tempfile.mkdtemp(dir="/var/tmp"))
    with ExitStack() as undo:
        undo.callback(place.rmdir)
        with file.open("wb") as disk:
            disk.truncate(512 * MIB)
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(file))
        device = run("losetup", "--find", "--show", "--direct-io=on", str(file)).strip()
        undo.callback(run, "losetup", "--detach", device)
        scheduler = Path("/sys/block") / Path(device).name / "queue/scheduler"
        if "bfq" not in scheduler.read_text():
            pytest.skip("the kernel has no bfq scheduler")
        before = scheduler_of_text(scheduler.read_text())
        scheduler.write_text("bfq")
        undo.callback(scheduler.write_text, before)
        # Else whoever has just begun gets more, whatever its weight (bfq-iosched.rst, low_latency).
        (scheduler.parent / "iosched/low_latency").write_text("0")
        run("mount", device, str(place))
        undo.callback(run, "umount", str(place))
        yield place, scheduler


def scheduler_of_text(text: str) -> str:
    """The one in brackets."""
    return text.partition("[")[2].partition("]")[0]


def run(*argv: str) -> str:
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60 * FACTOR)
    return done.stdout


def test_weights_divide_a_device(bfq_disk: tuple[Path, Path]) -> None:
    """At create and live, by the server's default for who states none; said where nothing divides any more."""
    place, scheduler = bfq_disk
    flags = ("--state-dir", str(place / "state"), "--default-container-blockio-weight", "200")
    with (
        running_server(*flags) as server,
        GardenClient(server.address) as garden,
        garden.create(ContainerSpec(limits=Limits(io_weight=1000))) as heavy,
        garden.create(ContainerSpec(limits=Limits(io_weight=100))) as light,
        garden.create() as neither,
    ):
        assert [box.limits().io_weight for box in (heavy, light, neither)] == [1000, 100, 200]
        for box in (heavy, light):
            box.start(sh(dd("write", 1500)))
        prefers(heavy, light)
        assert light.update_limits(Limits(io_weight=1000)).io_weight == 1000
        heavy.update_limits(Limits(io_weight=100))
        rate(heavy, "write", 1.0)  # what was under way
        prefers(light, heavy)
        with pytest.raises(GardenError, match="bfq scheduler takes at most 1000"):
            heavy.update_limits(Limits(io_weight=1001))
        server.kill()
        server.start()
        assert [garden.container(box.handle).limits().io_weight for box in (heavy, light)] == [100, 1000]
        scheduler.write_text("none")
        assert heavy.limits().io_weight is None
        with pytest.raises(GardenError, match="not bfq"):
            heavy.update_limits(Limits(io_weight=500))


def prefers(one: Container, other: Container) -> None:
    """One is seen to get more than the other; with equal weights it is a tenth more at most.

    While the disk is what both wait for: a busy processor may hide it for a while, and an emulated one for good.
    """
    if "CGROUP2_VM" not in os.environ:
        wait_until(lambda: ratio(one, other) > 1.5, "the one with the higher weight writes more", 60)


def ratio(one: Container, other: Container) -> float:
    """How much more one writes than another in the same two seconds."""
    for box in (one, other):
        wait_until(lambda box=box: moved_bytes(box, "write"), "the first transfer")
    before, started = [moved_bytes(box, "write") for box in (one, other)], time.monotonic()
    wait_until(lambda: time.monotonic() - started > 2.0, "the window's end")
    moved = [moved_bytes(box, "write") - had for box, had in zip((one, other), before, strict=True)]
    return moved[0] / max(1, moved[1])
