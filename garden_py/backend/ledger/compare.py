"""All judgements together. Pure: (what is claimed, what was seen) in, differences out."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.backend.ledger import cgroups, files, leases, mounts, network, processes
from garden_py.backend.ledger.book import Book
from garden_py.model.leak import Leak, LeakKind

_ORDER = {kind: index for index, kind in enumerate(LeakKind)}


@dataclass(frozen=True, slots=True)
class Sight:
    """One look at the host."""

    files: files.Sight
    cgroups: cgroups.Sight
    processes: processes.Sight
    network: network.Sight
    mounts: mounts.Sight
    leases: leases.Sight


def compare(book: Book, seen: Sight) -> list[Leak]:
    """Every difference, in the order in which orphans have to be removed: users of a thing before the thing."""
    found = [
        *files.judge(book, seen.files),
        *cgroups.judge(book, seen.cgroups),
        *processes.judge(book, seen.processes),
        *network.judge(book, seen.network),
        *mounts.judge(book, seen.mounts),
        *leases.judge(book, seen.leases),
    ]
    return sorted(found, key=lambda leak: (_ORDER[leak.kind], leak.direction.value, leak.name))
