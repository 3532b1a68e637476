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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from garden_py.backend.net.firewall import (
    DENY_PREFIX,
    DNS_PORT,
    LOG_RATE,
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
    dns_servers: tuple[IPv4Address, ...] = ()


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A host port whose connections go to a container. Ports are 1..65535."""

    protocol: PortProtocol
    host_port: int
    address: IPv4Address
    container_port: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        return {
            "protocol": self.protocol.value,
            "host_port": self.host_port,
            "address": str(self.address),
            "container_port": self.container_port,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PortMapping:
        """Rebuild from `to_json`."""
        return cls(
            PortProtocol(value["protocol"]),
            value["host_port"],
            IPv4Address(value["address"]),
            value["container_port"],
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
        "antispoof": ("type filter hook prerouting priority raw; policy accept;", _antispoof(ours)),
        "judge": ("type filter hook prerouting priority mangle; policy accept;", _judge(ours)),
        "map_ports": ("type nat hook prerouting priority dstnat; policy accept;", [_MAP_PORTS]),
        "map_ports_local": ("type nat hook output priority -100; policy accept;", [_MAP_PORTS]),
        "to_host": ("", _to_host(host, policy)),
        "input": ("type filter hook input priority filter; policy accept;", [f"iifname {ours} goto to_host"]),
        "from_container": ("", _from_container(ours, policy)),
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
    text = f"add element inet {host.table} members {{ {_member(link)} }}\n"
    if host_side_policy is None:
        return text
    rules = compile_host_side_policy(host, link, host_side_policy, denied=denied)
    return f"{text}{rules}add element inet {host.table} egress {{ {_judgement(link)} }}\n"


def compile_host_side_policy(
    host: HostPlan, link: LinkPlan, policy: EgressPolicy, *, denied: Sequence[AddressRange] = ()
) -> str:
    """Fill a privileged container's chain, replacing what it held, in one transaction."""
    name = egress_chain(link)
    body = chain(name, "", compile_host_side_chain(policy, log_target(host), denied=denied))
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
    lines = _forget(host, "members", _member(link), _member(link))
    for mapping in mappings:
        lines += _forget(host, "portmap", _mapping_key(mapping), _mapping(mapping))
    if has_host_side_policy:
        name = egress_chain(link)
        lines += [
            f"add chain inet {host.table} {name}",
            *_forget(host, "egress", link.address, _judgement(link)),
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
    return f"add element inet {host.table} portmap {{ {_mapping(mapping)} }}\n"


def compile_unmap_port(host: HostPlan, mapping: PortMapping) -> str:
    """Undo compile_map_port; a mapping that is gone already is no error."""
    return "\n".join(_forget(host, "portmap", _mapping_key(mapping), _mapping(mapping))) + "\n"


def egress_chain(link: LinkPlan) -> str:
    """The chain of a privileged container in the server's table."""
    return egress_chain_of(link.host_link)


def egress_chain_of(host_link: str) -> str:
    """The same by the name of its link."""
    return "egress_" + host_link.partition("-")[2]


# `local` also means the addresses of loopback, so that 127.0.0.1:PORT works on the host.
_MAP_PORTS = "fib daddr type local dnat ip to meta l4proto . th dport map @portmap"

_SETS = [
    "\tset members {",
    "\t\ttype ifname . ipv4_addr",
    "\t}",
    "\tmap portmap {",
    "\t\ttype inet_proto . inet_service : ipv4_addr . inet_service",
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
]


def _antispoof(ours: str) -> list[str]:
    return [
        f"iifname != {ours} accept",
        f'meta nfproto ipv6 counter {_vanish(Cause.IPV6)} comment "ipv6"',
        f'iifname . ip saddr != @members counter {_vanish(Cause.SPOOFED)} comment "spoofed"',
        # route_localnet, which 127.0.0.1:PORT needs, must not open the host's loopback services
        # (CVE-2020-8558).
        f'ip daddr 127.0.0.0/8 counter {_vanish(Cause.MARTIAN)} comment "martian"',
    ]


def _vanish(cause: Cause) -> str:
    """Without an answer, which a forged source would not get anyway."""
    return refuse(cause).replace("goto refuse", "goto vanish")


def _judge(ours: str) -> list[str]:
    # Before destination NAT, so that a rule means the address the container asked for, as it does in an
    # unprivileged container's own namespace.
    return [f"iifname != {ours} accept", "ip saddr vmap @egress"]


def _to_host(host: HostPlan, policy: HostPolicy) -> list[str]:
    lines = [
        "ct state established,related accept",
        f"ip daddr {host.gateway} icmp type echo-request accept",
    ]
    if policy.host_access is Access.ALLOW:
        return [*lines, "accept"]
    if policy.dns_servers:
        servers = ", ".join(sorted({str(s) for s in policy.dns_servers}))
        lines.append(f"ip daddr {{ {servers} }} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept")
    return [*lines, f"counter {refuse(Cause.HOST)}"]


def _from_container(ours: str, policy: HostPolicy) -> list[str]:
    lines = [
        "ct state established,related accept",
        # A packet that connection tracking cannot place is not translated either: it would leave with a
        # source address of the pool.
        "ct state invalid counter drop",
        "ct status dnat accept",
    ]
    if policy.reach is Reach.SUBNET and policy.subnets:
        pairs = ", ".join(f"{subnet} . {subnet}" for subnet in policy.subnets)
        lines.append(f"oifname {ours} ip saddr . ip daddr {{ {pairs} }} accept")
    if policy.reach is not Reach.ALL:
        lines.append(f"oifname {ours} counter {refuse(Cause.CONTAINERS)}")
    return [*lines, "accept"]


def _source_nat(host: HostPlan, ours: str) -> list[str]:
    return [
        # A container that reached itself through a mapped port must see the reply come from outside.
        f"oifname . ip saddr @members snat ip to {host.gateway}",
        f"oifname {ours} ip saddr 127.0.0.0/8 snat ip to {host.gateway}",
        f'oifname {{ "lo", {ours} }} accept',
        "iifname . ip saddr @members masquerade",
    ]


def _forget(host: HostPlan, name: str, key: str, element: str) -> list[str]:
    return [
        f"add element inet {host.table} {name} {{ {element} }}",
        f"delete element inet {host.table} {name} {{ {key} }}",
    ]


def _member(link: LinkPlan) -> str:
    return f'"{link.host_link}" . {link.address}'


def _judgement(link: LinkPlan) -> str:
    return f"{link.address} : goto {egress_chain(link)}"


def _mapping_key(mapping: PortMapping) -> str:
    return f"{mapping.protocol.value} . {mapping.host_port}"


def _mapping(mapping: PortMapping) -> str:
    return f"{_mapping_key(mapping)} : {mapping.address} . {mapping.container_port}"
