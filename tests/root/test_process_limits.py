"""Limits of single processes: read from the kernel, changed while they run, told apart from their container's."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.garden import PATIENCE, events_of, sh
from kit.server import ServerProcess
from own_server import own_garden, own_server

from garden_py.client import (
    Container,
    ContainerSpec,
    EventKind,
    FailedPrecondition,
    GardenClient,
    InvalidArgument,
    Limits,
    NotFound,
    ProcessSpec,
    Sidecar,
)

pytestmark = pytest.mark.root

__all__ = ["own_garden", "own_server"]  # the fixtures `server` and `garden`

MIB = 1 << 20


def in_kernel(box: Container, process: str, *files: str) -> str:
    """What a file of a process's own cgroup says; files: its name on v1 and on v2."""
    for directory in cgroups_of(box.handle):
        for below in (f"work/p-{process}", f"p-{process}"):
            for file in files:
                if (path := directory / below / file).exists():
                    return path.read_text().strip()
    raise AssertionError(f"{process} has no group with {files}")


def test_change_while_it_runs(garden: GardenClient) -> None:
    """Up, down and away; what is not stated stays; the kernel has it, and the container's limits are as before."""
    with garden.create(ContainerSpec(limits=Limits(memory_bytes=256 * MIB, pids=100))) as box:
        box.start(ProcessSpec("sleep", ("1000",), id="worker", limits=Limits(memory_bytes=64 * MIB, pids=9)))
        before, events = box.limits(), events_of(garden, box.handle)
        now = box.limits("worker")
        assert (now.memory_bytes, now.pids, now.cpu_quota_us) == (64 * MIB, 9, 0)
        now = box.update_limits(Limits(memory_bytes=32 * MIB, cpu_quota_us=30_000), "worker")
        assert (now.memory_bytes, now.pids, now.cpu_quota_us) == (32 * MIB, 9, 30_000)
        assert in_kernel(box, "worker", "memory.limit_in_bytes", "memory.max") == str(32 * MIB)
        changed = next(each for each in events if each.kind is EventKind.LIMITS_CHANGED)
        assert (changed.handle, changed.process_id) == (box.handle, "worker")
        assert box.update_limits(Limits(cpu_weight=50, pids=0), "worker") == box.limits("worker")
        assert (box.limits("worker").cpu_weight, box.limits("worker").pids) == (50, 0)
        (worker,) = [each for each in box.processes() if each.id == "worker"]
        assert worker.spec.limits == Limits(32 * MIB, 50, 30_000, None, 0)
        assert box.limits() == before


def test_new_limit_bites(garden: GardenClient) -> None:
    """A process that had room has none any more; its neighbour in the container notices nothing."""
    with garden.create() as box:
        script = "read go; dd if=/dev/zero of=/dev/shm/a bs=1M count=60 2>/dev/null; echo done"
        process = box.run(sh(script), id="filler", limits=Limits(memory_bytes=128 * MIB))
        box.update_limits(Limits(memory_bytes=16 * MIB), "filler")
        other = box.run(["sleep", "1000"], limits=Limits(memory_bytes=16 * MIB))
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(PATIENCE).code is not None
        assert box.run(sh("du -m /dev/shm/a | cut -f1")).output().stdout.strip() < b"60"
        assert other.exit is None


def test_survives_a_restart(server: ServerProcess, garden: GardenClient) -> None:
    """The next server knows the changed limits, reads and changes them, and tells an exit by them."""
    box = garden.create()
    box.start(
        ProcessSpec(
            "sh", ("-c", "read go; tail /dev/zero"), id="worker", limits=Limits(memory_bytes=64 * MIB)
        )
    )
    box.update_limits(Limits(memory_bytes=32 * MIB, pids=7), "worker")
    server.kill()
    server.start()
    now = box.limits("worker")
    assert (now.memory_bytes, now.pids) == (32 * MIB, 7)
    (worker,) = box.processes()
    assert worker.spec.limits == Limits(memory_bytes=32 * MIB, pids=7)
    assert box.update_limits(Limits(memory_bytes=24 * MIB), "worker").memory_bytes == 24 * MIB
    process = box.attach("worker")
    process.stdin.write(b"\n")
    exit = process.output().exit
    assert exit.out_of_memory
    assert exit.reason == f"killed: out of memory (the process's own limit {24 * MIB} bytes)"


def test_out_of_memory_says_whose_limit_it_was(garden: GardenClient) -> None:
    """Of two limits that stand one within the other, the event and the exit name the one that was hit."""
    with garden.create(ContainerSpec(limits=Limits(memory_bytes=64 * MIB))) as box:
        events = events_of(garden, box.handle)
        small = box.run(["tail", "/dev/zero"], id="small", limits=Limits(memory_bytes=16 * MIB)).output()
        assert small.exit.reason == f"killed: out of memory (the process's own limit {16 * MIB} bytes)"
        large = box.run(["tail", "/dev/zero"], id="large", limits=Limits(memory_bytes=256 * MIB)).output()
        assert large.exit.reason == f"killed: out of memory (the container's limit {64 * MIB} bytes)"
        plain = box.run(["tail", "/dev/zero"], id="plain").output()
        assert plain.exit.reason == f"killed: out of memory (limit {64 * MIB} bytes)"
        told: list[tuple[str, dict[str, str]]] = []
        for event in events:
            if event.kind is EventKind.OUT_OF_MEMORY:
                told.append((event.process_id, dict(event.details)))
            if event.kind is EventKind.PROCESS_EXITED and event.process_id == "plain":
                break
        containers = {"limit_of": "container", "limit_bytes": str(64 * MIB), "kills": "1"}
        assert told == [
            ("small", {"limit_of": "process", "limit_bytes": str(16 * MIB), "kills": "1"}),
            ("", {**containers, "victim": "large"}),
            ("", containers),
        ]


