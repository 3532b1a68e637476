"""Limits that bite, are told, and change while the container runs."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from kit.garden import PATIENCE, code_of, events_of, sh, text_of, wait_until

from garden_py.client import (
    Container,
    ContainerSpec,
    ContainerState,
    EventKind,
    FailedPrecondition,
    GardenClient,
    Limits,
    ResourceExhausted,
)
from garden_py.model.limits import MEMORY_FLOOR_BYTES

pytestmark = pytest.mark.root

MIB = 1 << 20


def limited(garden: GardenClient, **limits: int) -> Container:
    return garden.create(ContainerSpec(limits=Limits(**limits)))


@pytest.mark.cgroup2
def test_hog_is_killed_and_the_reason_told(garden: GardenClient) -> None:
    """In the exit status, the event, the metrics and the container's notes; PID 1 lives."""
    with limited(garden, memory_bytes=32 * MIB) as box:
        events = events_of(garden, box.handle)
        pid = box.info().pid
        hog = box.run(["tail", "/dev/zero"], id="hog").output()
        assert (hog.exit.signal, hog.exit.out_of_memory) == (9, True)
        assert hog.exit.reason == f"killed: out of memory (limit {32 * MIB} bytes)"
        assert next(e for e in events if e.kind is EventKind.OUT_OF_MEMORY).handle == box.handle
        wait_until(lambda: "Out of memory" in box.info().events, "the note")
        metrics = box.metrics()
        assert metrics.oom_kills == 1
        assert metrics.memory_limit_bytes == 32 * MIB
        info = box.info()
        assert (info.state, info.pid) == (ContainerState.ACTIVE, pid)
        assert text_of(box, "echo alive") == "alive\n"


def test_child_that_is_killed_is_told_by_its_shell(garden: GardenClient) -> None:
    """128 + 9 of a shell whose child ran out of memory is the same story."""
    with limited(garden, memory_bytes=16 * MIB) as box:
        done = box.run(sh("tail /dev/zero; exit $?")).output()
        assert (done.exit.code, done.exit.out_of_memory) == (137, True)


@pytest.mark.cgroup2
def test_child_that_its_shell_outlives_is_told_once(garden: GardenClient) -> None:
    """Every charge that fails on the way to one kill is signalled by cgroup v1: hundreds of times."""
    with limited(garden, memory_bytes=24 * MIB) as box:
        events = events_of(garden, box.handle)
        hungry = """sh -c 'x=$(dd if=/dev/zero bs=1M count=60 2>/dev/null | tr "\\0" a)'; exit 4"""
        done = box.run(sh(hungry), id="shell").output()
        assert (done.exit.code, done.exit.out_of_memory) == (4, False)
        kills = box.metrics().oom_kills
        box.run(["true"], id="last").wait()
        so_far = itertools.takewhile(lambda e: e.process_id != "last" or e.exit is None, events)
        told = [e for e in so_far if e.kind in (EventKind.OUT_OF_MEMORY, EventKind.PROCESS_EXITED)]
        assert [(e.kind, e.process_id) for e in told] == [
            (EventKind.OUT_OF_MEMORY, ""),
            (EventKind.PROCESS_EXITED, "shell"),
        ]
        limit = {"limit_of": "container", "limit_bytes": str(24 * MIB)}
        assert dict(told[0].details) == {**limit, "kills": str(kills)}
        assert box.info().events == ("Out of memory",)


def test_an_oom_kill_explains_one_end(garden: GardenClient) -> None:
    """Who is killed by a caller, or by somebody inside, after another's OOM is not taken for its victim."""
    with limited(garden, memory_bytes=32 * MIB) as box:
        by_caller = box.run(["sleep", "1000"])
        by_stranger = box.run(sh("echo $$; exec sleep 1000"))
        pid = next(iter(by_stranger)).data.decode().strip()
        assert box.run(["tail", "/dev/zero"]).output().exit.out_of_memory
        by_caller.signal("KILL")
        assert not by_caller.wait(PATIENCE).out_of_memory
        assert code_of(box, f"kill -9 {pid}") == 0
        assert not by_stranger.wait(PATIENCE).out_of_memory


