"""The server's own table on the host, compiled to nft text. Pure.

One table `inet garden_<tag>`; nobody else's table is touched, and packets that neither come from nor go to
our links are left alone. Chains and rules are as many as in an empty server: a container is an element in a
set and its mapped ports are elements in a map. Only a privileged container, whose egress rules must live on
the host, has a chain of its own, reached through one verdict map.

    packet from a container                       packet from elsewhere
        raw      antispoof: @members                  raw      (not ours)
        mangle   judge: @egress (privileged)
        dstnat   map_ports: @portmap                  dstnat   map_ports: @portmap  (host itself: output hook)
        filter   forward: from_container              filter   forward: to_container
              or input: to_host
        srcnat   masquerade (pool -> outside), or the gateway's address where a reply would not come back

The same for IPv6 if the server has a pool of it, with @members6, @egress6 and @portmap6. A pool that others can route
to (not fc00::/7, RFC 4193) is not masqueraded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from garden_py.backend.net.firewall import (
    DENY_PREFIX,
    DNS_PORT,
    LOG_RATE,
    NEIGHBOUR_TALK,
    REJECT,
    LogTarget,
    chain,
    compile_host_side_chain,
    refuse,
    refuse_chain,
)
from garden_py.backend.net.plan import HostPlan, LinkPlan
from garden_py.model.netrule import AddressRange, Cause, EgressPolicy

BASE_CHAINS = (
    "refuse", "vanish", "antispoof", "judge", "map_ports", "map_ports_local", "to_host", "input", "from_container",
    "to_container", "forward", "source_nat",
)  # fmt: skip


HOOKED_CHAINS = ("antispoof", "judge", "map_ports", "map_ports_local", "input", "forward", "source_nat")
"""Those that packets come to by themselves."""


class Access(Enum):
    """Whether a direction is open."""

    ALLOW = "allow"
    DENY = "deny"


class Reach(Enum):
    """Which other containers a container reaches by their addresses."""

    ALL = "all"
    SUBNET = "subnet"
    NONE = "none"


class PortProtocol(Enum):
    """What can be mapped from a host port to a container."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class HostPolicy:
    """What holds for all containers of a server.

    Attributes:
        host_access: may containers reach the host's own addresses? Mapped ports can always be reached.
        reach: which other containers may be reached directly, by container address.
        subnets: that callers have chosen; what `reach` SUBNET means.
        dns_servers: host addresses that containers may ask for names even where host_access is denied.
    """

    host_access: Access = Access.DENY
    reach: Reach = Reach.ALL
    subnets: tuple[IPv4Network, ...] = ()
    dns_servers: tuple[IPv4Address | IPv6Address, ...] = ()


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A host port whose connections go to a container. Ports are 1..65535; by IPv6, too, if the container has it."""

    protocol: PortProtocol
    host_port: int
    address: IPv4Address
    container_port: int
    address_v6: IPv6Address | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        return {
            "protocol": self.protocol.value,
            "host_port": self.host_port,
            "address": str(self.address),
            "container_port": self.container_port,
            "address_v6": None if self.address_v6 is None else str(self.address_v6),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PortMapping:
        """Rebuild from `to_json`."""
        address_v6 = value["address_v6"]
        return cls(
            PortProtocol(value["protocol"]),
            value["host_port"],
            IPv4Address(value["address"]),
            value["container_port"],
            None if address_v6 is None else IPv6Address(address_v6),
        )


def compile_host_base(host: HostPlan, policy: HostPolicy) -> str:
    """The table with its chains, as one transaction that repairs a present one and keeps its elements.

    Run it at every start: rules are flushed and written anew, members, mappings and privileged containers'
    chains stay.
    """
    ours = f'"{host.link_prefix}*"'
    log = log_target(host)
    chains = {
        "refuse": ("", refuse_chain(log)),
        "vanish": ("", [log.statement(DENY_PREFIX), "drop"]),
        "antispoof": ("type filter hook prerouting priority raw; policy accept;", _antispoof(host, ours)),
        "judge": ("type filter hook prerouting priority mangle; policy accept;", _judge(ours)),
        "map_ports": (
            "type nat hook prerouting priority dstnat; policy accept;",
            [_MAP_PORTS, _MAP_PORTS_V6],
        ),
        "map_ports_local": (
            "type nat hook output priority -100; policy accept;",
            # A packet to ::1 cannot leave this host (RFC 4291 §2.5.3): it meets what listens there, or a refusal.
            [_MAP_PORTS, f"ip6 daddr != ::1 {_MAP_PORTS_V6}"],
        ),
        "to_host": ("", _to_host(host, policy)),
        "input": ("type filter hook input priority filter; policy accept;", [f"iifname {ours} goto to_host"]),
        "from_container": ("", _from_container(host, ours, policy)),
        "to_container": (
            "",
            ["ct state established,related accept", "ct status dnat accept", "counter", *REJECT],
        ),
        "forward": (
            "type filter hook forward priority filter; policy accept;",
            [f"iifname {ours} goto from_container", f"oifname {ours} goto to_container"],
        ),
        "source_nat": ("type nat hook postrouting priority srcnat; policy accept;", _source_nat(host, ours)),
    }
    assert tuple(chains) == BASE_CHAINS
    table = f"inet {host.table}"
    lines = [f"table {table} {{", *_SETS]
    for name, (hook, _) in chains.items():
        lines += chain(name, hook, [])
    lines += ["}", *(f"flush chain {table} {name}" for name in chains), f"table {table} {{"]
    for name, (_, body) in chains.items():
        lines += chain(name, "", body)
    return "\n".join([*lines, "}"]) + "\n"


def log_target(host: HostPlan) -> LogTarget:
    """Where the host's table tells of what it refuses: a group per server, a rate per container."""
    return LogTarget(int(host.tag, 16), f"update @told {{ iifname limit {LOG_RATE} }}")


