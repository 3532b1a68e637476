"""Egress policy: what a container may connect to. Values only, no I/O.

A policy is an ordered list of rules and a default. Rules are evaluated in the caller's order, **the first
match decides**, and what no rule matches gets the default action. Replies to connections that were let in
or out before are not asked again (`backend/net/firewall.py` accepts established flows first).

Text form, for the command line and for humans:

    [deny ]PROTO[:NETWORKS[:PORTS]][ log]

    PROTO     all | tcp | udp | icmp
    NETWORKS  comma separated 10.0.0.0/8 | 10.0.0.1 | 10.0.0.1-10.0.0.9; IPv6 in brackets: [2001:db8::/32];
              * or nothing: any address
    PORTS     comma separated 80 | 443-445 for tcp and udp; TYPE or TYPE/CODE for icmp

    tcp:10.0.0.0/8:80,443-445      icmp:1.2.3.4:8/0      deny all:169.254.169.254 log
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from types import TracebackType

from garden_py.model.errors import InvalidField
from garden_py.model.remember import remembered

MAX_PORT = 65535
MAX_RULES = 10_000
"""A policy above this is a mistake of the caller; it would take the kernel about a second to load."""

IPAddress = IPv4Address | IPv6Address
_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291 §2.5.5.2


class at_field:
    """A context that prefixes the field of an InvalidField raised inside: `end` becomes `rules[3].ports[0].end`.

    A class, since a policy goes through thousands of these and a generator takes five times as long.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, InvalidField):
            raise InvalidField(f"{self._path}.{error.field}", error.problem) from error


class Protocol(Enum):
    """What a rule matches above IP. ALL means every protocol, also those not named here."""

    ALL = "all"
    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"


class RuleAction(Enum):
    """What happens to a new connection that a rule matches."""

    ALLOW = "allow"
    DENY = "deny"


class DefaultAction(Enum):
    """What happens to a new connection that no rule matches."""

    ALLOW = "allow"
    DENY = "deny"


