"""Egress policies compiled to nft text. Pure; `host_firewall.py` has the host's own tables.

The same rules land in one of two places. An unprivileged container's go into a table `inet garden` of its own
network namespace: they see its packets only, are replaced in one transaction and vanish with the namespace. A
privileged container could undo them there, so its rules become a chain in the server's table on the host.

Each rule becomes one nft statement or a few, with counters and the comment `rule N`, evaluated in order. Rules
are not folded into shared sets: that would lose the counters which answer "why was this denied", and only the
first packet of a connection walks the list. Nor is every list a set: see FEW_PORTS and MANY_LISTS.

Loopback is not tracked: with a forged source address a container could make itself a connection there that some other
host seems to have begun, and answer it past all rules.

Whatever is refused goes through one chain, which tells of it before it answers: as a message to an NFLOG group, with
the cause in the packet's mark, at a bounded rate. Kernel log targets do not work in child namespaces.

A packet socket (packet(7), CAP_NET_RAW) sends frames past all hooks of IP. Where a policy refuses anything, a second
chain at the link itself drops what no route has sent: routes have a realm, which such a frame lacks and cannot get.
IPv6 routes have realm 0, and a frame without a route has none at all, not even that (nft_meta_get_eval_rtclassid).

Cutting connections: what a policy of a later generation has let out carries that generation as its connection mark.
A connection without it is judged again by the rules, once. Only policies that have cut use marks. Those of a privileged
container's connections are on the host, where other tools may have marks of their own: see CONNECTION_MARK.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from garden_py.agent.netrules import ROUTED_REALM
from garden_py.backend.net.plan import CONTAINER_LINK
from garden_py.model.netrule import (
    AddressRange,
    Cause,
    DefaultAction,
    EgressPolicy,
    EgressRule,
    Protocol,
)
from garden_py.model.netrule import RuleAction as Action
from garden_py.model.remember import remembered

CONTAINER_TABLE = "garden"
LOG_GROUP = 0x6764
"""NFLOG group in containers' namespaces ("gd"); each namespace has groups of its own (nfnetlink_log.c)."""

LOG_RATE = "rate 10/second burst 20 packets"
"""How many connections of one container are told of; the counters count all."""

CAUSE_MARKS = {
    Cause.DEFAULT: 0x8000_0001,
    Cause.DENIED_NETWORK: 0x8000_0002,
    Cause.IPV6: 0x8000_0003,
    Cause.HOST: 0x8000_0004,
    Cause.CONTAINERS: 0x8000_0005,
    Cause.SPOOFED: 0x8000_0006,
    Cause.MARTIAN: 0x8000_0007,
}
"""Marks of refused packets by cause; a rule's is its index and one."""

REJECT = ["meta l4proto tcp reject with tcp reset", "reject with icmpx admin-prohibited"]
"""How a packet is refused: an error at once where a silent drop would cost a time-out (RFC 1812 §5.2.7.1).

A TCP connect gets a reset: the kernel drops an ICMP error that meets the connecting socket still locked
(tcp_v4_err, LockDroppedIcmps), and the caller would wait for the retransmission, a second later.
"""

CONNECTION_MARK = 0x6764_0000
"""Upper half of the connection mark of what a policy has let out after a cut; its lower half is the generation."""

LOG_SNAP_BYTES = 128
"""Of each logged packet: an IPv4 header with options, and ports."""

DENY_PREFIX = "garden deny"
ALLOW_PREFIX = "garden allow "

FEW_PORTS = 3
"""So many items of a list of ports become a statement each; more become a set."""

MANY_LISTS = 200
"""A policy with more lists than this has statements in place of sets.

For each set the kernel walks through all those that a table has (nf_tables_newset, nft_set_lookup): 3,000 rules with a
list of networks and one of ports take it 4 s, and statements for their items 0.4.
"""

MANY_ITEMS = 64
"""So many statements a rule of such a policy becomes at most; what is longer is a set all the same."""

DNS_PORT = 53
_ESTABLISHED = "ct state established,related"
_LAST = {4: 2**32 - 1, 6: 2**128 - 1}
_FAMILIES = {4: ("ip", "ipv4"), 6: ("ip6", "ipv6")}