def test_every_one_that_runs_out_of_memory_at_once_is_told(garden: GardenClient) -> None:
    """Each by its exit and by an event with its id."""
    ids = {f"hungry-{number}" for number in range(16)}
    with garden.create() as box:
        events = events_of(garden, box.handle)
        limits = Limits(memory_bytes=4 * MIB)
        with ThreadPoolExecutor(len(ids)) as pool:
            for exit in pool.map(
                lambda id: box.run(["tail", "/dev/zero"], id=id, limits=limits).output().exit, ids
            ):
                assert exit.out_of_memory
        told: list[str] = []
        exited: set[str] = set()
        while exited < ids:
            event = next(events)
            if event.kind is EventKind.OUT_OF_MEMORY:
                told.append(event.process_id)
            if event.kind is EventKind.PROCESS_EXITED:
                exited.add(event.process_id)
        assert sorted(told) == sorted(ids)


@pytest.mark.parametrize("own_limits", [False, True])
def test_sidecar(server: ServerProcess, garden: GardenClient, own_limits: bool) -> None:
    """Within or beside its container's limits, with or without limits at its start."""
    (image,) = (server.place / "state/rootfs").iterdir()
    with garden.create() as box:
        sidecar = Sidecar(str(image), own_limits=own_limits)
        script = "read go; tail /dev/zero"
        process = box.run(ProcessSpec("sh", ("-c", script), id="pea", sidecar=sidecar))
        assert box.limits("pea").memory_bytes == 0
        assert box.update_limits(Limits(memory_bytes=32 * MIB), "pea").memory_bytes == 32 * MIB
        assert in_kernel(box, "pea", "memory.limit_in_bytes", "memory.max") == str(32 * MIB)
        events = events_of(garden, box.handle)
        process.stdin.write(b"\n")
        assert process.output().exit.out_of_memory
        assert next(e for e in events if e.kind is EventKind.OUT_OF_MEMORY).process_id == "pea"


def test_what_has_no_limits_of_its_own_is_refused(garden: GardenClient) -> None:
    """Each case with a reason of its own, and nothing is changed."""
    with garden.create() as box:
        box.start(ProcessSpec("sleep", ("1000",), id="plain"))
        box.run(["true"], id="gone", limits=Limits(pids=5)).wait()
        before = box.limits()
        for process_id, kind, reason in (
            ("plain", FailedPrecondition, "PROCESS_NOT_LIMITED"),
            ("gone", FailedPrecondition, "PROCESS_EXITED"),
            ("nobody", NotFound, "PROCESS_NOT_FOUND"),
        ):
            with pytest.raises(kind) as refused:
                box.limits(process_id)
            assert refused.value.code == reason
            with pytest.raises(kind):
                box.update_limits(Limits(pids=3), process_id)
        box.start(ProcessSpec("sleep", ("1000",), id="limited", limits=Limits(pids=5)))
        for bad, field in (
            (Limits(disk_bytes=1 << 30), "disk_bytes"),
            (Limits(memory_bytes=1), "memory_bytes"),
        ):
            with pytest.raises(InvalidArgument) as invalid:
                box.update_limits(bad, "limited")
            assert invalid.value.fields[0].field == f"limits.{field}"
        assert (box.limits(), box.limits("limited").pids) == (before, 5)


def test_limit_below_use_is_refused(garden: GardenClient) -> None:
    """As a container's: nothing is killed, nothing is changed."""
    with garden.create() as box:
        script = "dd if=/dev/zero of=/dev/shm/a bs=1M count=40 2>/dev/null; echo full; sleep 1000"
        process = box.run(sh(script), id="full", limits=Limits(memory_bytes=64 * MIB, pids=9))
        next(iter(process))
        with pytest.raises(FailedPrecondition, match=r"is below the 4\d{7} bytes in use") as refused:
            box.update_limits(Limits(memory_bytes=8 * MIB, pids=5), "full")
        assert refused.value.code == "LIMIT_REFUSED"
        assert (box.limits("full").memory_bytes, box.limits("full").pids) == (64 * MIB, 9)
        assert process.exit is None


def test_command_line(server: ServerProcess, garden: GardenClient) -> None:
    """`garden limits HANDLE --process ID` shows and changes."""
    with garden.create(ContainerSpec(handle="box")) as box:
        box.start(ProcessSpec("sleep", ("1000",), id="worker", limits=Limits(pids=9)))

        def garden_cli(*args: str) -> subprocess.CompletedProcess[str]:
            command = [str(Path(sys.executable).with_name("garden")), *args, "--address", server.address]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

        shown = garden_cli("limits", "box", "--process", "worker", "--memory", "64M", "-o", "json")
        found = json.loads(shown.stdout)
        assert (found["memory_bytes"], found["pids"]) == (64 * MIB, 9)
        assert "memory 64.0M" in garden_cli("limits", "box", "--process", "worker").stdout
        refused = garden_cli("limits", "box", "--process", "nobody")
        assert refused.returncode != 0
        assert "nobody" in refused.stderr
