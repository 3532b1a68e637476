"""Egress rules as values: what is refused, with which field, and the text form's round trip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.policies import egress_rules

from garden_py.model.errors import InvalidField
from garden_py.model.netrule import (
    MAX_RULES,
    AddressRange,
    Cause,
    Decision,
    Destination,
    EgressPolicy,
    EgressRule,
    IcmpMatch,
    PortRange,
    Protocol,
    RuleAction,
    at_field,
    decide,
    format_egress_rule,
    parse_egress_rule,
)
from garden_py.service.containers import egress_etag


@given(egress_rules())
def test_text_form_is_read_back_as_the_same_rule(rule: EgressRule) -> None:
    """The command line shows rules in the form in which it takes them."""
    assert parse_egress_rule(format_egress_rule(rule)) == rule


@given(st.text(alphabet="tcpudmialeny log:0123456789./-,*[]", max_size=40))
def test_any_text_is_a_rule_or_an_invalid_field(text: str) -> None:
    """A typing error is the caller's and must be told as such."""
    with contextlib.suppress(InvalidField):
        assert parse_egress_rule(format_egress_rule(parse_egress_rule(text)))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tcp:10.0.0.0/8:80,443-445", "tcp:10.0.0.0/8:80,443-445"),
        ("icmp:1.2.3.4:8/0", "icmp:1.2.3.4:8/0"),
        ("deny  all:169.254.169.254  log", "deny all:169.254.169.254 log"),
        ("udp:*:53", "udp:*:53"),
        ("udp::53", "udp:*:53"),
        ("all:*", "all"),
        ("tcp:10.0.0.0-10.255.255.255", "tcp:10.0.0.0/8"),
        ("tcp:[2001:db8::/32],10.0.0.1:443", "tcp:[2001:db8::/32],10.0.0.1:443"),
    ],
)
def test_rules_have_one_shortest_form(text: str, canonical: str) -> None:
    """Two spellings of a rule are shown alike."""
    assert format_egress_rule(parse_egress_rule(text)) == canonical


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "protocol"),
        ("sctp", "protocol"),
        ("tcp 10.0.0.0/8", "protocol"),
        ("tcp:1.2.3.4:80:90", "protocol"),
        ("tcp:2001:db8::1:80", "protocol"),
        ("tcp:10.0.0.1/8", "networks[0].start"),
        ("tcp:10.0.0.0/8,nonsense", "networks[1].start"),
        ("tcp:10.0.0.9-10.0.0.1", "networks[0].end"),
        ("tcp:[10.0.0.1-::1]", "networks[0].end"),
        ("tcp:*:0", "ports[0].start"),
        ("tcp:*:80,70000", "ports[1].start"),
        ("tcp:*:90-80", "ports[0].end"),
        ("tcp:*:https", "ports[0].start"),
        ("all:*:80", "ports"),
        ("icmp:*:256", "icmp.type"),
        ("icmp:*:8/999", "icmp.code"),
        ("icmp:*:echo", "icmp.type"),
    ],
)
def test_bad_rules_name_the_field(text: str, field: str) -> None:
    """Promise 7: a clear typed error that names the field."""
    with pytest.raises(InvalidField) as caught:
        parse_egress_rule(text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: EgressRule(Protocol.ALL, ports=(PortRange(1, 2),)), "ports"),
        (lambda: EgressRule(Protocol.ICMP, ports=(PortRange(1, 2),)), "ports"),
        (lambda: EgressRule(Protocol.TCP, icmp=IcmpMatch(8)), "icmp"),
        (lambda: EgressPolicy(rules=(EgressRule(Protocol.ALL),) * (MAX_RULES + 1)), "rules"),
    ],
)
def test_combinations_without_meaning_are_refused(build: Callable[[], object], field: str) -> None:
    """A rule that says two things at once would be read differently by its author and by the kernel."""
    with pytest.raises(InvalidField) as caught:
        build()
    assert caught.value.field == field


def test_fields_are_paths_from_the_request() -> None:
    """A caller with 3,000 rules must find the bad one."""
    with pytest.raises(InvalidField) as caught, at_field("rules[3]"), at_field("ports[0]"):
        PortRange(80, 70000)
    assert caught.value.field == "rules[3].ports[0].end"
    assert "70000" in caught.value.problem


@pytest.mark.parametrize(
    ("protocol", "text", "shown"),
    [
        ("tcp", "10.0.0.5:443", "tcp 10.0.0.5:443"),
        ("udp", "[2001:db8::5]:53", "udp [2001:db8::5]:53"),
        ("icmp", "10.0.0.5", "icmp 10.0.0.5:8/0"),
        ("icmp", "10.0.0.5:3/1", "icmp 10.0.0.5:3/1"),
        ("all", "10.0.0.5", "all 10.0.0.5"),
        ("icmp", "fd00:51::2", "icmp [fd00:51::2]:128/0"),
        ("icmp", "[fd00:51::2]:1/4", "icmp [fd00:51::2]:1/4"),
        ("all", "fd00:51::2", "all [fd00:51::2]"),
    ],
)
def test_destinations_are_read_as_written(protocol: str, text: str, shown: str) -> None:
    """As on a command line."""
    assert str(Destination.parse(protocol, text)) == shown


