"""nft text as messages. That they mean the same to the kernel is shown by tests/root/test_nftables.py."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.policies import egress_policies

from garden_py.agent.nft import NftError
from garden_py.agent.rtnetlink import NLM_F_ACK, parse_attributes, split_messages
from garden_py.backend.net import nft_messages as m
from garden_py.backend.net.firewall import compile_container_ruleset
from garden_py.backend.net.nftables import UnknownText, encode
from garden_py.backend.net.rule_socket import RuleSockets
from garden_py.model.netrule import AddressRange, DefaultAction, EgressPolicy, EgressRule, Protocol

GOLDEN = Path(__file__).parent.parent / "golden" / "firewall"
CLOSED = compile_container_ruleset(EgressPolicy(DefaultAction.DENY))


@given(egress_policies(), st.booleans())
def test_every_policy_can_be_said(policy: EgressPolicy, has_ipv6: bool) -> None:
    """A word that is unknown here would keep a container from getting a policy that was accepted."""
    text = compile_container_ruleset(policy, has_ipv6=has_ipv6)
    transaction = encode(text)
    sent = list(split_messages(transaction.batch))
    assert [number for _, _, number, _ in sent] == list(range(len(transaction.lines) + 2))
    assert (sent[0][0], sent[-1][0]) == (m.BATCH_BEGIN, m.BATCH_END)
    assert [number for _, flags, number, _ in sent if flags & NLM_F_ACK] == [len(transaction.lines)]


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("container_*.nft")))
def test_golden_rulesets_can_be_said(name: str) -> None:
    """Whoever adds a statement to the compiler learns here that it has to be added in a second place."""
    assert encode((GOLDEN / name).read_text()).lines


@pytest.mark.parametrize(
    "line",
    [
        "add rule inet garden output tcp sport 80 accept",
        "add rule inet garden output tcp dport http accept",
        "add rule inet garden output tcp dport 65536 accept",
        "add rule inet garden output tcp dport { 80",
        "add rule inet garden output ip daddr 10.0.0.1/8 accept",
        "add rule inet garden output ip daddr 0.0.0.0/0 accept",
        "add rule inet garden output ip saddr 10.0.0.1 accept",
        "add rule inet garden output meta mark 1 accept",
        "add rule inet garden output ct state foreign accept",
        'add rule inet garden output oifname "eth*" accept',
        "add rule inet garden output log accept",
        "add rule inet garden output goto",
        "add rule inet garden output update @told { iifname limit rate 10/minute burst 20 packets }",
        "add rule inet garden output accept comment none",
        "add rule ip garden output accept",
        "add chain inet garden output { type filter hook output priority filter; policy drop; device }",
        "add chain inet garden output { type filter hook elsewhere priority filter; policy drop; }",
        "delete chain inet garden output",
        "table inet garden {",
        "}",
        "flush ruleset",
    ],
)
def test_what_is_not_known_is_refused(line: str) -> None:
    """Nothing that was said may be left out: a rule would let through what it should not."""
    with pytest.raises(UnknownText, match=r"."):
        encode(f"{CLOSED}{line}\n")


def test_an_unknown_line_is_told_like_any_other_refusal() -> None:
    """And no socket is opened for it."""
    with pytest.raises(NftError, match="flush ruleset"):
        RuleSockets().run("flush ruleset\n")


def test_long_lists_are_cut_where_an_attribute_ends() -> None:
    """Its length is a number of 16 bits."""
    networks = tuple(AddressRange.parse(f"10.{n >> 7}.{2 * (n & 127)}.0/24") for n in range(4000))
    rule = EgressRule(Protocol.ALL, networks)
    transaction = encode(compile_container_ruleset(EgressPolicy(DefaultAction.DENY, (rule,))))
    found = 0
    for kind, _flags, _number, payload in split_messages(transaction.batch):
        if kind == m.SUBSYSTEM << 8 | m.NEWSETELEM:
            lists = dict(parse_attributes(payload[4:]))[3]
            assert struct.pack("=H", len(lists))
            found += len(list(parse_attributes(lists)))
    assert found == 2 * len(networks) + 1  # where each begins and ends, and before the first


def test_refusals_are_found_by_their_number() -> None:
    """The kernel names the message that it does not like; the log has to show the rule."""
    text = CLOSED + "add rule inet garden output accept\n"
    assert encode(text).lines[-1] == "add rule inet garden output accept"
