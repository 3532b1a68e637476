"""Resource limits (getrlimit(2)) of what runs in a container: whose a task is, and their change from outside.

Processes get theirs from the agent when they are started. Later, prlimit(2) changes them: the server calls it for each
process that it finds in the container's cgroups, so nothing in the container has a say in it, the agent included
(docs/decisions/0025-rlimits-of-what-runs.md).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import WORK
from garden_py.backend.host.rlimits import exchange_limit, obstacle_to, read_limits, read_own_limit
from garden_py.backend.host.small_files import lines_of, read_small
from garden_py.backend.linux.container import LinuxContainer
from garden_py.backend.linux.process import LinuxProcess
from garden_py.model.errors import ContainerBroken, LimitRefused, ProcessExited
from garden_py.model.limits import Limits, Rlimits, format_rlimit

FIELD: Final = "limits.rlimits"
# How often the processes are looked through for new ones. Each time those found get their limits, so what the next look
# finds is as many generations younger.
_LOOKS_MAX: Final = 100
# How long to wait, look by look, for processes that could be in the middle of a fork: a quarter of a second altogether.
_PAUSES_S: Final = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
_GONE: Final = (ProcessLookupError, FileNotFoundError)
_Pair = tuple[int, int]


# --- whose is it


@dataclass(frozen=True, slots=True)
class Task:
    """A process in a container.

    Attributes:
        pid: as the host numbers it.
        parent: its parent, likewise.
        inner_pid: as the container numbers it.
        inner_session: its session, likewise; 0 if that is none of the container's.
    """

    pid: int
    parent: int
    inner_pid: int
    inner_session: int


def parse_task(status: str, depth: int) -> Task | None:
    """A task from its /proc/PID/status.

    Args:
        status: the file.
        depth: of the container's pid namespace, counted from ours.

    Returns:
        None: it has just ended.

    Source: proc_pid_status(5); NSpid and NSsid list the numbers from our namespace inwards.
    """
    fields = {name: text.split() for name, _, text in (line.partition(":") for line in lines_of(status))}
    try:
        task = Task(
            int(fields["NSpid"][0]),
            int(fields["PPid"][0]),
            int(fields["NSpid"][depth]),
            int(fields["NSsid"][depth]),
        )
    except (KeyError, IndexError):
        return None
    return (
        task if task.pid and task.inner_pid else None
    )  # 0 is what the kernel calls one that it has just released


def owner_of(
    task: Task, tasks: Mapping[int, Task], running: Mapping[int, str], sessions: Mapping[int, str]
) -> str:
    """The process that a task belongs to: the nearest of its ancestors that is one, else that of its session.

    The agent starts each process as the leader of a session, which tells whose an orphan is, unless that has made a
    session of its own.

    Args:
        task: one of tasks.
        tasks: those of the container, by the host's number.
        running: processes by the container's number.
        sessions: the same, and those that have ended as well.

    Returns:
        Empty: nobody's.
    """
    at: Task | None = task
    for _ in range(len(tasks)):  # a parent that ended and whose number came again must not lead in circles
        if at is None:
            break
        if at.inner_pid in running:
            return running[at.inner_pid]
        at = tasks.get(at.parent)
    return sessions.get(task.inner_session, "")


def _read_task(pid: int, depth: int) -> Task | None:
    try:
        return parse_task(read_small(f"/proc/{pid}/status"), depth)
    except _GONE:
        return None


def _depth_of(container: LinuxContainer) -> int:
    """How many pid namespaces below ours the container's is; ContainerBroken."""
    try:
        status = read_small(f"/proc/{container.facts.pid}/status")
    except _GONE as error:
        raise ContainerBroken(container.handle, "its PID 1 has ended") from error
    return next(len(line.split()) - 2 for line in lines_of(status) if line.startswith("NSpid:"))


def find_owners(container: LinuxContainer) -> dict[int, str]:
    """Each process below a container's limits, as the host numbers it, and the one of ours that it belongs to.

    Those that copy files for a caller are left out: they are the server's.

    Raises:
        ContainerBroken.
    """
    work, depth = container.cgroup.directory("pids", WORK), _depth_of(container)
    owners: dict[int, str] = {}
    for process in container.processes.values():
        if process.own_group and not process.spec.is_beside:
            leaf = container.cgroup.directory("pids", *container.leaf_of(process.spec))
            owners.update(dict.fromkeys(groups.pids_below(leaf), process.id))
    others = (_read_task(pid, depth) for pid in groups.pids_below(work) if pid not in owners)
    tasks = {
        task.pid: task for task in others if task is not None and task.inner_pid not in container.helper_pids
    }
    shared = [process for process in container.processes.values() if not process.own_group]
    running = {process.pid: process.id for process in shared if process.exit is None}
    sessions = {process.pid: process.id for process in shared if process.exit is not None} | running
    owners.update({pid: owner_of(task, tasks, running, sessions) for pid, task in tasks.items()})
    return owners


def _pids_of(container: LinuxContainer, process: LinuxProcess) -> list[int]:
    """A process and its descendants."""
    if process.own_group:
        return groups.pids_below(container.cgroup.directory("pids", *container.leaf_of(process.spec)))
    return [pid for pid, owner in find_owners(container).items() if owner == process.id]


# --- read