def compile_host_removal(host: HostPlan) -> str:
    """Delete the table, present or not."""
    return f"add table inet {host.table}\ndelete table inet {host.table}\n"


def compile_forget_v6(host: HostPlan) -> str:
    """Empty the sets and maps of IPv6; the table is there."""
    kinds = (("set", "members6"), ("map", "portmap6"), ("map", "egress6"))
    return "".join(f"flush {kind} inet {host.table} {name}\n" for kind, name in kinds)


def compile_attach(
    host: HostPlan,
    link: LinkPlan,
    *,
    host_side_policy: EgressPolicy | None = None,
    denied: Sequence[AddressRange] = (),
) -> str:
    """Let a container's link send with its own address; repeating it is harmless.

    Args:
        host: the server's plan.
        link: the container's plan.
        host_side_policy: a privileged container's egress policy; None for an unprivileged one.
        denied: networks that are refused where no rule of that policy has let them through.
    """
    addresses = _addresses(link)
    text = "".join(
        f"add element inet {host.table} {set_of('members', each)} {{ {_member(link, each)} }}\n"
        for each in addresses
    )
    if host_side_policy is None:
        return text
    text += compile_host_side_policy(host, link, host_side_policy, denied=denied)
    return text + "".join(
        f"add element inet {host.table} {set_of('egress', each)} {{ {_judgement(link, each)} }}\n"
        for each in addresses
    )


def compile_host_side_policy(
    host: HostPlan, link: LinkPlan, policy: EgressPolicy, *, denied: Sequence[AddressRange] = ()
) -> str:
    """Fill a privileged container's chain, replacing what it held, in one transaction."""
    name = egress_chain(link)
    rules = compile_host_side_chain(policy, log_target(host), denied=denied)
    body = chain(name, "", rules)
    lines = [
        f"add chain inet {host.table} {name}",
        f"flush chain inet {host.table} {name}",
        f"table inet {host.table} {{",
        *body,
        "}",
    ]
    return "\n".join(lines) + "\n"


def compile_detach(
    host: HostPlan,
    link: LinkPlan,
    *,
    mappings: Sequence[PortMapping] = (),
    has_host_side_policy: bool = False,
) -> str:
    """Forget a container, its mappings included; what is gone already is no error.

    Each element is added before it is deleted, in the same transaction: nft has "delete if there" only since
    1.0.7 on Linux 6.3, and adding what is there already changes nothing.
    """
    lines: list[str] = []
    for address in _addresses(link):
        member = _member(link, address)
        lines += forget_element(host, set_of("members", address), member, member)
    for mapping in mappings:
        lines += _forget_mapping(host, mapping)
    if has_host_side_policy:
        name = egress_chain(link)
        lines.append(f"add chain inet {host.table} {name}")
        for address in _addresses(link):
            lines += forget_element(host, set_of("egress", address), address, _judgement(link, address))
        lines += [
            f"flush chain inet {host.table} {name}",
            f"delete chain inet {host.table} {name}",
        ]
    return "\n".join(lines) + "\n"