NEIGHBOUR_TALK = (
    "icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, nd-router-solicit, nd-router-advert, "
    "nd-neighbor-solicit, nd-neighbor-advert, nd-redirect, mld2-listener-report, 151-153 } drop"
)
"""What IPv6 stacks say of their own accord (RFC 3810, RFC 4861, RFC 4286). Here all that it asks for is fixed.

The kernel does not track it, so what would leave would leave untranslated.
"""

_LINK_TABLE = f"netdev {CONTAINER_TABLE}"
_LINK_HOOK = f'type filter hook egress device "{CONTAINER_LINK}" priority filter; policy drop;'
_LET_PASS_HAND_MADE = [f"add table {_LINK_TABLE}", f"delete table {_LINK_TABLE}"]
_DROP_HAND_MADE = [
    f"add table {_LINK_TABLE}",
    f"add chain {_LINK_TABLE} egress {{ {_LINK_HOOK} }}",
    f"flush chain {_LINK_TABLE} egress",
    f"add rule {_LINK_TABLE} egress meta rtclassid {ROUTED_REALM} accept",
]
_LET_PASS_ROUTED_V6 = f"add rule {_LINK_TABLE} egress meta protocol ip6 meta rtclassid 0 accept"
_COUNT_HAND_MADE = f'add rule {_LINK_TABLE} egress counter drop comment "hand-made"'


def can_refuse(policy: EgressPolicy, denied: Sequence[AddressRange]) -> bool:
    """Whether a policy refuses anything at all."""
    refuses = policy.default_action is DefaultAction.DENY or bool(denied)
    return refuses or any(rule.action is Action.DENY for rule in policy.rules)


@dataclass(frozen=True, slots=True)
class LogTarget:
    """Where messages of connections go.

    Attributes:
        group: of NFLOG, 0..65535.
        rate: an nft statement that matches as often as a message may be sent, all rules of a container together.
    """

    group: int
    rate: str

    def statement(self, prefix: str) -> str:
        """Tell of a packet, if the rate allows; the rule goes on either way only in a rule of its own."""
        return f'{self.rate} log prefix "{prefix}" group {self.group} snaplen {LOG_SNAP_BYTES}'


CONTAINER_LOG = LogTarget(LOG_GROUP, 'limit name "told"')


def refuse(cause: int | Cause) -> str:
    """The verdict for what a rule, by its index, or another cause refuses."""
    mark = CAUSE_MARKS[cause] if isinstance(cause, Cause) else cause + 1
    return f"meta mark set {mark:#x} goto refuse"


def refuse_chain(log: LogTarget) -> list[str]:
    """What chain `refuse` does with a packet that `refuse` has marked."""
    return [log.statement(DENY_PREFIX), *REJECT]