def read(container: LinuxContainer, process: LinuxProcess) -> Limits:
    """The soft limits that the kernel has for a process, of those resources that it or its container states.

    Raises:
        ProcessExited, ContainerBroken.
    """
    stated = container.rlimits_for(process.spec)
    if not stated:
        return Limits()
    depth = _depth_of(container)
    for pid in _pids_of(container, process):
        task = _read_task(pid, depth)
        if task is not None and task.inner_pid == process.pid:
            with suppress(*_GONE, KeyError):  # of one that ends just now the kernel tells none
                found = read_limits(pid)
                return Limits(rlimits=tuple((name, found[name][0]) for name, _ in stated))
    raise ProcessExited(process.id)


# --- change


def check(rlimits: Rlimits, open_files_max: int) -> None:
    """Refuse what no process here could be started with.

    Args:
        rlimits: of a container.
        open_files_max: hard limit of open files of PID 1, which can be lower than the server's.

    Raises:
        LimitRefused.
    """
    for name, value in rlimits:
        _, hard = read_own_limit(name)
        hard = min(hard, open_files_max) if name == "nofile" else hard
        if problem := obstacle_to(name, value, hard):
            raise LimitRefused(FIELD, f"{format_rlimit(name, value)} {problem}")


async def change_container(container: LinuxContainer, rlimits: Rlimits) -> Callable[[], None]:
    """Set limits of all processes below the container's limits, but in resources that they were given themselves.

    No process may be in the making (Starts).

    Returns:
        What sets those before again, as far as the kernel lets it.

    Raises:
        LimitRefused, ContainerBroken: nothing has changed.
    """

    def wanted() -> dict[int, Rlimits]:
        own = {process.id: dict(process.spec.rlimits) for process in container.processes.values()}
        return {
            pid: tuple((name, value) for name, value in rlimits if name not in own.get(owner, {}))
            for pid, owner in find_owners(container).items()
        }

    return await _change(wanted)


async def change_process(
    container: LinuxContainer, process: LinuxProcess, rlimits: Rlimits
) -> Callable[[], None]:
    """Set limits of a process and all its descendants; returns and raises as change_container."""
    return await _change(lambda: dict.fromkeys(_pids_of(container, process), rlimits))


async def _change(wanted: Callable[[], Mapping[int, Rlimits]]) -> Callable[[], None]:
    """Set limits of processes, until a look finds none that lacks them and was not there before.

    Whoever is forked from then on has them from its parent (getrlimit(2)). But fork(2) copies them some time before the
    child can be seen; so who was changed is watched until it cannot be in the middle of that, or _PAUSES_S are over.
    """
    former: dict[int, dict[str, _Pair]] = {}
    undo = partial(_put_back, former, wanted)
    pauses, forking = iter(_PAUSES_S), set[int]()
    try:
        for _ in range(_LOOKS_MAX):
            forking = {
                pid for pid in forking if _may_be_forking(pid)
            }  # before the look that finds its children
            found = {pid: limits for pid, limits in wanted().items() if pid not in former}
            before = {
                pid: _look(pid, limits) for pid, limits in found.items()
            }  # first all checks, then changes
            former.update(before)
            for pid, limits in before.items():
                values = dict(found[pid])
                for name in limits:
                    _set(pid, name, (values[name], values[name]))
            changed = {pid for pid, limits in before.items() if limits}
            if not changed:
                pause_s = next(pauses, None)
                if not forking or pause_s is None:
                    return undo
                await asyncio.sleep(pause_s)
            forking |= changed
        raise LimitRefused(FIELD, "the processes fork faster than they can be given limits")
    except BaseException:
        undo()
        raise


def _may_be_forking(pid: int) -> bool:
    """Whether a thread of a process could be in fork(2), in which none sleeps so that a signal could wake it."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except _GONE:
        return False
    return any(_state_of(f"/proc/{pid}/task/{thread}/stat") in "RD" for thread in threads)


def _state_of(stat: str) -> str:
    """R, S, D and so on, proc_pid_stat(5); X of one that has gone."""
    try:
        return read_small(stat).rpartition(")")[2].split()[0]
    except _GONE:
        return "X"


def _look(pid: int, limits: Rlimits) -> dict[str, _Pair]:
    """The limits of a process that are to change, as they are.

    Raises:
        LimitRefused: they cannot be changed.
    """
    found: dict[str, _Pair] = {}
    for name, value in limits:
        try:
            now = exchange_limit(pid, name)
        except ProcessLookupError:
            return {}
        except PermissionError as error:
            problem = (
                "a process of another user runs, and the server has no CAP_SYS_RESOURCE to change its limits"
            )
            raise LimitRefused(FIELD, f"{format_rlimit(name, value)}: {problem}") from error
        if now != (value, value):
            if problem := obstacle_to(name, value, now[1]):
                raise LimitRefused(FIELD, f"{format_rlimit(name, value)} {problem}")
            found[name] = now
    return found


def _set(pid: int, name: str, limit: _Pair) -> None:
    try:
        exchange_limit(pid, name, limit)
    except ProcessLookupError:
        return
    except (PermissionError, ValueError) as error:  # it has lowered its own hard limit since we looked
        raise LimitRefused(
            FIELD, f"{name}={limit[1]}: the kernel refuses it for a process: {error}"
        ) from error


def _put_back(former: Mapping[int, Mapping[str, _Pair]], wanted: Callable[[], Mapping[int, Rlimits]]) -> None:
    """Set former limits of those that are still there: of others, the number may be anybody's by now."""
    with suppress(ContainerBroken):
        for pid in wanted().keys() & former.keys():
            for name, limit in former[pid].items():
                with suppress(LimitRefused):  # a hard limit that was lowered stays, without CAP_SYS_RESOURCE
                    _set(pid, name, limit)
