"""Whose a task is, what the kernel says of its limits, and their change all or none, on processes of the test's own."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kit.rights import may_raise_limits

from garden_py.backend.cgroup.groups import pids_below
from garden_py.backend.host import rlimits as host
from garden_py.backend.linux import resource_limits
from garden_py.backend.linux.resource_limits import Task, owner_of, parse_task
from garden_py.backend.linux.starts import Starts
from garden_py.model.errors import LimitRefused
from garden_py.model.limits import RLIM_INFINITY, RLIMIT_NAMES, Rlimits

_FEW: Rlimits = (("nofile", 64),)
BUSY = ("sh", "-c", "while :; do :; done")


def run(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv)


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    children = [run("sleep", "1000") for _ in range(3)]
    yield [child.pid for child in children]
    for child in children:
        child.kill()
        child.wait()


# --- the kernel's view


def test_limits_file_names_every_resource() -> None:
    """As the kernel tells them by the other way."""
    found = host.read_limits(os.getpid())
    assert found.keys() == RLIMIT_NAMES
    assert found == {name: host.read_own_limit(name) for name in RLIMIT_NAMES}


def test_limits_file_is_read_by_columns() -> None:
    """Titles have spaces, and the last two resources no unit."""
    text = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max open files            1024                 1048576              files     \n"
        "Max core file size        0                    unlimited            bytes     \n"
        "Max nice priority         0                    40                   \n"
        "Max something new         1                    1                    \n"
    )
    assert host.parse_limits(text) == {"nofile": (1024, 1048576), "core": (0, RLIM_INFINITY), "nice": (0, 40)}


def test_obstacles() -> None:
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    assert host.obstacle_to("core", 5, 5) == ""
    assert "fs.nr_open" in host.obstacle_to("nofile", most + 1, RLIM_INFINITY)
    assert bool(host.obstacle_to("core", 6, 5)) is not may_raise_limits()


# --- whose it is

STATUS = """\
Name:\tsh: NSpid
PPid:\t90
NSpid:\t100\t7\t1
NSpgid:\t100\t7\t1
NSsid:\t100\t5\t1
"""


def test_task_is_numbered_as_its_container_does() -> None:
    """Also one that has gone into a pid namespace of its own."""
    assert parse_task(STATUS, 1) == Task(100, 90, 7, 5)


def test_task_that_has_just_ended_is_none() -> None:
    """The kernel leaves its numbers out."""
    assert parse_task("Name:\tsh\nPPid:\t0\n", 1) is None
    assert parse_task("PPid:\t0\nNSpid:\t100\nNSsid:\t0\n", 1) is None


def test_task_that_the_kernel_has_released_is_none() -> None:
    """It is called 0, and limits of process 0 are the server's own."""
    assert parse_task("PPid:\t0\nNSpid:\t0\t0\nNSsid:\t0\t0\n", 1) is None
    before = resource.getrlimit(resource.RLIMIT_CORE)
    with pytest.raises(ProcessLookupError):
        host.exchange_limit(0, "core", (0, 0))
    assert resource.getrlimit(resource.RLIMIT_CORE) == before


def test_no_process_of_a_group_is_0(tmp_path: Path) -> None:
    """That would be the server itself, also for kill(2)."""
    (tmp_path / "cgroup.procs").write_text("0\n12\n0\n")
    assert pids_below(tmp_path) == [12]


TASKS = {
    task.pid: task
    for task in (
        Task(100, 1, 10, 10),  # process a
        Task(101, 100, 11, 10),  # its child
        Task(102, 101, 12, 12),  # whose child has a session of its own
        Task(200, 1, 20, 20),  # process b
        Task(201, 1, 21, 20),  # its orphan
        Task(202, 1, 22, 30),  # an orphan of c, which has ended
        Task(203, 1, 23, 23),  # an orphan that has a session of its own
        Task(300, 301, 31, 0),  # a circle: their parents have ended, and these have their numbers
        Task(301, 300, 32, 0),
    )
}


@pytest.mark.parametrize(
    ("pid", "owner"),
    [(100, "a"), (101, "a"), (102, "a"), (200, "b"), (201, "b"), (202, "c"), (203, ""), (300, "")],
)
def test_task_belongs_to_an_ancestor_or_its_session(pid: int, owner: str) -> None:
    running = {10: "a", 20: "b"}
    assert owner_of(TASKS[pid], TASKS, running, {30: "c", **running}) == owner


# --- change


async def wait_for_sleep(pids: list[int]) -> None:
    while any(resource_limits._may_be_forking(pid) for pid in pids):  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.001)


