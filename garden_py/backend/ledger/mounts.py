"""Mounts: root file systems that a launcher still holds, and mounts on the host where the server makes none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from garden_py.backend.host.small_files import lines_of, read_mountinfo, unescape
from garden_py.backend.ledger.book import Book, Shared
from garden_py.backend.ledger.files import book_id
from garden_py.model.leak import Direction, Leak, LeakKind

_ELSEWHERE = "the server makes no mounts there, so somebody else made this one; it may keep a directory busy"


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen.

    Attributes:
        staged: runtime ids below the launcher's mount directory.
        host: mount points of the host below directories that are the server's alone.
        store: where the server's own file system is mounted; empty: nowhere.
    """

    staged: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()
    store: str = ""


def parse_mount_points(mountinfo: str, below: Iterable[Path]) -> frozenset[str]:
    """Mount points strictly below some directories.

    Source: proc_pid_mountinfo(5): the fifth field.
    """
    parents = tuple(f"{directory}/" for directory in below)
    points = (unescape(line.split(" ")[4]) for line in lines_of(mountinfo))
    return frozenset(point for point in points if point.startswith(parents))


def look(staged: Iterable[str], below: Iterable[Path], store: Path | None) -> Sight:
    """Read the host's mount table; `staged` is what the launcher said, `store` where one would be mounted."""
    host = parse_mount_points(read_mountinfo(), below)
    return Sight(frozenset(staged), host, str(store) if store is not None and store.is_mount() else "")


def judge(book: Book, seen: Sight) -> list[Leak]:
    """Mounts of nobody, and those of complete containers: these have their own copy by then."""
    complete = {holding.runtime_id: holding.handle for holding in book.settled}
    found = [
        Leak(
            LeakKind.MOUNT,
            Direction.ORPHAN,
            f"launcher:{name}",
            detail="a root file system that the launcher holds"
            + (f" though container {complete[name]} has its own" if name in complete else ""),
        )
        for name in seen.staged
        if book_id(name) not in book.runtime_ids or name in complete
    ]
    found += [Leak(LeakKind.MOUNT, Direction.ORPHAN, point, keep_because=_ELSEWHERE) for point in seen.host]
    if seen.store and book.shared is Shared.ORPHANED:
        detail = "the store's file system, though no server runs and no container is left"
        found.append(Leak(LeakKind.MOUNT, Direction.ORPHAN, seen.store, detail=detail))
    return found