def parse_address(text: str) -> IPAddress:
    """An address as a packet has it: without a scope, and IPv4 as such where it is written as a part of IPv6.

    Raises:
        ValueError: text is no address, or has a scope, which only means something on one host.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ValueError(f"{text!r} has a scope")
        return address.ipv4_mapped or address
    return address


@dataclass(frozen=True, slots=True)
class AddressRange:
    """Addresses from start to end, both included, of one family.

    Raises:
        InvalidField: families differ or the range is reversed (field `end`).
    """

    start: IPAddress
    end: IPAddress

    def __post_init__(self) -> None:
        if self.start.version != self.end.version:
            raise InvalidField("end", f"{self.start} and {self.end} are of different IP versions")
        if int(self.end) < int(self.start):
            raise InvalidField("end", f"range is reversed: {self.start}-{self.end}")

    def __hash__(self) -> int:
        # Rules are keys of caches, and the hash of an address takes 20 times as long.
        return hash((int(self.start), int(self.end)))

    @classmethod
    def parse(cls, text: str) -> AddressRange:
        """Read `10.0.0.0/8`, `10.0.0.1`, `10.0.0.1-10.0.0.9` or their IPv6 counterparts.

        Raises:
            InvalidField: anything else, also a network with host bits set (field `start`).
        """
        plain = _parse_plain(text)
        if plain is not None:
            return cls(*plain)
        try:
            if "/" in text:
                network = ip_network(text)
                if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
                    raise ValueError("packets to it are IPv4; write it so")
                return cls(network[0], network[-1])
            first, dash, last = text.partition("-")
            start = parse_address(first.strip())
            return cls(start, parse_address(last.strip()) if dash else start)
        except ValueError as error:
            raise InvalidField("start", f"{text!r} is no address, network or range: {error}") from error

    def __str__(self) -> str:
        start, end = int(self.start), int(self.end)
        if start == end:
            return str(self.start)
        # A network is 2^n addresses that begin at a multiple of 2^n; spelled out, since summarize_address_range takes
        # 20 times as long and a policy has up to ten thousand of these.
        size = end - start + 1
        if size & size - 1 or start % size:
            return f"{self.start}-{self.end}"
        return f"{self.start!s}/{self.start.max_prefixlen - size.bit_length() + 1}"


def _parse_plain(text: str) -> tuple[IPv4Address, IPv4Address] | None:
    """First and last address of `10.0.0.1` or `10.0.0.0/8`; None for all else, a network with host bits included.

    The ipaddress module takes four times as long, and this is what most rules have.
    """
    address, slash, length = text.partition("/")
    try:
        first = int.from_bytes(socket.inet_pton(socket.AF_INET, address))
        bits = 32 - int(length) if slash else 0
    except (OSError, ValueError):
        return None
    if not 0 <= bits <= 32 or first & (1 << bits) - 1 or length not in ("", str(32 - bits)):
        return None
    start = IPv4Address(first)
    return start, start if bits == 0 else IPv4Address(first + (1 << bits) - 1)


@dataclass(frozen=True, slots=True)
class PortRange:
    """Destination ports from start to end, both included, each 1..65535.

    Raises:
        InvalidField: a port out of range (`start`, `end`) or a reversed range (`end`).
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if 1 <= self.start <= self.end <= MAX_PORT:
            return
        for field, port in (("start", self.start), ("end", self.end)):
            if not 1 <= port <= MAX_PORT:
                raise InvalidField(field, f"port {port} is not within 1..{MAX_PORT}")
        raise InvalidField("end", f"range is reversed: {self.start}-{self.end}")

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """Read `80` or `443-445`; InvalidField (`start`) for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
        if match is None:
            raise InvalidField("start", f"{text!r} is no port or port range")
        start = int(match[1])
        return cls(start, start if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return str(self.start) if self.start == self.end else f"{self.start}-{self.end}"


@dataclass(frozen=True, slots=True)
class IcmpMatch:
    """ICMP messages of one type, and of one code unless code is None (RFC 792; to IPv6 destinations RFC 4443).

    Raises:
        InvalidField: type or code not within 0..255.
    """

    type: int
    code: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.type <= 255:
            raise InvalidField("type", f"ICMP type {self.type} is not within 0..255")
        if self.code is not None and not 0 <= self.code <= 255:
            raise InvalidField("code", f"ICMP code {self.code} is not within 0..255")

    @classmethod
    def parse(cls, text: str) -> IcmpMatch:
        """Read `8` or `8/0`; InvalidField (`type`) for anything else."""
        match = re.fullmatch(r"([0-9]{1,3})(?:/([0-9]{1,3}))?", text)
        if match is None:
            raise InvalidField("type", f"{text!r} is no ICMP TYPE or TYPE/CODE")
        return cls(int(match[1]), None if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return str(self.type) if self.code is None else f"{self.type}/{self.code}"


@dataclass(frozen=True, slots=True)
class EgressRule:
    """One step of a policy; every part that is given must match.

    Attributes:
        protocol: ALL, TCP, UDP or ICMP.
        networks: destination addresses, any of them; empty means every address.
        ports: destination ports, any of them; empty means every port. TCP and UDP only.
        icmp: one kind of ICMP message; None means every kind. ICMP only.
        log: also report each new connection that matches as an event.
        action: what happens on a match.

    Raises:
        InvalidField: ports without TCP or UDP, or icmp without ICMP.
    """

    protocol: Protocol
    networks: tuple[AddressRange, ...] = ()
    ports: tuple[PortRange, ...] = ()
    icmp: IcmpMatch | None = None
    log: bool = False
    action: RuleAction = RuleAction.ALLOW

    def __post_init__(self) -> None:
        if self.ports and self.protocol not in (Protocol.TCP, Protocol.UDP):
            raise InvalidField("ports", f"protocol {self.protocol.value} has no ports; use tcp or udp")
        if self.icmp is not None and self.protocol is not Protocol.ICMP:
            raise InvalidField("icmp", f"protocol is {self.protocol.value}; use icmp")

    @property
    def is_short(self) -> bool:
        """Whether what is made of it is remembered: a policy is mostly the one before, with changes."""
        return len(self.networks) + len(self.ports) <= 16

    def __str__(self) -> str:
        return format_egress_rule(self)


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Everything that decides about a container's outgoing connections.

    Attributes:
        default_action: for what no rule matches.
        rules: in the caller's order; the first match decides.
        generation: how often established connections have been cut. Those that were let out under an earlier
            generation are judged again, by the rules now in force.

    Raises:
        InvalidField: more than MAX_RULES rules (field `rules`).
    """

    default_action: DefaultAction = DefaultAction.ALLOW
    rules: tuple[EgressRule, ...] = ()
    generation: int = 0

    def __post_init__(self) -> None:
        if len(self.rules) > MAX_RULES:
            raise InvalidField("rules", f"{len(self.rules)} rules; at most {MAX_RULES} are accepted")