@pytest.mark.parametrize(
    ("protocol", "text", "field"),
    [
        ("sctp", "10.0.0.5:1", "protocol"),
        ("tcp", "10.0.0.5", "port"),
        ("tcp", "10.0.0.5:0", "port"),
        ("tcp", "10.0.0.5:http", "port"),
        ("tcp", "example.org:80", "address"),
        ("tcp", "2001:db8::5", "address"),
        ("all", "10.0.0.5:80", "port"),
        ("icmp", "10.0.0.5:echo", "icmp.type"),
    ],
)
def test_bad_destinations_name_the_part(protocol: str, text: str, field: str) -> None:
    """And nothing is guessed."""
    with pytest.raises(InvalidField) as caught:
        Destination.parse(protocol, text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("protocol", "text"), [("tcp", "fd00:51::2"), ("udp", "fd00:51::2:53"), ("icmp", "fd00:51::2:1/4")]
)
def test_ipv6_with_more_behind_it_is_written_in_brackets(protocol: str, text: str) -> None:
    """Where the address ends could not be told."""
    with pytest.raises(InvalidField, match="write IPv6 in brackets"):
        Destination.parse(protocol, text)


@pytest.mark.parametrize(
    ("destination", "decision"),
    [
        ("tcp 10.0.0.5:443", Decision(RuleAction.DENY, Cause.RULE, 0)),
        ("tcp 10.0.0.6:443", Decision(RuleAction.ALLOW, Cause.RULE, 1)),
        ("tcp 10.0.0.6:81", Decision(RuleAction.DENY, Cause.DENIED_NETWORK)),
        ("udp 10.0.0.6:443", Decision(RuleAction.DENY, Cause.DENIED_NETWORK)),
        ("icmp 10.0.0.6:3/1", Decision(RuleAction.ALLOW, Cause.RULE, 2)),
        ("icmp 10.0.0.6:3/2", Decision(RuleAction.DENY, Cause.DENIED_NETWORK)),
        ("icmp 192.0.2.1:8/0", Decision(RuleAction.ALLOW, Cause.RULE, 3)),
        ("all 192.0.2.1", Decision(RuleAction.ALLOW, Cause.DEFAULT)),
        ("all 198.51.100.7", Decision(RuleAction.DENY, Cause.RULE, 4)),
        ("tcp [2001:db8::5]:443", Decision(RuleAction.ALLOW, Cause.RULE, 5)),
    ],
)
def test_the_first_match_then_denied_networks_then_the_default(destination: str, decision: Decision) -> None:
    """As the compiled rules have it, which tests on real containers compare."""
    texts = (
        "deny all:10.0.0.1-10.0.0.5", "tcp:10.0.0.0/24:80,443", "icmp:*:3/1", "icmp:192.0.2.0/24:8",
        "deny all:198.51.100.0/24", "tcp:[2001:db8::/32]",
    )  # fmt: skip
    policy = EgressPolicy(rules=tuple(map(parse_egress_rule, texts)))
    asked = Destination.parse(*destination.split(" "))
    assert decide(policy, asked, (AddressRange.parse("10.0.0.0/8"),)) == decision


@given(st.text("0123456789./- \n%١", max_size=20) | st.from_regex(r"[0-9.]{7,15}/[0-9]{1,3}", fullmatch=True))
def test_what_is_read_quickly_is_read_as_ipaddress_reads_it(text: str) -> None:
    """The short way for plain IPv4 takes nothing that the long way refuses, and means the same."""
    try:
        network = ip_network(text)
    except ValueError:
        network = None
    with contextlib.suppress(InvalidField):
        found = AddressRange.parse(text)
        if "-" not in text:
            assert network is not None or text != text.strip()
            expected = ip_network(text.strip())
            assert (found.start, found.end) == (expected[0], expected[-1])
        return
    assert network is None or "%" in text


@given(st.lists(egress_rules(), max_size=4), st.lists(egress_rules(), max_size=4))
def test_etags_of_different_policies_differ(first: list[EgressRule], second: list[EgressRule]) -> None:
    """Two writers who see one etag see one policy."""
    one, other = (EgressPolicy(rules=tuple(rules)) for rules in (first, second))
    assert (egress_etag(one) == egress_etag(other)) is (one == other)


@pytest.mark.parametrize("text", ["fe80::1%eth0", "fe80::1%x]\ndeny tcp:[fe80::2", "::ffff:10.0.0.0/104"])
def test_what_no_packet_has_is_refused(text: str) -> None:
    """A scope means something on one host only; a rule for IPv4 in the clothes of IPv6 would never match."""
    with pytest.raises(InvalidField):
        AddressRange.parse(text)


def test_ipv4_written_as_ipv6_is_ipv4() -> None:
    """A connection to ::ffff:10.0.0.1 leaves as IPv4, and is judged as such."""
    assert AddressRange.parse("::ffff:10.0.0.1") == AddressRange.parse("10.0.0.1")
    assert Destination.parse("tcp", "[::ffff:10.0.0.1]:80") == Destination.parse("tcp", "10.0.0.1:80")