def test_who_runs_may_be_forking_and_who_sleeps_is_not() -> None:
    with run(*BUSY) as busy:
        assert resource_limits._may_be_forking(busy.pid)
        busy.kill()
        busy.wait()
        assert not resource_limits._may_be_forking(busy.pid)


async def test_busy_ones_are_not_waited_for_for_ever() -> None:
    with run(*BUSY) as busy:
        try:
            await resource_limits._change(lambda: {busy.pid: _FEW})
            assert resource.prlimit(busy.pid, resource.RLIMIT_NOFILE) == (64, 64)
        finally:
            busy.kill()


async def test_change_can_be_taken_back(sleepers: list[int]) -> None:
    before = resource.prlimit(sleepers[0], resource.RLIMIT_CORE)
    limits: Rlimits = (("core", before[1] if before[1] >= 0 else RLIM_INFINITY), ("locks", RLIM_INFINITY))
    undo = await resource_limits._change(lambda: dict.fromkeys(sleepers, limits))
    assert {resource.prlimit(pid, resource.RLIMIT_CORE) for pid in sleepers} == {(before[1], before[1])}
    undo()
    assert {resource.prlimit(pid, resource.RLIMIT_CORE) for pid in sleepers} == {before}


async def test_all_are_looked_at_before_any_is_changed(sleepers: list[int]) -> None:
    """One that cannot have it keeps the others from it, as a hard limit that was lowered may not go up again."""
    before = [host.read_limits(pid) for pid in sleepers]
    wanted: dict[int, Rlimits] = dict.fromkeys(sleepers, _FEW)
    wanted[sleepers[-1]] = (*_FEW, ("nofile", RLIM_INFINITY - 1))
    with pytest.raises(LimitRefused) as refused:
        await resource_limits._change(lambda: wanted)
    assert refused.value.field == "limits.rlimits"
    assert [host.read_limits(pid) for pid in sleepers] == before


async def test_those_that_appear_meanwhile_are_changed_too(sleepers: list[int]) -> None:
    """A look may find whom another forked before it had its new limits; it ends when one finds nobody new."""
    looks = [sleepers[:1], sleepers[:2], sleepers]

    def wanted() -> dict[int, Rlimits]:
        return dict.fromkeys(looks.pop(0) if looks else sleepers, _FEW)

    await resource_limits._change(wanted)
    assert looks == []
    assert {resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in sleepers} == {(64, 64)}


async def test_those_that_inherited_need_no_further_look(sleepers: list[int]) -> None:
    await wait_for_sleep(sleepers)
    for pid in sleepers[1:]:
        host.exchange_limit(pid, "nofile", (64, 64))
    seen: list[dict[int, Rlimits]] = []

    def wanted() -> dict[int, Rlimits]:
        seen.append(dict.fromkeys(sleepers, _FEW))
        return seen[-1]

    await resource_limits._change(wanted)
    assert len(seen) == 2


async def test_looking_comes_to_an_end() -> None:
    """When whoever forks is faster: all is taken back, and the caller is told."""
    children: list[subprocess.Popen[bytes]] = []

    def one_more() -> dict[int, Rlimits]:
        children.append(run("sleep", "1000"))
        return {child.pid: _FEW for child in children}

    try:
        with pytest.raises(LimitRefused, match="faster"):
            await resource_limits._change(one_more)
    finally:
        for child in children:
            child.kill()
            child.wait()


async def test_those_that_end_meanwhile_are_no_obstacle(sleepers: list[int]) -> None:
    child = run("true")
    child.wait()
    with suppress(ProcessLookupError):
        os.kill(child.pid, 0)
        pytest.skip("somebody has its number already")
    await resource_limits._change(lambda: {child.pid: _FEW, sleepers[0]: _FEW})
    assert resource.prlimit(sleepers[0], resource.RLIMIT_NOFILE) == (64, 64)


# --- starts


async def test_change_waits_for_starts_under_way_and_holds_off_others() -> None:
    """In the order in which they come; a start that fails counts as done."""
    starts, order, go, both = Starts(), list[str](), asyncio.Event(), asyncio.Event()

    async def start(name: str) -> None:
        async with starts.begin():
            order.append(f"{name} begins")
            if name == "b":
                both.set()
            await go.wait()
            order.append(f"{name} ends")
            raise RuntimeError

    async def change() -> None:
        async with starts.hold_off():
            order.append("change begins")
            await asyncio.sleep(0)
            order.append("change ends")

    works = [start("a"), start("b"), change(), start("c")]
    tasks = [asyncio.ensure_future(work) for work in works]
    await both.wait()
    go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [
        *("a begins", "b begins", "a ends", "b ends"),
        *("change begins", "change ends", "c begins", "c ends"),
    ]