class Cause(Enum):
    """What decides about a connection. Values are part of events and of the API."""

    RULE = "rule"
    DENIED_NETWORK = "denied_network"
    DEFAULT = "default"
    IPV6 = "ipv6"
    HOST = "host"
    CONTAINERS = "containers"
    SPOOFED = "spoofed"
    MARTIAN = "martian"
    UNREACHABLE = "unreachable"
    LOOPBACK = "loopback"


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a connection would go.

    Attributes:
        protocol: ALL stands for one that has neither ports nor is ICMP.
        address: of the other end, as the container names it.
        port: of TCP and UDP, 1..65535; else None.
        icmp: of ICMP; its code is given.

    Raises:
        InvalidField: a part is missing, or does not belong to the protocol.
    """

    protocol: Protocol
    address: IPAddress
    port: int | None = None
    icmp: IcmpMatch | None = None

    def __post_init__(self) -> None:
        has_ports = self.protocol in (Protocol.TCP, Protocol.UDP)
        if has_ports != (self.port is not None):
            problem = "is needed" if has_ports else "is for tcp and udp only"
            raise InvalidField("port", problem)
        if self.port is not None and not 1 <= self.port <= MAX_PORT:
            raise InvalidField("port", f"port {self.port} is not within 1..{MAX_PORT}")
        if self.icmp is not None and self.protocol is not Protocol.ICMP:
            raise InvalidField("icmp", f"protocol is {self.protocol.value}; use icmp")

    @classmethod
    def parse(cls, protocol: str, text: str) -> Destination:
        """Read a protocol and what follows it on a command line.

        `10.0.0.5:443` or `[2001:db8::5]:443` for tcp and udp; `10.0.0.5:3/1` for icmp, or an address alone for an echo
        request; an address alone for all, which stands for another protocol. Alone, IPv6 needs no brackets.

        Raises:
            InvalidField: naming the part.
        """
        try:
            kind = Protocol(protocol)
        except ValueError as error:
            known = ", ".join(p.value for p in Protocol)
            raise InvalidField("protocol", f"{protocol!r} is none of {known}") from error
        is_alone = kind not in (Protocol.TCP, Protocol.UDP) and _is_ipv6(text)
        pattern = r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(.+))?"
        match = re.fullmatch(pattern, f"[{text}]" if is_alone else text)
        try:
            if text.count(":") > 1 and "[" not in text and not is_alone:
                raise ValueError("write IPv6 in brackets, as in [2001:db8::5]:443")
            if match is None:
                raise ValueError("write ADDRESS, ADDRESS:PORT or [IPv6]:PORT")
            address = parse_address(match[1] or match[2])
        except ValueError as error:
            raise InvalidField("address", f"{text!r} is no destination: {error}") from error
        last = match[3]
        if kind is Protocol.ICMP:
            with at_field("icmp"):
                found = IcmpMatch.parse(
                    last or ("8/0" if address.version == 4 else "128/0")
                )  # RFC 792, RFC 4443
            return cls(kind, address, icmp=IcmpMatch(found.type, found.code or 0))
        if last is not None and not re.fullmatch(r"[0-9]{1,5}", last):
            raise InvalidField("port", f"{last!r} is no port")
        return cls(kind, address, None if last is None else int(last))

    def __str__(self) -> str:
        shown = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        last = self.port if self.icmp is None else self.icmp
        return f"{self.protocol.value} {shown}" + ("" if last is None else f":{last}")


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a new connection, and why.

    Attributes:
        action: allowed or refused.
        cause: what decided.
        rule: index into the policy's rules if one of them decided.
    """

    action: RuleAction
    cause: Cause
    rule: int | None = None