@pytest.mark.cgroup2
def test_shared_memory_counts(garden: GardenClient) -> None:
    """ME2: files on /dev/shm are memory."""
    with limited(garden, memory_bytes=64 * MIB) as box:
        assert code_of(box, "dd if=/dev/zero of=/dev/shm/a bs=1M count=50 2>/dev/null && rm /dev/shm/a") == 0
        assert code_of(box, "dd if=/dev/zero of=/dev/shm/a bs=1M count=80 2>/dev/null") != 0


def test_memory_floor_is_enough_for_a_process(garden: GardenClient) -> None:
    """Below it the server refuses; at it a shell runs, and starting one is not killed half way."""
    with limited(garden, memory_bytes=MEMORY_FLOOR_BYTES) as box:
        for _ in range(5):
            assert text_of(box, "echo it runs; true | cat") == "it runs\n"
        assert box.metrics().oom_kills == 0


def test_no_swap_beside_the_memory_limit(garden: GardenClient) -> None:
    """ME1: swapping does not stretch the limit; trivial on a host without swap."""
    with limited(garden, memory_bytes=16 * MIB) as box:
        assert box.run(["tail", "/dev/zero"]).output().exit.out_of_memory
        assert box.metrics().memory_peak_bytes < 64 * MIB


@pytest.mark.cgroup2
def test_tasks_are_limited(garden: GardenClient) -> None:
    """OL1: fork fails, the container goes on."""
    with limited(garden, pids=8) as box:
        assert code_of(box, "n=0; while [ $n -lt 20 ]; do sleep 1000 >/dev/null 2>&1 & n=$((n+1)); done") == 2
        metrics = box.metrics()
        assert metrics.pids_limit == 8
        assert metrics.pids <= 9  # PID 1 is beside the limit
        box.stop(kill=True)
        assert text_of(box, "echo again") == "again\n"


@pytest.mark.cgroup2
def test_processes_that_callers_start_are_tasks_too(garden: GardenClient) -> None:
    """The kernel checks the limit when a task forks; these are forked outside and join. Also many at once."""
    with limited(garden, pids=4) as box, ThreadPoolExecutor(8) as pool:

        def start(number: int) -> ResourceExhausted | str:
            try:
                return box.start(["sleep", "1000"], id=f"s{number}").id
            except ResourceExhausted as error:
                return error

        ends = list(pool.map(start, range(8)))
        started = [end for end in ends if isinstance(end, str)]
        refused = [end for end in ends if isinstance(end, ResourceExhausted)]
        assert (len(started), len(refused)) == (4, 4)
        assert {(end.code, end.quotas[0].field) for end in refused} == {("TASK_LIMIT_REACHED", "limits.pids")}
        assert box.metrics().pids == 5  # PID 1 is beside the limit
        assert {each.id for each in box.processes()} == set(started)
        box.signal(started[0], "KILL")
        box.wait(started[0])
        assert text_of(box, "echo room") == "room\n"
        box.update_limits(Limits(pids=0))
        assert text_of(box, "true | echo any") == "any\n"


@pytest.mark.cgroup2
def test_quota_shows_in_use_and_throttling(garden: GardenClient) -> None:
    """A fifth of a processor is a fifth, and the metrics say that it was held back."""
    with limited(garden, cpu_quota_us=20_000, cpu_period_us=100_000) as box:
        box.start(sh("while :; do :; done"))
        before, started = box.metrics(), time.monotonic()
        wait_until(lambda: time.monotonic() - started > 1, "a second")
        after, took_s = box.metrics(), time.monotonic() - started
        share = (after.cpu_usage_ns - before.cpu_usage_ns) / 1e9 / took_s
        assert 0.05 < share < 0.3
        assert after.cpu_throttled_ns > before.cpu_throttled_ns


def test_weight_decides_under_contention(garden: GardenClient) -> None:
    """Ten to one: of a CPU for which they compete the heavier gets several times as much, whoever else wants it."""
    mask = hex(1 << min(os.sched_getaffinity(0)))
    with limited(garden, cpu_weight=20) as light, limited(garden, cpu_weight=200) as heavy:
        for box in (light, heavy):
            box.start(["taskset", mask, *sh("while :; do :; done")])
        before = [box.metrics().cpu_usage_ns for box in (light, heavy)]
        started = time.monotonic()
        wait_until(lambda: time.monotonic() - started > 1.5, "contention")
        after = [box.metrics().cpu_usage_ns for box in (light, heavy)]
        used_light, used_heavy = (b - a for a, b in zip(before, after, strict=True))
        assert used_heavy > 3 * used_light


