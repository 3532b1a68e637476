"""Fail points: steps of create and destroy at which a tester can have the server fail once (docs/debugging.md).

Without `--fail-points`, reaching one costs a look into an empty dict. Which steps there are is this module's `Point`;
tests/root/test_fail_points.py runs every one of them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from garden_py.model.errors import HostFault


class Point(StrEnum):
    """A step that has just been done, and whose effect must be found and undone."""

    CREATE_JOURNAL = "create.journal"  # the row says `creating`
    CREATE_LEASE = "create.lease"  # address, ports and uid range are recorded
    CREATE_DIRECTORY = "create.directory"  # made and filled
    CREATE_LISTEN = "create.listen"  # the agent's socket is bound
    CREATE_MOUNT = "create.mount"  # the root file system is mounted in the launcher (worker)
    CREATE_RUN = "create.run"  # PID 1 runs, nobody knows its pid (worker)
    CREATE_PID = "create.pid"  # its pid is recorded
    CREATE_LIMIT = "create.limit"  # cgroups are furnished
    CREATE_GREET = "create.greet"  # the agent has answered
    CREATE_CONNECT = "create.connect"  # network and policy are in force
    CREATE_DONE = "create.done"  # all is made, the row still says `creating`
    LIMITS_CHANGE = "limits.change"  # limits are in force, the journal has the former ones
    DESTROY_JOURNAL = "destroy.journal"  # the row says `destroying`
    DESTROY_KILL = "destroy.kill"  # no process is left
    DESTROY_DETACH = "destroy.detach"  # link and host rules are gone
    DESTROY_CGROUP = "destroy.cgroup"  # cgroups are gone
    DESTROY_RUNTIME = "destroy.runtime"  # the runtime's record is gone
    DESTROY_DIRECTORY = "destroy.directory"  # directory and socket are gone
    DESTROY_RELEASE = "destroy.release"  # leases are given back, the row is still there


class Action(StrEnum):
    """What happens at a point, once."""

    ERROR = "error"  # HostFault
    KILL_SERVER = "kill-server"  # SIGKILL
    KILL_LAUNCHER = "kill-launcher"  # SIGKILL to it, not to its workers


_armed: dict[Point, Action] = {}


def parse_fail_point(text: str) -> tuple[Point, Action]:
    """`POINT:ACTION`.

    Raises:
        ValueError: no such point or action; the message lists those there are.
    """
    name, _, action = text.partition(":")
    if name not in set(Point) or action not in set(Action):
        raise ValueError(
            f"{text!r} is not POINT:ACTION; points: {', '.join(Point)}; actions: {', '.join(Action)}"
        )
    return Point(name), Action(action)


def arm(wanted: Iterable[str]) -> None:
    """Have these points fire once each, `POINT:ACTION` as in `parse_fail_point`."""
    _armed.clear()
    _armed.update(map(parse_fail_point, wanted))


def reach(point: Point) -> None:
    """Called by the server when the step is done.

    Raises:
        HostFault: the tester wants an error here.
    """
    if _armed and (action := _armed.pop(point, None)) is not None:
        fire(point, action, server=os.getpid(), launchers=children_of(os.getpid()))


def hand_over(*points: Point) -> dict[str, str]:
    """What a launcher's worker shall do at these points of the job it is given; they count as fired."""
    return {str(point): str(_armed.pop(point)) for point in points if point in _armed} if _armed else {}


def reach_in_worker(point: Point, handed_over: dict[str, str]) -> None:
    """Called by a worker when the step is done; as `reach`."""
    if point in handed_over:
        launcher = os.getppid()
        server = parent_of(launcher)
        fire(point, Action(handed_over[point]), server=server, launchers=[launcher])


def fire(point: Point, action: Action, *, server: int, launchers: list[int]) -> None:
    """Do it."""
    print(f"fail point {point}: {action}", file=sys.stderr, flush=True)  # a worker has no structured log
    match action:
        case Action.ERROR:
            raise HostFault(str(point), "fail point")
        case Action.KILL_SERVER:
            os.kill(server, signal.SIGKILL)
        case Action.KILL_LAUNCHER:
            for pid in launchers:
                os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """A process's children: the server's only one is its launcher. proc_pid_task_children(5), for every thread."""
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def parent_of(pid: int) -> int:
    """A process's parent. proc_pid_stat(5), field 4."""
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
