"""Which network a container is in. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from garden_py.model.errors import FieldViolation, InvalidField

DEFAULT_PREFIX_LENGTH = 30
LARGEST_PREFIX_LENGTH = 30
SMALLEST_PREFIX_LENGTH = 8
# RFC 1122 §3.2.1.3, RFC 5771
_NO_HOSTS = (IPv4Network("0.0.0.0/8"), IPv4Network("224.0.0.0/4"))


class NetworkMode(Enum):
    """OWN: a network namespace with a link to the host. NONE: one with loopback only. HOST: the host's own."""

    OWN = "own"
    NONE = "none"
    HOST = "host"


def has_unicast_only(network: IPv4Network) -> bool:
    """Whether its addresses can be those of containers, but for loopback, which overlaps a network of every host."""
    return not any(network.overlaps(other) for other in _NO_HOSTS)


@dataclass(frozen=True, slots=True)
class SubnetChoice:
    """A subnet that a caller wants, and the address in it if that matters.

    Source: Garden behaviour, statement N2.
    """

    network: IPv4Network
    address: IPv4Address | None = None

    @classmethod
    def parse(cls, text: str) -> SubnetChoice:
        """Read `a.b.c.d[/n]`, /30 if no n. Host bits zero: any address of that subnet; else that very one.

        Raises:
            InvalidField: field `subnet`.
        """
        try:
            asked = IPv4Interface(text if "/" in text else f"{text}/{DEFAULT_PREFIX_LENGTH}")
        except ValueError as error:
            raise InvalidField("subnet", f"invalid CIDR address: {text}") from error
        network, address = asked.network, asked.ip
        if not SMALLEST_PREFIX_LENGTH <= network.prefixlen <= LARGEST_PREFIX_LENGTH:
            sizes = f"/{SMALLEST_PREFIX_LENGTH} to /{LARGEST_PREFIX_LENGTH}"
            raise InvalidField("subnet", f"{network} is not of a size from {sizes}")
        if not has_unicast_only(network):
            raise InvalidField("subnet", f"{network} is not a network of unicast addresses")
        if address == network[0]:
            return cls(network)
        if address == network[1]:
            raise InvalidField("subnet", "a container IP must not equal the gateway IP")
        if address == network[-1]:
            raise InvalidField("subnet", "a container IP must not equal the broadcast IP")
        return cls(network, address)


def network_violations(
    mode: NetworkMode, subnet: str, *, privileged: bool, asks_for_more: bool, prefix: str
) -> list[FieldViolation]:
    """What contradicts itself.

    Args:
        mode: as asked for.
        subnet: likewise; empty: none.
        privileged: whether the container is.
        asks_for_more: mapped ports, an egress policy, or a limit on bandwidth.
        prefix: of the fields' names.
    """
    found: list[FieldViolation] = []
    if mode is NetworkMode.HOST and not privileged:
        found.append(
            FieldViolation(f"{prefix}.network_mode", "the host's network is for privileged containers only")
        )
    if mode is not NetworkMode.OWN and (subnet or asks_for_more):
        problem = f"with mode {mode.value} there are no subnet, ports, egress policy and bandwidth"
        found.append(FieldViolation(f"{prefix}.network_mode", problem))
    if subnet:
        try:
            SubnetChoice.parse(subnet)
        except InvalidField as error:
            found.append(FieldViolation(f"{prefix}.subnet", error.problem))
    return found
