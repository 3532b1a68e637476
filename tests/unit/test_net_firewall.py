"""What the compiler must get right for any policy; the exact texts are in tests/golden."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.agent.nft import read_counters
from garden_py.backend.net.firewall import (
    CONTAINER_LOG,
    MANY_LISTS,
    compile_container_ruleset,
    compile_policy,
    match_addresses,
)
from garden_py.model.netrule import (
    AddressRange,
    DefaultAction,
    EgressPolicy,
    EgressRule,
    PortRange,
    Protocol,
    parse_egress_rule,
)

CLOSED = compile_container_ruleset(EgressPolicy(DefaultAction.DENY))
SMALL = st.integers(0, 40)


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=6), st.sampled_from([4, 6]))
def test_merged_ranges_match_the_same_addresses(pairs: list[tuple[int, int]], version: int) -> None:
    """Overlapping intervals are refused by nft; merging must not change what matches."""
    kind = IPv4Address if version == 4 else IPv6Address
    ranges = [AddressRange(kind(min(p)), kind(max(p))) for p in pairs]
    (text,) = match_addresses(ranges, (4, 6))
    wanted = {n for low, high in map(sorted, pairs) for n in range(low, high + 1)}
    items = text.removeprefix("ip daddr ").removeprefix("ip6 daddr ").strip("{} ").split(", ")
    parsed = [AddressRange.parse(item) for item in items]
    matched = [n for r in parsed for n in range(int(r.start), int(r.end) + 1)]
    assert sorted(matched) == sorted(wanted)


def test_ipv6_only_rules_match_nothing_rather_than_everything() -> None:
    """An empty address match would turn a rule for one IPv6 network into one for the whole internet."""
    policy = EgressPolicy(DefaultAction.DENY, (parse_egress_rule("all:[::/0]"),))
    assert compile_container_ruleset(policy) == CLOSED


def test_all_of_one_version_is_not_all() -> None:
    """0.0.0.0/0 is every address only where there is no other version."""
    everything = [AddressRange.parse("0.0.0.0/0")]
    assert match_addresses(everything) == [""]
    assert match_addresses(everything, (4, 6)) == ["meta nfproto ipv4"]
    assert match_addresses([*everything, AddressRange.parse("::/0")], (4, 6)) == [""]
    assert match_addresses([AddressRange.parse("2001:db8::/32")], (4, 6)) == ["ip6 daddr 2001:db8::/32"]
    assert match_addresses([AddressRange.parse("::/0")]) == []


def test_rules_keep_the_callers_order() -> None:
    """The first match decides, so order is meaning."""
    rules = tuple(parse_egress_rule(f"{'deny ' if i % 2 else ''}tcp:*:{99 - i}") for i in range(50))
    text = compile_container_ruleset(EgressPolicy(DefaultAction.DENY, rules))
    positions = [text.index(f'"rule {i}"') for i in range(50)]
    assert positions == sorted(positions)


def test_counters_are_read_by_comment_and_summed() -> None:
    """Rules without comment are ours alone; a caller's rule may be several nft rules."""
    counter = {"counter": {"packets": 2, "bytes": 120}}
    objects: list[dict[str, Any]] = [
        {"table": {"name": "garden"}},
        {"rule": {"expr": [counter]}},
        {"rule": {"expr": [counter, {"accept": None}], "comment": "rule 3"}},
        {"rule": {"expr": [counter], "comment": "rule 3"}},
        {"rule": {"expr": [counter], "comment": "default"}},
    ]
    assert read_counters(objects) == [
        {"rule": 3, "packets": 4, "bytes": 240},
        {"rule": "default", "packets": 2, "bytes": 120},
    ]


def listed(networks: int, ports: int) -> EgressRule:
    """A rule with lists of so many items."""
    return EgressRule(
        Protocol.TCP,
        tuple(AddressRange.parse(f"10.0.{2 * number}.0/24") for number in range(networks)),
        tuple(PortRange(2 * number + 1, 2 * number + 1) for number in range(ports)),
    )


@pytest.mark.parametrize(
    ("networks", "ports", "statements", "sets"),
    [(2, 5, 10, 0), (1, 64, 64, 0), (64, 1, 64, 0), (33, 2, 2, 2), (2, 65, 2, 2), (65, 65, 1, 2)],
)
def test_a_policy_of_many_lists_has_statements_in_place_of_sets(
    networks: int, ports: int, statements: int, sets: int
) -> None:
    """The kernel takes seconds for thousands of sets. What would be too many statements is a set all the same."""
    rules = (listed(networks, ports), *(listed(2, 1) for _ in range(MANY_LISTS)))
    lines = compile_policy(EgressPolicy(rules=rules), CONTAINER_LOG)
    first = [line for line in lines if line.endswith('comment "rule 0"')]
    assert (len(first), sum(line.count("{") for line in first)) == (statements, sets)
    assert len(set(first)) == len(first)
    assert not any("{" in line for line in lines if line not in first)


def test_a_policy_of_few_lists_has_sets() -> None:
    """One lookup costs a packet less than several comparisons."""
    rules = tuple(listed(2, 5) for _ in range(MANY_LISTS // 2))
    lines = compile_policy(EgressPolicy(rules=rules), CONTAINER_LOG)
    assert len(lines) == len(rules) + 1
    assert all(line.count("{") == 2 for line in lines[:-1])
