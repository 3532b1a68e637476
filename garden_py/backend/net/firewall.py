"""Egress policies compiled to nft text. Pure; `host_firewall.py` has the host's own tables.

The same rules land in one of two places. An unprivileged container's go into a table `inet garden` of its own
network namespace: they see its packets only, are replaced in one transaction and vanish with the namespace. A
privileged container could undo them there, so its rules become a chain in the server's table on the host.

Each rule becomes one nft statement with its own counter and the comment `rule N`, evaluated in order. Rules
are not folded into shared sets: that would lose the counters which answer "why was this denied", and only the
first packet of a connection walks the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, summarize_address_range

from garden_py.model.netrule import AddressRange, DefaultAction, EgressPolicy, EgressRule, PortRange, Protocol
from garden_py.model.netrule import RuleAction as Action

CONTAINER_TABLE = "garden"
LOG_GROUP = 0x6764
"""NFLOG group of logged connections ("gd"); a group per namespace, see nfnetlink_log in libnetfilter_log."""

REJECT = "goto refuse"
REFUSE = ["meta l4proto tcp reject with tcp reset", "reject with icmpx admin-prohibited"]
"""What chain `refuse` does: an error at once where a silent drop would cost a time-out (RFC 1812 §5.2.7.1).

A TCP connect gets a reset: the kernel drops an ICMP error that meets the connecting socket still locked
(tcp_v4_err, LockDroppedIcmps), and the caller would wait for the retransmission, a second later.
"""

DNS_PORT = 53
_LAST_IPV4 = IPv4Address("255.255.255.255")


def compile_container_ruleset(policy: EgressPolicy, *, dns_servers: Sequence[IPv4Address] = ()) -> str:
    """The whole `inet garden` table of a container's namespace, as one transaction that replaces any former.

    Loopback and replies are free, IPv6 is refused (containers have no IPv6 address), the DNS servers that the
    container was given are reachable on port 53, then the policy decides. Established connections outlive a
    replacement: connection tracking belongs to the namespace, not to the table. Forwarding is refused: a
    container is no router, whatever its `ip_forward` says.

    Returns:
        nft text; `nft -f -` in the container's namespace applies it.
    """
    body = [*_preamble(), *compile_policy(policy, dns_servers=dns_servers)]
    lines = [
        f"add table inet {CONTAINER_TABLE}",  # so that the delete finds one
        f"delete table inet {CONTAINER_TABLE}",
        f"table inet {CONTAINER_TABLE} {{",
        *chain("refuse", "", REFUSE),
        *chain("output", "type filter hook output priority filter; policy drop;", body),
        *chain("forward", "type filter hook forward priority filter; policy drop;", []),
        "}",
    ]
    return "\n".join(lines) + "\n"


def compile_policy(policy: EgressPolicy, *, dns_servers: Sequence[IPv4Address] = ()) -> list[str]:
    """The statements that decide about a new connection: DNS, the rules, the default."""
    lines = []
    if dns_servers:
        servers = _set(sorted({str(s) for s in dns_servers}))
        lines.append(
            f'ip daddr {servers} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} counter accept comment "dns"'
        )
    for index, rule in enumerate(policy.rules):
        lines.extend(_rule_statements(index, rule))
    lines.append(_default_statement(policy))
    return lines


def chain(name: str, hook: str, body: Iterable[str]) -> list[str]:
    """A chain block inside a table block; `hook` is empty for a chain that is only jumped to."""
    return [
        f"\tchain {name} {{",
        *(f"\t\t{line}" for line in ([hook] if hook else [])),
        *(f"\t\t{b}" for b in body),
        "\t}",
    ]


def match_addresses(ranges: Sequence[AddressRange]) -> str | None:
    """`ip daddr ...` for the IPv4 part of `ranges`: empty text for any address, None if nothing can match.

    Overlapping and touching ranges are merged, since an nft interval set refuses overlaps (nft(8), SETS).
    """
    if not ranges:
        return ""
    merged = _merge((int(r.start), int(r.end)) for r in ranges if r.start.version == 4)
    if not merged:
        return None
    if merged == [(0, int(_LAST_IPV4))]:
        return ""
    items = [item for start, end in merged for item in _address_items(start, end)]
    return f"ip daddr {_set(items)}"


def _preamble() -> list[str]:
    return [
        'oifname "lo" accept',
        "ct state established,related accept",
        f'meta nfproto ipv6 counter {REJECT} comment "ipv6"',
    ]


def _rule_statements(index: int, rule: EgressRule) -> list[str]:
    addresses = match_addresses(rule.networks)
    if addresses is None:
        return []  # IPv6 networks only: nothing that a container can send, the preamble refused it
    log = f'log prefix "garden rule {index} {rule.action.value}: " group {LOG_GROUP}' if rule.log else ""
    verdict = "accept" if rule.action is Action.ALLOW else REJECT
    parts = [addresses, _match_protocol(rule), log, "counter", verdict, f'comment "rule {index}"']
    return [" ".join(part for part in parts if part)]


def _match_protocol(rule: EgressRule) -> str:
    match rule.protocol:
        case Protocol.ALL:
            return ""
        case Protocol.TCP | Protocol.UDP:
            if not rule.ports:
                return f"meta l4proto {rule.protocol.value}"
            return f"{rule.protocol.value} dport {_port_items(rule.ports)}"
        case Protocol.ICMP:
            if rule.icmp is None:
                return "meta l4proto icmp"
            code = "" if rule.icmp.code is None else f" icmp code {rule.icmp.code}"
            return f"icmp type {rule.icmp.type}{code}"


def _default_statement(policy: EgressPolicy) -> str:
    if policy.default_action is DefaultAction.ALLOW:
        return 'counter accept comment "default"'
    log = f'log prefix "garden default deny: " group {LOG_GROUP} ' if policy.log_denied else ""
    return f'{log}counter {REJECT} comment "default"'


def _address_items(start: int, end: int) -> list[str]:
    networks = list(summarize_address_range(IPv4Address(start), IPv4Address(end)))
    if len(networks) > 1:
        return [f"{IPv4Address(start)}-{IPv4Address(end)}"]
    return [str(networks[0]).removesuffix("/32")]


def _port_items(ports: Sequence[PortRange]) -> str:
    merged = _merge((p.start, p.end) for p in ports)
    return _set([str(start) if start == end else f"{start}-{end}" for start, end in merged])


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges sorted, with overlapping and touching ones made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _set(items: Sequence[str]) -> str:
    """One item as it is (a plain comparison is cheaper than a set lookup), several as an anonymous set."""
    return items[0] if len(items) == 1 else f"{{ {', '.join(items)} }}"
