"""What the journal's rows claim of the host, sorted for the judges. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from garden_py.backend.host.pids import ProcessIdentity


@dataclass(frozen=True, slots=True)
class Mapping:
    """A host port that leads to a container."""

    protocol: str
    host_port: int
    container_port: int


@dataclass(frozen=True, slots=True)
class Holding:
    """What one container's row says it has. Only `handle` is known before anything was leased.

    Attributes:
        uid_slot: -1: none.
        privileged: it has an egress chain on the host, if it has an address.
        in_subnet: its address is in a subnet of its caller's choice, not in the pool.
        address_v6: that goes with its address; empty: it has no IPv6.
    """

    handle: str
    runtime_id: str = ""
    address: str = ""
    mappings: tuple[Mapping, ...] = ()
    uid_slot: int = -1
    privileged: bool = False
    init: ProcessIdentity | None = None
    in_subnet: bool = False
    address_v6: str = ""


class Shared(Enum):
    """What is to be thought of the parts that all containers of a server share: anchor link, table, parent cgroup."""

    REQUIRED = "required"  # a server runs
    ALLOWED = "allowed"  # none runs, but containers do
    ORPHANED = "orphaned"  # neither


@dataclass(slots=True)
class Book:
    """All that is claimed.

    Attributes:
        holdings: everything claimed at any moment of the look; what is in none of them belongs to nobody.
        settled: of complete containers that did not change during the look; what they lack is missing.
    """

    holdings: Iterable[Holding]
    settled: Iterable[Holding]
    shared: Shared
    handles: set[str] = field(init=False)
    runtime_ids: set[str] = field(init=False)
    addresses: set[str] = field(init=False)
    pool_addresses: set[str] = field(init=False)
    mappings: set[tuple[str, Mapping]] = field(init=False)
    ports: set[tuple[str, int]] = field(init=False)
    uid_slots: set[int] = field(init=False)

    def __post_init__(self) -> None:
        held = self.holdings = list(self.holdings)
        self.settled = list(self.settled)
        self.handles = {holding.handle for holding in held}
        self.runtime_ids = {holding.runtime_id for holding in held if holding.runtime_id}
        self.addresses = {each for holding in held for each in (holding.address, holding.address_v6) if each}
        self.pool_addresses = {each.address for each in held if each.address and not each.in_subnet}
        self.mappings = {
            (address, mapping)
            for holding in held
            for mapping in holding.mappings
            for address in (holding.address, holding.address_v6)
        }
        self.ports = {(mapping.protocol, mapping.host_port) for _, mapping in self.mappings}
        self.uid_slots = {holding.uid_slot for holding in held if holding.uid_slot >= 0}