def split_forget(text: str) -> list[str]:
    """The parts of a transaction of compile_detach that can be done by themselves: an element's two lines together."""
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        of_element, begins = " element " in line, line.startswith("add element")
        if parts and not begins and (of_element or " element " not in parts[-1]):
            parts[-1] += line
        else:
            parts.append(line)
    return parts


def compile_map_port(host: HostPlan, mapping: PortMapping) -> str:
    """Send connections to a host port to a container; repeating it is harmless.

    nft refuses it (EEXIST) if the port is mapped to something else.
    """
    return "".join(
        f"add element inet {host.table} {set_of('portmap', each)} {{ {_mapping(mapping, each)} }}\n"
        for each in _mapped(mapping)
    )


def compile_unmap_port(host: HostPlan, mapping: PortMapping) -> str:
    """Undo compile_map_port; a mapping that is gone already is no error."""
    return "\n".join(_forget_mapping(host, mapping)) + "\n"


def egress_chain(link: LinkPlan) -> str:
    """The chain of a privileged container in the server's table."""
    return egress_chain_of(link.host_link)


def egress_chain_of(host_link: str) -> str:
    """The same by the name of its link."""
    return "egress_" + host_link.partition("-")[2]


_UNIQUE_LOCAL = IPv6Network("fc00::/7")

# `local` also means the addresses of loopback, so that 127.0.0.1:PORT works on the host.
_MAP_PORTS = "fib daddr type local dnat ip to meta l4proto . th dport map @portmap"
_MAP_PORTS_V6 = "fib daddr type local dnat ip6 to meta l4proto . th dport map @portmap6"

_SETS = [
    "\tset members {",
    "\t\ttype ifname . ipv4_addr",
    "\t}",
    "\tmap portmap {",
    "\t\ttype inet_proto . inet_service : ipv4_addr . inet_service",
    "\t}",
    "\tset members6 {",
    "\t\ttype ifname . ipv6_addr",
    "\t}",
    "\tmap portmap6 {",
    "\t\ttype inet_proto . inet_service : ipv6_addr . inet_service",
    "\t}",
    "\tset told {",
    "\t\ttype ifname",
    "\t\tsize 65536",
    "\t\tflags dynamic,timeout",
    "\t\ttimeout 1m",
    "\t}",
    "\tmap egress {",
    "\t\ttype ipv4_addr : verdict",
    "\t}",
    "\tmap egress6 {",
    "\t\ttype ipv6_addr : verdict",
    "\t}",
]


def _antispoof(host: HostPlan, ours: str) -> list[str]:
    return [
        f"iifname != {ours} accept",
        *_antispoof_v6(host),
        f'iifname . ip saddr != @members counter {_vanish(Cause.SPOOFED)} comment "spoofed"',
        # route_localnet, which 127.0.0.1:PORT needs, must not open the host's loopback services
        # (CVE-2020-8558).
        f'ip daddr 127.0.0.0/8 counter {_vanish(Cause.MARTIAN)} comment "martian"',
    ]


def _antispoof_v6(host: HostPlan) -> list[str]:
    if host.pool_v6 is None:
        return [f'meta nfproto ipv6 counter {_vanish(Cause.IPV6)} comment "ipv6"']
    return [
        NEIGHBOUR_TALK,
        f'iifname . ip6 saddr != @members6 counter {_vanish(Cause.SPOOFED)} comment "spoofed"',
        # What has a meaning on one link only has none beyond it.
        f'ip6 daddr {{ ::1, fe80::/10, ff00::/8 }} counter {_vanish(Cause.MARTIAN)} comment "martian"',
    ]


def _vanish(cause: Cause) -> str:
    """Without an answer, which a forged source would not get anyway."""
    return refuse(cause).replace("goto refuse", "goto vanish")


def _judge(ours: str) -> list[str]:
    # Before destination NAT, so that a rule means the address the container asked for, as it does in an
    # unprivileged container's own namespace.
    return [f"iifname != {ours} accept", "ip saddr vmap @egress", "ip6 saddr vmap @egress6"]


