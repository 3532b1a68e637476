"""Containers that used more CPU time than they are entitled to get what the others leave, and come back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.cgroups import ROOT, cgroups_of, matching, pids_in
from kit.garden import code_of, sh, wait_until
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import Container, ContainerSpec, GardenClient, Limits, ProcessSpec

pytestmark = pytest.mark.root

V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
SPIN = "while :; do :; done"
FLAGS = ("--enable-cpu-throttling", "--cpu-throttling-check-interval", "0.3")


@contextmanager
def server_with(*flags: str) -> Iterator[tuple[ServerProcess, GardenClient]]:
    """A server with these settings, and a client of it."""
    before = snapshot()
    with running_server(*flags) as server, GardenClient(server.address) as garden:
        yield server, garden
    assert_no_trace(before)


def pid_on_host(box: Container, script: str) -> int:
    """A process of the container by its command line, as the host numbers it."""
    for directory in cgroups_of(box.handle):
        for pid in pids_in(directory):
            if script in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace(
                "\0", " "
            ):
                return pid
    raise AssertionError(f"nothing runs {script}")


def spin_on_each_cpu(box: Container) -> None:
    """So that two of them compete everywhere: left to the scheduler, each may have a CPU of its own."""
    for cpu in os.sched_getaffinity(0):
        box.start(["taskset", hex(1 << cpu), *sh(SPIN)])


def cpu_path(pid: int) -> str:
    """Where a process is in the hierarchy of the cpu controller."""
    lines = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    return next(path for _, names, path in lines if "cpu" in names.split(",") or (V2 and not names))


def memory_path(pid: int) -> str:
    """The same of the memory controller."""
    lines = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    return next(path for _, names, path in lines if "memory" in names.split(",") or (V2 and not names))


def is_bad(box: Container, script: str = SPIN) -> bool:
    """Whether the kernel has it among those over their entitlement."""
    if not V2:
        return cpu_path(pid_on_host(box, script)).endswith(f"bad/{box.handle}")
    (directory,) = cgroups_of(box.handle)
    return "trusted.garden.weight" in os.listxattr(directory)


def weight_in_force(box: Container) -> int:
    """Of a container on v2."""
    (directory,) = cgroups_of(box.handle)
    return int((directory / "cpu.weight").read_text())


def used_ns(*boxes: Container) -> list[int]:
    return [box.metrics().cpu_usage_ns for box in boxes]


def test_spinning_one_is_throttled_and_an_idle_one_can_spike(no_trace: None) -> None:
    """CT4; memory and task limits stay where they were, and what the spinner is told of its limits is as asked."""
    limits = Limits(cpu_weight=100, memory_bytes=64 << 20, pids=20)
    with (
        server_with(*FLAGS) as (_, garden),
        garden.create(ContainerSpec(limits=limits)) as spinner,
        garden.create(ContainerSpec(limits=Limits(cpu_weight=2000))) as idle,
    ):
        before = spinner.limits()
        spin_on_each_cpu(spinner)
        memory = memory_path(pid_on_host(spinner, SPIN))
        wait_until(lambda: is_bad(spinner), "throttling", 60)
        assert memory_path(pid_on_host(spinner, SPIN)) == memory
        assert spinner.limits() == before
        assert spinner.metrics().pids_limit == 20
        spin_on_each_cpu(idle)
        first, started = used_ns(spinner, idle), time.monotonic()
        wait_until(lambda: time.monotonic() - started > 1.5, "contention")
        second = used_ns(spinner, idle)
        of_spinner, of_idle = (b - a for a, b in zip(first, second, strict=True))
        assert of_idle > 5 * of_spinner
        # what starts now starts on the right side, and is limited as ever; it may have rested beside the idle one
        idle.stop(kill=True)
        for number in range(20):
            script = f"sleep 1000; true {number}"
            wait_until(lambda: is_bad(spinner), "throttling", 60)
            spinner.start(sh(script), id=f"late-{number}")
            is_there = is_bad(spinner, script)
            if is_bad(spinner):  # else it has just been let go
                assert is_there
                break
            spinner.signal(f"late-{number}", "KILL")
        else:
            raise AssertionError("it is let go whenever something starts")
        assert code_of(spinner, "dd if=/dev/zero of=/dev/shm/a bs=1M count=80 2>/dev/null") != 0
        if V2:  # 20 to 1 between them may be more than the balance asks for already
            assert weight_in_force(spinner) <= 100
        else:
            shares = [
                int(Path(str(place).replace("/good/", "/bad/"), "cpu.shares").read_text())
                for place in cgroups_of(spinner.handle)
                if (place / "cpu.shares").exists() and place.parent.name == "good"
            ]
            assert shares == [1024]


def test_way_back(no_trace: None) -> None:
    """Who rests is entitled to more again; limits that were changed meanwhile are in force there as well."""
    with (
        server_with(*FLAGS, "--cpu-entitlement-per-share", "0.3") as (_, garden),
        garden.create(ContainerSpec(limits=Limits(cpu_weight=10))) as box,
    ):
        box.start(sh("sleep 1000; true"))
        spinning = box.run(sh(SPIN))
        own = ProcessSpec("sh", ("-c", "sleep 2000; true"), id="own", limits=Limits(pids=5, cpu_weight=50))
        box.start(own)
        wait_until(lambda: is_bad(box), "throttling")
        assert box.update_limits(Limits(cpu_weight=20, cpu_quota_us=90_000)).cpu_weight == 20
        assert box.limits("own").cpu_weight == 50
        if not V2:
            assert cpu_path(pid_on_host(box, "sleep 2000; true")).endswith(f"bad/{box.handle}/p-own")
            bad = Path("/sys/fs/cgroup/cpu" + cpu_path(pid_on_host(box, SPIN)))
            found = [(bad / file).read_text().strip() for file in ("cpu.shares", "cpu.cfs_quota_us")]
            assert found == ["205", "90000"]
            assert (bad / "p-own" / "cpu.shares").read_text().strip() == "512"
        spinning.signal("KILL")
        wait_until(lambda: not is_bad(box, "sleep 1000; true"), "the way back", 60)
        assert box.limits().cpu_weight == 20
        if V2:
            assert weight_in_force(box) == 20
        else:
            parts = Path(cpu_path(pid_on_host(box, "sleep 2000; true"))).parts
            assert parts[-4:] == ("good", box.handle, "work", "p-own")


def test_who_states_no_shares_is_left_alone(no_trace: None) -> None:
    """It has no entitlement to exceed."""
    with (
        server_with(*FLAGS) as (_, garden),
        garden.create() as plain,
        garden.create(ContainerSpec(limits=Limits(cpu_weight=10))) as box,
    ):
        plain.start(sh(SPIN))
        box.start(sh(SPIN))
        wait_until(lambda: is_bad(box), "throttling")
        assert not is_bad(plain)
        if V2:
            wait_until(
                lambda: weight_in_force(box) < 10 and box.limits().cpu_weight == 10, "a part of its weight"
            )
            assert weight_in_force(plain) == 100


def test_restart_and_destroy(no_trace: None) -> None:
    """The next server finds it throttled, without the flag brings it back, and nothing is left of it either way."""
    with server_with(*FLAGS) as (server, garden):
        box = garden.create(ContainerSpec(limits=Limits(cpu_weight=10)))
        gone = garden.create(ContainerSpec(limits=Limits(cpu_weight=10)))
        for each in (box, gone):
            each.start(sh(SPIN))
            wait_until(lambda each=each: is_bad(each), "throttling")  # type: ignore[misc]
        gone.destroy()
        assert not cgroups_of(gone.handle)
        server.kill()
        server.start()
        assert is_bad(box)
        assert box.limits().cpu_weight == 10
        assert code_of(box, "true") == 0
        assert not garden.check_leaks()
        server.stop()
        server.flags = [flag for flag in server.flags if flag != "--enable-cpu-throttling"]
        server.start()
        assert not is_bad(box)
        assert box.limits().cpu_weight == 10
        assert code_of(box, "true") == 0
        box.destroy()


def test_without_the_flag_nothing_is_different(no_trace: None) -> None:
    """No other place, no twin."""
    with server_with() as (_, garden), garden.create() as box:
        box.start(sh(SPIN))
        assert "throttled" not in cpu_path(pid_on_host(box, SPIN))
        assert not matching(ROOT, "**/garden-throttled-*")