def compile_container_ruleset(
    policy: EgressPolicy, *, denied: Sequence[AddressRange] = (), has_ipv6: bool = False
) -> str:
    """The whole `inet garden` table of a container's namespace, as one transaction that replaces any former.

    Loopback and replies are free, IPv6 is refused to a container without an address of it, then the policy decides.
    Established connections outlive a replacement, unless it is of another generation: connection tracking belongs to
    the namespace, not to the table. Forwarding is refused: a container is no router, whatever its `ip_forward` says.

    Args:
        policy: of the container.
        denied: networks that are refused where no rule has let them through.
        has_ipv6: whether the container has an IPv6 address.

    Returns:
        nft text; `nft -f -` in the container's namespace applies it.
    """
    rules = compile_policy(policy, CONTAINER_LOG, denied=denied, has_ipv6=has_ipv6)
    body = [*_preamble(policy, has_ipv6=has_ipv6), *rules]
    lines = [
        *_guard_link(policy, denied, has_ipv6=has_ipv6),
        f"add table inet {CONTAINER_TABLE}",  # so that the delete finds one
        f"delete table inet {CONTAINER_TABLE}",
        f"table inet {CONTAINER_TABLE} {{",
        f"\tlimit told {{\n\t\t{LOG_RATE}\n\t}}",
        *chain(
            "untracked_in",
            "type filter hook prerouting priority raw; policy accept;",
            ['iifname "lo" notrack'],
        ),
        *chain(
            "untracked_out", "type filter hook output priority raw; policy accept;", ['oifname "lo" notrack']
        ),
        *chain("refuse", "", refuse_chain(CONTAINER_LOG)),
        *chain("output", "type filter hook output priority filter; policy drop;", body),
        *chain("forward", "type filter hook forward priority filter; policy drop;", []),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _guard_link(policy: EgressPolicy, denied: Sequence[AddressRange], *, has_ipv6: bool) -> list[str]:
    if not can_refuse(policy, denied):
        return _LET_PASS_HAND_MADE
    return [*_DROP_HAND_MADE, *([_LET_PASS_ROUTED_V6] if has_ipv6 else []), _COUNT_HAND_MADE]


def compile_host_side_chain(
    policy: EgressPolicy, log: LogTarget, *, denied: Sequence[AddressRange] = ()
) -> list[str]:
    """The statements of a privileged container's chain, which sees every packet that it sends.

    Always of both versions: a container that loses its IPv6 address must not get past a rule that speaks of it.
    """
    rules = compile_policy(policy, log, denied=denied, has_ipv6=True)
    return [*_accept_established(policy), *rules]


def compile_policy(
    policy: EgressPolicy, log: LogTarget, *, denied: Sequence[AddressRange] = (), has_ipv6: bool = False
) -> list[str]:
    """The statements that decide about a new connection: the rules, the denied networks, the default.

    Args:
        policy: of the container.
        log: where to tell of what is refused, and of what rules that log allow.
        denied: networks that are refused where no rule has let them through.
        has_ipv6: whether IPv6 packets get here.
    """
    versions = (4, 6) if has_ipv6 else (4,)
    accept = f"ct mark set {_mark(policy)} accept" if policy.generation else "accept"
    most = MANY_ITEMS if sum(map(_count_lists, policy.rules)) > MANY_LISTS else 0
    lines = []
    for index, rule in enumerate(policy.rules):
        lines += _rule_statements(index, rule, accept, log, versions, most)
    for addresses in match_addresses(denied, versions) if denied else []:
        parts = [addresses, "counter", refuse(Cause.DENIED_NETWORK), 'comment "denied_network"']
        lines.append(" ".join(part for part in parts if part))
    if policy.default_action is DefaultAction.ALLOW:
        lines.append(f'counter {accept} comment "default"')
    else:
        lines.append(f'counter {refuse(Cause.DEFAULT)} comment "default"')
    return lines


def chain(name: str, hook: str, body: Iterable[str]) -> list[str]:
    """A chain block inside a table block; `hook` is empty for a chain that is only jumped to."""
    return [
        f"\tchain {name} {{",
        *(f"\t\t{line}" for line in ([hook] if hook else [])),
        *(f"\t\t{b}" for b in body),
        "\t}",
    ]


def match_addresses(
    ranges: Sequence[AddressRange], versions: Sequence[int] = (4,), most: int = 0
) -> list[str]:
    """Matches, any of them, for `ranges` as far as they are of `versions`: `ip daddr ...`; empty text for any address.

    Overlapping and touching ranges are merged, since an nft interval set refuses overlaps (nft(8), SETS).

    Args:
        ranges: none: any address.
        versions: of IP that get here.
        most: lists of so many items are a match for each, longer ones a set.
    """
    if not ranges:
        return [""]
    if len(ranges) == 1 and int(ranges[0].start):  # neither to be merged nor all of a version
        own = ranges[0].start.version
        return [f"{_FAMILIES[own][0]} daddr {ranges[0]}"] if own in versions else []
    matches: list[str] = []
    of_all = 0
    for version in versions:
        family, name = _FAMILIES[version]
        merged = merge((int(r.start), int(r.end)) for r in ranges if r.start.version == version)
        if merged == [(0, _LAST[version])]:
            of_all += 1
            matches.append(f"meta nfproto {name}")
        elif merged:
            items = [_address_item(version, start, end) for start, end in merged]
            matches += [f"{family} daddr {item}" for item in _in_parts(items, most)]
    return [""] if of_all == len(versions) else matches


def _preamble(policy: EgressPolicy, *, has_ipv6: bool) -> list[str]:
    no_ipv6 = [f'meta nfproto ipv6 counter {refuse(Cause.IPV6)} comment "ipv6"']
    return [
        'oifname "lo" accept',
        *([NEIGHBOUR_TALK] if has_ipv6 else []),
        *_accept_established(policy),
        *([] if has_ipv6 else no_ipv6),
    ]


def _accept_established(policy: EgressPolicy) -> list[str]:
    """Replies to those who have connected to the container, and what this generation has let out; 0: what any has."""
    if not policy.generation:
        return [f"{_ESTABLISHED} accept"]
    return [f"{_ESTABLISHED} ct direction reply accept", f"{_ESTABLISHED} ct mark {_mark(policy)} accept"]


def _mark(policy: EgressPolicy) -> str:
    return f"{CONNECTION_MARK | policy.generation & 0xFFFF:#x}"


def _count_lists(rule: EgressRule) -> int:
    """How many sets a rule would need."""
    return (len(rule.networks) > 1) + (len(rule.ports) > FEW_PORTS)


def _rule_statements(
    index: int, rule: EgressRule, accept: str, log: LogTarget, versions: tuple[int, ...], most: int
) -> list[str]:
    # Without networks of a version that gets here there is nothing to match: no statements.
    allows = rule.action is Action.ALLOW
    verdict = accept if allows else refuse(index)
    lines = []
    for match in _matches(rule, versions, most):
        if rule.log and allows:
            # A rule of its own: a limit that is passed ends a rule without its verdict.
            told = log.statement(ALLOW_PREFIX + str(index))
            lines.append(f"ct state new {match} {told}".replace("  ", " "))
        lines.append(f'{match} counter {verdict} comment "rule {index}"'.lstrip())
    return lines


@remembered(lambda rule, versions, most: rule.is_short)
def _matches(rule: EgressRule, versions: tuple[int, ...], most: int) -> tuple[str, ...]:
    if rule.protocol is not Protocol.ICMP:
        protocols = _match_protocol(rule, most)
        found = match_addresses(rule.networks, versions, most // len(protocols))
        return tuple(_join(addresses, protocol) for addresses in found for protocol in protocols)
    matches: list[str] = []
    for version in versions:  # each has a protocol of its own, with types of its own
        icmp = _match_icmp(rule, version)
        matches += [_join(addresses, icmp) for addresses in match_addresses(rule.networks, (version,), most)]
    return tuple(matches)


def _match_protocol(rule: EgressRule, most: int) -> list[str]:
    """Matches, any of them."""
    if rule.protocol is Protocol.ALL:
        return [""]
    if not rule.ports:
        return [f"meta l4proto {rule.protocol.value}"]
    merged = merge((p.start, p.end) for p in rule.ports)
    items = [str(start) if start == end else f"{start}-{end}" for start, end in merged]
    return [f"{rule.protocol.value} dport {item}" for item in _in_parts(items, max(FEW_PORTS, most))]


def _match_icmp(rule: EgressRule, version: int) -> str:
    name = "icmp" if version == 4 else "icmpv6"
    if rule.icmp is None:
        return f"meta l4proto {name}"
    code = "" if rule.icmp.code is None else f" {name} code {rule.icmp.code}"
    return f"{name} type {rule.icmp.type}{code}"


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _address_item(version: int, start: int, end: int) -> str:
    kind = IPv4Address if version == 4 else IPv6Address
    return str(AddressRange(kind(start), kind(end)))


def merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges sorted, with overlapping and touching ones made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _in_parts(items: list[str], most: int) -> list[str]:
    """A few items as they are (a plain comparison is cheaper than a set lookup), several as one anonymous set."""
    return items if len(items) <= max(1, most) else [f"{{ {', '.join(items)} }}"]