def without_hosts(limits: Limits) -> Limits:
    """Without what depends on the host: block I/O (tests/root/test_block_io.py) and swap (test_swap.py)."""
    return replace(
        limits,
        swap_bytes=None,
        io_weight=None,
        io_read_bytes_per_s=None,
        io_write_bytes_per_s=None,
        io_read_ops_per_s=None,
        io_write_ops_per_s=None,
    )


@pytest.mark.cgroup2
def test_limits_are_read_from_the_kernel(garden: GardenClient) -> None:
    """What GetLimits says is in force."""
    with limited(garden, memory_bytes=64 * MIB, cpu_weight=50, cpu_quota_us=50_000, pids=30) as box:
        assert without_hosts(box.limits()) == Limits(64 * MIB, 50, 50_000, 100_000, 30, 0, 0)
    with garden.create() as box:
        assert without_hosts(box.limits()) == Limits(0, 100, 0, 100_000, 0, 0, 0)


@pytest.mark.cgroup2
def test_limits_change_on_a_running_container(garden: GardenClient) -> None:
    """Up and down, one at a time; what is not stated stays, zero lifts, and the processes live on."""
    with limited(garden, memory_bytes=64 * MIB, pids=20) as box:
        process = box.run(["sleep", "1000"])
        assert without_hosts(box.update_limits(Limits(memory_bytes=128 * MIB))) == Limits(
            128 * MIB, 100, 0, 100_000, 20, 0, 0
        )
        assert box.update_limits(Limits(memory_bytes=16 * MIB)).memory_bytes == 16 * MIB
        assert box.run(["tail", "/dev/zero"]).output().exit.out_of_memory
        changed = box.update_limits(Limits(cpu_quota_us=30_000, cpu_period_us=50_000, cpu_weight=300))
        assert without_hosts(changed) == Limits(16 * MIB, 300, 30_000, 50_000, 20, 0, 0)
        assert box.update_limits(Limits(cpu_quota_us=40_000)).cpu_period_us == 50_000
        lifted = box.update_limits(Limits(memory_bytes=0, cpu_quota_us=0, pids=0))
        assert (lifted.memory_bytes, lifted.cpu_quota_us, lifted.pids) == (0, 0, 0)
        assert box.info().spec.limits.memory_bytes == 0
        assert process.exit is None
        assert code_of(box, "dd if=/dev/zero of=/dev/shm/a bs=1M count=30 2>/dev/null && rm /dev/shm/a") == 0


@pytest.mark.cgroup2
def test_limit_below_use_is_refused(garden: GardenClient) -> None:
    """The kernel cannot take the memory back; nothing is killed, nothing is changed, the field is named."""
    with limited(garden, memory_bytes=64 * MIB) as box:
        text_of(box, "dd if=/dev/zero of=/dev/shm/a bs=1M count=40 2>/dev/null")
        with pytest.raises(FailedPrecondition, match=r"is below the \d+ bytes in use") as refused:
            box.update_limits(Limits(memory_bytes=8 * MIB))
        assert refused.value.code == "LIMIT_REFUSED"
        in_use = next(int(word) for word in str(refused.value).split() if word.isdecimal())
        assert 40 * MIB <= in_use <= 64 * MIB
        assert refused.value.metadata["field"] == "limits.memory_bytes"
        assert box.limits().memory_bytes == 64 * MIB
        assert box.metrics().oom_kills == 0


def test_limits_hold_for_everything_in_the_container(garden: GardenClient) -> None:
    """Many small ones together are as limited as one big one."""
    with limited(garden, memory_bytes=32 * MIB) as box, ThreadPoolExecutor(4) as pool:
        write = "dd if=/dev/zero of=/dev/shm/$$ bs=1M count=15 2>/dev/null"
        codes = list(pool.map(lambda _: code_of(box, write), range(4)))
        assert any(codes)
        assert text_of(box, "echo alive; rm -f /dev/shm/*") == "alive\n"


def test_process_limit_lies_within_the_containers(garden: GardenClient) -> None:
    """A generous limit of a process does not lift the container's."""
    with limited(garden, memory_bytes=16 * MIB) as box:
        done = box.run(["tail", "/dev/zero"], limits=Limits(memory_bytes=256 * MIB)).output()
        assert done.exit.signal == 9
        assert text_of(box, "echo alive") == "alive\n"