def _to_host(host: HostPlan, policy: HostPolicy) -> list[str]:
    lines = [
        "ct state established,related accept",
        f"ip daddr {host.gateway} icmp type echo-request accept",
    ]
    if host.gateway_v6 is not None:
        lines.append(f"ip6 daddr {host.gateway_v6} icmpv6 type echo-request accept")
    if policy.host_access is Access.ALLOW:
        return [*lines, "accept"]
    for family, version in (("ip", 4), ("ip6", 6)):
        if servers := sorted({str(s) for s in policy.dns_servers if s.version == version}):
            match = (
                f"{family} daddr {{ {', '.join(servers)} }} meta l4proto {{ tcp, udp }} th dport {DNS_PORT}"
            )
            lines.append(f"{match} accept")
    return [*lines, f"counter {refuse(Cause.HOST)}"]


def _from_container(host: HostPlan, ours: str, policy: HostPolicy) -> list[str]:
    lines = [
        "ct state established,related accept",
        # A packet that connection tracking cannot place is not translated either: it would leave with a
        # source address of the pool.
        "ct state { invalid, untracked } counter drop",
        "ct status dnat accept",
    ]
    if policy.reach is Reach.SUBNET and policy.subnets:
        pairs = ", ".join(f"{subnet} . {subnet}" for subnet in policy.subnets)
        lines.append(f"oifname {ours} ip saddr . ip daddr {{ {pairs} }} accept")
        if host.pool_v6 is not None:
            of_subnets = [host.network_v6(subnet) for subnet in policy.subnets]
            pairs = ", ".join(f"{network} . {network}" for network in of_subnets)
            lines.append(f"oifname {ours} ip6 saddr . ip6 daddr {{ {pairs} }} accept")
    if policy.reach is not Reach.ALL:
        lines.append(f"oifname {ours} counter {refuse(Cause.CONTAINERS)}")
    return [*lines, "accept"]


def _source_nat(host: HostPlan, ours: str) -> list[str]:
    hairpin_v6, masquerade_v6 = [], []
    if host.pool_v6 is not None:
        hairpin_v6 = [f"oifname . ip6 saddr @members6 snat ip6 to {host.gateway_v6}"]
        masquerade_v6 = (
            ["iifname . ip6 saddr @members6 masquerade"] if host.pool_v6.subnet_of(_UNIQUE_LOCAL) else []
        )
    return [
        # A container that reached itself through a mapped port must see the reply come from outside.
        f"oifname . ip saddr @members snat ip to {host.gateway}",
        *hairpin_v6,
        f"oifname {ours} ip saddr 127.0.0.0/8 snat ip to {host.gateway}",
        f'oifname {{ "lo", {ours} }} accept',
        "iifname . ip saddr @members masquerade",
        *masquerade_v6,
    ]


def forget_element(host: HostPlan, name: str, key: str, element: str) -> list[str]:
    """Delete an element of a set or map, present or not."""
    return [
        f"add element inet {host.table} {name} {{ {element} }}",
        f"delete element inet {host.table} {name} {{ {key} }}",
    ]


def _forget_mapping(host: HostPlan, mapping: PortMapping) -> list[str]:
    lines: list[str] = []
    for address in _mapped(mapping):
        name, key = set_of("portmap", address), _mapping_key(mapping)
        lines += forget_element(host, name, key, _mapping(mapping, address))
    return lines


def _addresses(link: LinkPlan) -> list[str]:
    return [link.address, link.address_v6] if link.address_v6 else [link.address]


def _mapped(mapping: PortMapping) -> list[str]:
    return [str(each) for each in (mapping.address, mapping.address_v6) if each is not None]


def set_of(name: str, address: str) -> str:
    """The set or map of the table that has an address's elements."""
    return f"{name}6" if ":" in address else name


def _member(link: LinkPlan, address: str) -> str:
    return f'"{link.host_link}" . {address}'


def _judgement(link: LinkPlan, address: str) -> str:
    return f"{address} : goto {egress_chain(link)}"


def _mapping_key(mapping: PortMapping) -> str:
    return f"{mapping.protocol.value} . {mapping.host_port}"


def _mapping(mapping: PortMapping, address: str) -> str:
    return f"{_mapping_key(mapping)} : {address} . {mapping.container_port}"
