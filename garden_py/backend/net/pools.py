"""Which addresses and host ports are free. Pure bookkeeping: the journal persists it, this decides."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, collapse_addresses

from garden_py.model.errors import InvalidField, PoolExhausted, PortInUse, SubnetFull
from garden_py.model.network import SubnetChoice

SMALLEST_PREFIX_LENGTH = 29
MAX_PORT = 65535


class AddressPool:
    """The addresses of `--network-pool`: the first host address is the gateway, the others are handed out.

    The lowest free address goes first, so addresses in logs stay short and a test knows what it gets. A
    released address may be given out at once: the link that had it is gone before it is released.

    Attributes:
        network: the pool as configured.
        gateway: first host address; every container's way out, an address of the host.
        size: how many containers fit, without addresses that are avoided.

    Raises:
        InvalidField: the network is smaller than a /29 (field `network_pool`).
    """

    def __init__(self, network: IPv4Network) -> None:
        if network.prefixlen > SMALLEST_PREFIX_LENGTH:
            raise InvalidField(
                "network_pool", f"{network} is too small; use a /{SMALLEST_PREFIX_LENGTH} or larger"
            )
        self.network = network
        self.gateway = network[1]
        self.size = network.num_addresses - 3  # without network address, gateway and broadcast address
        self._avoided: list[IPv4Network] = []
        self._taken: set[IPv4Address] = set()
        self._released: list[IPv4Address] = []
        self._next_offset = 2  # everything from here on has never been allocated, unless reserved

    def avoid(self, networks: Iterable[IPv4Network]) -> None:
        """Give out no address of these any more: others have them on the host. Who has one keeps it."""
        self._avoided = [each for each in collapse_addresses(networks) if each.overlaps(self.network)]
        first, last = int(self.network[2]), int(self.network[-2])
        for each in self._avoided:
            lost = min(last, int(each[-1])) - max(first, int(each[0])) + 1
            self.size -= max(lost, 0)

    def allocate(self) -> IPv4Address:
        """Take the lowest free address.

        Raises:
            PoolExhausted: none is free.
        """
        while (address := self._lowest_candidate()) is not None:
            foreign = next((each for each in self._avoided if address in each), None)
            if foreign is not None:
                after = int(foreign[-1]) + 1 - int(self.network[0])
                self._next_offset = min(max(self._next_offset, after), self.network.num_addresses - 1)
            elif address not in self._taken:
                self._taken.add(address)
                return address
        raise PoolExhausted("addresses", self.size, "--network-pool")

    def _lowest_candidate(self) -> IPv4Address | None:
        """Remove and return the lowest address that may be free; None if there is none left."""
        has_fresh = self._next_offset < self.network.num_addresses - 1
        fresh = self.network[self._next_offset]
        if self._released and (not has_fresh or self._released[0] < fresh):
            return heapq.heappop(self._released)
        if not has_fresh:
            return None
        self._next_offset += 1
        return fresh

    def reserve(self, address: IPv4Address) -> None:
        """Take this very address: asked for by a caller, or held by a container found after a restart.

        Raises:
            InvalidField: outside the pool, not a container's address, or taken (field `network`).
        """
        if address not in self.network:
            raise InvalidField("network", f"{address} is not in the server's network pool {self.network}")
        if address in (self.network[0], self.gateway, self.network[-1]):
            raise InvalidField(
                "network", f"{address} is the network, gateway or broadcast address of {self.network}"
            )
        if address in self._taken:
            raise InvalidField("network", f"{address} is in use by another container")
        self._taken.add(address)

    def release(self, address: IPv4Address) -> None:
        """Give an address back; twice, or one that was never taken, is fine."""
        if address in self._taken:
            self._taken.discard(address)
            heapq.heappush(self._released, address)

    @property
    def taken(self) -> frozenset[IPv4Address]:
        """The addresses that are taken, now."""
        return frozenset(self._taken)

    @property
    def in_use(self) -> int:
        """How many addresses are taken."""
        return len(self._taken)


class Subnets:
    """The subnets that callers have chosen, and who has which address in them.

    A subnet is there as long as a container is in it. Its second address is nobody's: clients of the Garden protocol
    take it for the gateway.

    Args:
        pool: the server's own, which no subnet may overlap.

    Source: Garden behaviour, statements N2 to N4.
    """

    def __init__(self, pool: IPv4Network) -> None:
        self._pool = pool
        self._members: dict[IPv4Network, set[IPv4Address]] = {}

    def lease(self, wanted: SubnetChoice) -> IPv4Address:
        """Take the wanted address, or the lowest free one of the wanted subnet.

        Raises:
            InvalidField: it overlaps something, or is taken (field `subnet`).
            SubnetFull: there is none left.
        """
        if wanted.network.overlaps(self._pool):
            raise InvalidField(
                "subnet",
                f"the requested subnet ({wanted.network}) overlaps the dynamic allocation range ({self._pool})",
            )
        for other in self._members:
            if other != wanted.network and other.overlaps(wanted.network):
                raise InvalidField(
                    "subnet",
                    f"the requested subnet ({wanted.network}) overlaps an existing subnet ({other})",
                )
        taken = self._members.get(wanted.network, set())
        address = wanted.address
        if address is None:
            address = next((each for each in _assignable(wanted.network) if each not in taken), None)
            if address is None:
                raise SubnetFull(str(wanted.network), len(taken))
        if address in taken:
            raise InvalidField("subnet", "the requested IP is already allocated")
        self._members.setdefault(wanted.network, set()).add(address)
        return address

    def release(self, network: IPv4Network, address: IPv4Address) -> None:
        """Give an address back; twice is fine. The last one takes the subnet with it."""
        members = self._members.get(network, set())
        members.discard(address)
        if not members:
            self._members.pop(network, None)

    def others(self, network: IPv4Network, known: set[IPv4Address]) -> int:
        """How many addresses of a subnet are taken besides those known."""
        return len(self._members.get(network, set()) - known)

    @property
    def networks(self) -> tuple[IPv4Network, ...]:
        """Those that somebody is in, sorted."""
        return tuple(sorted(self._members))

    @property
    def taken(self) -> frozenset[IPv4Address]:
        """All addresses that are taken, now."""
        return frozenset(address for members in self._members.values() for address in members)


def _assignable(network: IPv4Network) -> Iterator[IPv4Address]:
    return (network[number] for number in range(2, network.num_addresses - 1))


class PortPool:
    """Host ports for mappings that ask for "any": round-robin, so a freed port is not reused at once.

    A client that still talks to the old container's port should find it closed, not find a stranger. Ports
    outside the range may be reserved too: callers choose those themselves.

    Args:
        start: first port.
        size: number of ports.
        next_offset: of the port to give out first, from `start`; kept by whoever wants no reuse after a restart.

    Raises:
        InvalidField: the range leaves 1..65535 or is empty (field `port_pool_size`).
    """

    def __init__(self, start: int, size: int, next_offset: int = 0) -> None:
        if start < 1 or size < 1 or start + size - 1 > MAX_PORT:
            raise InvalidField(
                "port_pool_size", f"ports {start}..{start + size - 1} are not within 1..{MAX_PORT}"
            )
        self.start = start
        self.size = size
        self.next_offset = next_offset % size
        self._taken: set[int] = set()

    def allocate(self, is_somebodys: Callable[[int], bool] = lambda _: False) -> int:
        """Take the next free port after the one given out last.

        Args:
            is_somebodys: tells of a port that nobody has from here whether it is free all the same.

        Raises:
            PoolExhausted: none is free.
        """
        for step in range(self.size):
            offset = (self.next_offset + step) % self.size
            if self.start + offset not in self._taken and not is_somebodys(self.start + offset):
                self.next_offset = (offset + 1) % self.size
                self._taken.add(self.start + offset)
                return self.start + offset
        raise PoolExhausted("ports", self.size, "--port-pool-size")

    def reserve(self, port: int) -> None:
        """Take this very port, inside the range or not.

        Raises:
            InvalidField: not within 1..65535 (field `host_port`).
            PortInUse: mapped already.
        """
        if not 1 <= port <= MAX_PORT:
            raise InvalidField("host_port", f"port {port} is not within 1..{MAX_PORT}")
        if port in self._taken:
            raise PortInUse(port)
        self._taken.add(port)

    def release(self, port: int) -> None:
        """Give a port back; twice, or one that was never taken, is fine."""
        self._taken.discard(port)

    @property
    def taken(self) -> frozenset[int]:
        """The ports that are taken, now."""
        return frozenset(self._taken)

    @property
    def in_use(self) -> int:
        """How many ports are taken, chosen ones included."""
        return len(self._taken)
