"""What the ledger finds when it compares the journal with the host."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class LeakKind(Enum):
    """Of what resource; in the order in which they have to be removed. Values are metric labels."""

    PROCESS = "process"
    CGROUP = "cgroup"
    LINK = "link"
    NFT_ELEMENT = "nft_element"
    NFT_CHAIN = "nft_chain"
    MOUNT = "mount"
    RUNTIME = "runtime"
    SOCKET = "socket"
    DIRECTORY = "directory"
    ADDRESS = "address"
    PORT = "port"
    UID_RANGE = "uid_range"


class Direction(Enum):
    """On which side it is lacking."""

    ORPHAN = "orphan"  # the host has it, no row of the journal claims it
    MISSING = "missing"  # a row claims it, the host does not have it


@dataclass(frozen=True, slots=True)
class Leak:
    """One difference between journal and host.

    Attributes:
        name: of the resource, as the tools of the host show it: a path, a link's name, a pid.
        handle: of the container it belongs or belonged to, as far as that can be told.
        detail: a fact that helps people, e.g. how many processes are in a cgroup.
        keep_because: why the server must not remove it; empty: it is surely its own and orphaned.
    """

    kind: LeakKind
    direction: Direction
    name: str
    handle: str = ""
    detail: str = ""
    keep_because: str = ""

    @property
    def key(self) -> tuple[LeakKind, Direction, str]:
        """What tells one leak from another, whatever changes about it."""
        return self.kind, self.direction, self.name


@dataclass(frozen=True, slots=True)
class LeakReport:
    """A leak, and what was done about it; `kept_because` is empty if it was removed, or if nobody asked to."""

    leak: Leak
    removed: bool = False
    kept_because: str = ""
