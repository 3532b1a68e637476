"""What would become of a container's connection, as the rules of its namespace and the host's have it. Pure.

`net/firewall.py` and `net/host_firewall.py` tell the kernel the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.net.firewall import DNS_PORT
from garden_py.backend.net.host_firewall import Reach
from garden_py.backend.net.plan import HostPlan
from garden_py.model.netrule import (
    AddressRange,
    Cause,
    Decision,
    Destination,
    EgressPolicy,
    RuleAction,
    decide,
)

_ECHO_REQUESTS = {4: 8, 6: 128}  # type by version of IP: RFC 792, RFC 4443


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What besides its own policy decides.

    Attributes:
        host: the server's plan.
        denied: networks that the server denies to what no rule allows.
        dns_servers: that may be asked even at the host's addresses.
        host_access: whether the host's addresses may be connected to.
        reach: which other containers may be.
        host_addresses: all that the host has.
        subnets: that callers have chosen.
        containers: addresses that containers have.
        mapped_ports: (version of IP, protocol, port) of the host that lead to containers.
    """

    host: HostPlan
    denied: tuple[AddressRange, ...]
    dns_servers: tuple[IPv4Address | IPv6Address, ...]
    host_access: bool
    reach: Reach
    host_addresses: set[IPv4Address | IPv6Address]
    subnets: tuple[IPv4Network, ...]
    containers: frozenset[IPv4Address | IPv6Address]
    mapped_ports: set[tuple[int, str, int]]


def explain(
    around: Surroundings, lease: NetworkLease, policy: EgressPolicy, destination: Destination
) -> Decision:
    """What would become of a new connection.

    Args:
        around: what holds for all containers.
        lease: of the container.
        policy: likewise.
        destination: of the connection, as the container names it.
    """
    address = destination.address
    if address.is_loopback or address.is_unspecified or address in (lease.address, lease.address_v6):
        return Decision(RuleAction.ALLOW, Cause.LOOPBACK)
    if isinstance(address, IPv6Address) and lease.address_v6 is None:
        return Decision(RuleAction.DENY, Cause.IPV6)
    decision = decide(policy, destination, around.denied)
    if decision.action is RuleAction.DENY:
        return decision
    if isinstance(address, IPv6Address) and (address.is_link_local or address.is_multicast):
        return Decision(RuleAction.DENY, Cause.MARTIAN)
    if address in around.host_addresses:
        return decision if _is_open_on_host(around, destination) else Decision(RuleAction.DENY, Cause.HOST)
    if address in around.containers:
        is_open = _is_within_reach(around, lease, address)
        return decision if is_open else Decision(RuleAction.DENY, Cause.CONTAINERS)
    return Decision(RuleAction.DENY, Cause.UNREACHABLE) if _is_nobodys(around, address) else decision


def _is_open_on_host(around: Surroundings, destination: Destination) -> bool:
    """Whether an address of the host can be connected to; see host_firewall: map_ports, then to_host."""
    if around.host_access:
        return True
    address, protocol, port = destination.address, destination.protocol, destination.port
    if port is not None and (address.version, protocol.value, port) in around.mapped_ports:
        return True
    if destination.icmp is not None and destination.icmp.type == _ECHO_REQUESTS[address.version]:
        return address in (around.host.gateway, around.host.gateway_v6)
    return port == DNS_PORT and address in around.dns_servers


def _is_within_reach(around: Surroundings, lease: NetworkLease, address: IPv4Address | IPv6Address) -> bool:
    if around.reach is not Reach.SUBNET:
        return around.reach is Reach.ALL
    if lease.subnet is None:
        return False
    networks = (lease.subnet, around.host.network_v6(lease.subnet))
    return any(network is not None and address in network for network in networks)


def _is_nobodys(around: Surroundings, address: IPv4Address | IPv6Address) -> bool:
    """Whether it is of the server's networks, where no container has it."""
    networks = (around.host.pool, *around.subnets, around.host.pool_v6)
    return any(network is not None and address in network for network in networks)
