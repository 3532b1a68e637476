"""Cgroups of a server's containers in every hierarchy, and the processes in those that belong to nobody."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import (
    BAD,
    GOOD,
    ContainerCgroup,
    Hierarchies,
    parent_of,
    remove_tree,
    throttled_parent_of,
)
from garden_py.backend.cgroup.scope import HOLDER
from garden_py.backend.host.pids import read_wait_channel
from garden_py.backend.host.small_files import lines_of, read_small
from garden_py.backend.ledger.book import Book, Shared
from garden_py.model.errors import HostFault
from garden_py.model.handle import name_problem
from garden_py.model.leak import Direction, Leak, LeakKind

_RETRY_S = 0.01
REMOVE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where containers are, relative to each hierarchy's mount point (cgroup/layout.py).

    Attributes:
        tag: of the server.
        parent: where new ones go, by the driver in use: one of the following two.
        scope: of systemd (cgroup/scope.py).
    """

    tag: str
    parent: str
    scope: str

    @property
    def groups(self) -> tuple[str, ...]:
        """What containers' own groups are directly in."""
        throttled = throttled_parent_of(self.tag)
        return parent_of(self.tag), f"{throttled}/{GOOD}", f"{throttled}/{BAD}", self.scope

    @property
    def tops(self) -> dict[str, tuple[str, ...]]:
        """What all containers of a driver share, by the name that it has as a leak."""
        return {
            parent_of(self.tag): (parent_of(self.tag), throttled_parent_of(self.tag)),
            self.scope: (self.scope,),
        }


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen. Paths are relative to each hierarchy's mount point; their last part is a handle.

    Attributes:
        parent: what new containers go into.
        parents: hierarchies that have it, or what stands beside it for containers that can be throttled.
        required: hierarchies that a container must be in.
        groups: of containers: path to the hierarchies that have it.
        pids: of those that were not claimed when the look began, by path.
        others: what containers of the other driver go into, if it is there.
    """

    parent: str
    required: frozenset[Path]
    parents: frozenset[Path] = frozenset()
    groups: dict[str, set[Path]] = field(default_factory=dict)
    pids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()


def look(hierarchies: Hierarchies, places: Places, handles: set[str]) -> Sight:
    """Read the directories. `handles`: claimed when the look began."""
    points = groups.all_hierarchies(hierarchies)
    having = {
        name: frozenset(point for point in points if any((point / top).is_dir() for top in tops))
        for name, tops in places.tops.items()
    }
    parents = having.pop(places.parent)
    seen = Sight(
        places.parent,
        frozenset(hierarchies.distinct()),
        parents,
        others=tuple(name for name, found in having.items() if found),
    )
    for point in parents.union(*having.values()):
        for place in places.groups:
            for name in _directories(point / place):
                seen.groups.setdefault(f"{place}/{name}", set()).add(point)
    for path in seen.groups:
        if _handle_of(path) not in handles:
            seen.pids[path] = tuple(_pids(hierarchies, path))
    return seen


def _handle_of(path: str) -> str:
    return path.rpartition("/")[2]


def _directories(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            return [name for name in names if name != HOLDER]
    except FileNotFoundError:
        return []


def _pids(hierarchies: Hierarchies, path: str) -> list[int]:
    found = (groups.pids_below(point / path) for point in groups.all_hierarchies(hierarchies))
    return sorted({pid for pids in found for pid in pids})


def judge(book: Book, seen: Sight) -> list[Leak]:
    """Groups and processes that no row claims, and groups that a row lacks."""
    found: list[Leak] = []
    present: dict[str, set[Path]] = {}
    for path, points in seen.groups.items():
        if not path.endswith(f"/{BAD}/{_handle_of(path)}"):
            present.setdefault(_handle_of(path), set()).update(points)
    told: set[int] = set()
    for path in sorted(path for path in seen.groups if _handle_of(path) not in book.handles):
        name = _handle_of(path)
        keep = "no container can have this name" if name_problem(name) else ""
        pids = [pid for pid in seen.pids.get(path, ()) if pid not in told]
        told.update(pids)
        detail = f"{len(pids)} processes" if pids else ""
        found.append(Leak(LeakKind.CGROUP, Direction.ORPHAN, path, name, detail, keep))
        found += [
            Leak(LeakKind.PROCESS, Direction.ORPHAN, str(pid), name, f"in cgroup {path}", keep)
            for pid in pids
        ]
    for holding in book.settled:
        if lacking := seen.required - present.get(holding.handle, set()):
            names = ", ".join(sorted(str(point) for point in lacking))
            path = f"{seen.parent}/{holding.handle}"
            found.append(Leak(LeakKind.CGROUP, Direction.MISSING, path, holding.handle, f"in {names}"))
    return found + _judge_parent(book, seen)


def _judge_parent(book: Book, seen: Sight) -> list[Leak]:
    if book.shared is Shared.ORPHANED:
        names = ((seen.parent,) if seen.parents else ()) + seen.others
        detail = "shared by all containers"
        return [Leak(LeakKind.CGROUP, Direction.ORPHAN, name, detail=detail) for name in names]
    if book.shared is Shared.REQUIRED and (lacking := seen.required - seen.parents):
        where = ", ".join(sorted(str(point) for point in lacking))
        return [Leak(LeakKind.CGROUP, Direction.MISSING, seen.parent, detail=f"in {where}")]
    return []


def holds_process(places: Places, name: str, pid: int) -> bool:
    """Whether a process is in the group of that name, in any hierarchy. proc_pid_cgroup(5)."""
    try:
        lines = lines_of(read_small(f"/proc/{pid}/cgroup"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    paths = tuple(f"/{place}/{name}/" for place in places.groups)
    return any(f"{line.split(':', 2)[2]}/".startswith(paths) for line in lines)


async def remove(cgroup: ContainerCgroup) -> None:
    """Kill what is in a container's groups and remove them, in every hierarchy; gone is fine.

    Raises:
        HostFault: something does not end, or a group stays busy.
    """
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while True:
        pids = _pids(cgroup.hierarchies, cgroup.path)
        for pid in pids:
            _kill(pid)
        try:
            for point in groups.all_hierarchies(cgroup.hierarchies):
                remove_tree(point / cgroup.path)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                cause = f"process {pids[0]}: {read_wait_channel(pids[0])}" if pids else "it stays busy"
                raise HostFault("remove cgroup", f"{cgroup.path}: {cause}") from error
        await asyncio.sleep(_RETRY_S)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
