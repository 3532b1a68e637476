"""Launchers whose server is gone, and containers' first processes that are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from garden_py.backend.host.pids import ProcessIdentity, read_session, read_start_time
from garden_py.backend.launcher import MODULE
from garden_py.backend.ledger.book import Book, Holding
from garden_py.model.leak import Direction, Leak, LeakKind


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen.

    Attributes:
        strangers: pids of launchers, workers included, that work on the server's directories but are not its own.
        ended: handles of claimed containers whose PID 1 is gone.
    """

    strangers: frozenset[int] = frozenset()
    ended: frozenset[str] = field(default_factory=frozenset)


def look(places: Sequence[Path], sessions: AbstractSet[int], holdings: Iterable[Holding]) -> Sight:
    """Read /proc.

    Args:
        places: of the server's; its launchers have one of them in their command line.
        sessions: session ids of the server's own launchers.
        holdings: claimed when the look began.
    """
    return Sight(
        frozenset(pid for pid in _launchers(places) if read_session(pid) not in sessions),
        frozenset(each.handle for each in holdings if each.init is not None and _has_ended(each.init)),
    )


def _has_ended(identity: ProcessIdentity) -> bool:
    return read_start_time(identity.pid) != identity.start


def _launchers(places: Sequence[Path]) -> list[int]:
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if is_launcher(pid, places)]


def is_launcher(pid: int, places: Sequence[Path]) -> bool:
    """Whether a process is a launcher, or a worker forked from one, of the server with these places."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return MODULE.encode() in words and any(os.fsencode(place) in words for place in places)


def judge(book: Book, seen: Sight) -> list[Leak]:
    """Launchers without a server, and running containers without PID 1."""
    found = [
        Leak(LeakKind.PROCESS, Direction.ORPHAN, str(pid), detail="a launcher whose server is gone")
        for pid in seen.strangers
    ]
    found += [
        Leak(LeakKind.PROCESS, Direction.MISSING, str(holding.init.pid), holding.handle, "PID 1")
        for holding in book.settled
        if holding.init is not None and holding.handle in seen.ended
    ]
    return found
