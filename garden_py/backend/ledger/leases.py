"""Addresses, ports and uid ranges that a running server has given out to nobody."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.backend.ledger.book import Book
from garden_py.model.leak import Direction, Leak, LeakKind


@dataclass(frozen=True, slots=True)
class Sight:
    """What the pools say is taken. `ports` are (protocol, host port)."""

    addresses: frozenset[str] = frozenset()
    ports: frozenset[tuple[str, int]] = frozenset()
    uid_slots: frozenset[int] = frozenset()


def judge(book: Book, seen: Sight) -> list[Leak]:
    """What is taken and claimed by no row. A row without its lease is broken and says so itself."""
    found = [Leak(LeakKind.ADDRESS, Direction.ORPHAN, address) for address in seen.addresses - book.addresses]
    found += [
        Leak(LeakKind.PORT, Direction.ORPHAN, f"{protocol} {port}")
        for protocol, port in seen.ports - book.ports
    ]
    found += [
        Leak(LeakKind.UID_RANGE, Direction.ORPHAN, str(slot)) for slot in seen.uid_slots - book.uid_slots
    ]
    return found