def decide(policy: EgressPolicy, destination: Destination, denied: tuple[AddressRange, ...] = ()) -> Decision:
    """What a container's policy says of a new connection; the kernel is told the same by backend/net/firewall.py.

    Args:
        policy: of the container.
        destination: of the connection.
        denied: networks that the server denies to what no rule allows.
    """
    for index, rule in enumerate(policy.rules):
        if _matches(rule, destination):
            return Decision(rule.action, Cause.RULE, index)
    if any(_holds(each, destination.address) for each in denied):
        return Decision(RuleAction.DENY, Cause.DENIED_NETWORK)
    return Decision(RuleAction(policy.default_action.value), Cause.DEFAULT)


def _matches(rule: EgressRule, destination: Destination) -> bool:
    if rule.protocol not in (Protocol.ALL, destination.protocol):
        return False
    if rule.networks and not any(_holds(each, destination.address) for each in rule.networks):
        return False
    if rule.ports and not any(each.start <= (destination.port or 0) <= each.end for each in rule.ports):
        return False
    if rule.icmp is None:
        return True
    kind = destination.icmp
    return kind is not None and rule.icmp.type == kind.type and rule.icmp.code in (None, kind.code)


def _holds(addresses: AddressRange, address: IPAddress) -> bool:
    same = addresses.start.version == address.version
    return same and int(addresses.start) <= int(address) <= int(addresses.end)


def parse_egress_rule(text: str) -> EgressRule:
    """Read the text form of the module docstring; `format_egress_rule` is its inverse.

    Raises:
        InvalidField: with the part as field: protocol, networks[i]..., ports[i]... or icmp...
    """
    words = text.split()
    action = RuleAction.ALLOW
    if words and words[0] == "deny":
        action = RuleAction.DENY
        words = words[1:]
    log = len(words) == 2 and words[1] == "log"
    if len(words) != (2 if log else 1):
        raise InvalidField("protocol", f"{text!r} is not of the form [deny ]PROTO[:NETWORKS[:PORTS]][ log]")
    protocol_text, networks_text, last_text = _split_parts(words[0])
    try:
        protocol = Protocol(protocol_text)
    except ValueError as error:
        known = ", ".join(p.value for p in Protocol)
        raise InvalidField("protocol", f"{protocol_text!r} is none of {known}") from error
    is_icmp = protocol is Protocol.ICMP
    return EgressRule(
        protocol=protocol,
        networks=_parse_networks(networks_text),
        ports=() if is_icmp else _parse_ports(last_text),
        icmp=_parse_icmp(last_text) if is_icmp else None,
        log=log,
        action=action,
    )


@remembered(lambda rule: rule.is_short)
def format_egress_rule(rule: EgressRule) -> str:
    """The shortest text that `parse_egress_rule` turns into an equal rule."""
    networks = ",".join(f"[{n}]" if n.start.version == 6 else str(n) for n in rule.networks)
    last = ",".join(map(str, rule.ports)) if rule.icmp is None else str(rule.icmp)
    parts = [rule.protocol.value]
    if networks or last:
        parts.append(networks or "*")
    if last:
        parts.append(last)
    deny = "deny " if rule.action is RuleAction.DENY else ""
    return deny + ":".join(parts) + (" log" if rule.log else "")


def _split_parts(text: str) -> tuple[str, str, str]:
    """Split at the colons outside brackets into three parts, missing ones empty."""
    parts = re.split(r":(?![^\[]*\])", text)
    if len(parts) > 3:
        raise InvalidField("protocol", f"{text!r} has more than PROTO:NETWORKS:PORTS; write IPv6 in brackets")
    protocol, networks, last = (*parts, "", "")[:3]
    return protocol, networks, last


def _parse_networks(text: str) -> tuple[AddressRange, ...]:
    if text in ("", "*"):
        return ()
    found = []
    for i, item in enumerate(text.split(",")):
        bare = item[1:-1] if item.startswith("[") and item.endswith("]") else item
        with at_field(f"networks[{i}]"):
            found.append(AddressRange.parse(bare))
    return tuple(found)


def _parse_ports(text: str) -> tuple[PortRange, ...]:
    if not text:
        return ()
    found = []
    for i, item in enumerate(text.split(",")):
        with at_field(f"ports[{i}]"):
            found.append(PortRange.parse(item))
    return tuple(found)


def _parse_icmp(text: str) -> IcmpMatch | None:
    if not text:
        return None
    with at_field("icmp"):
        return IcmpMatch.parse(text)
