"""Messages of NFLOG and the packets in them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.backend.linux.connections import can_tell, read_decision
from garden_py.backend.net.firewall import CAUSE_MARKS
from garden_py.backend.net.nflog import LoggedPacket, parse_flow, parse_messages
from garden_py.model.connection import Flow
from garden_py.model.netrule import (
    AddressRange,
    Cause,
    Decision,
    DefaultAction,
    EgressPolicy,
    RuleAction,
    parse_egress_rule,
)

ALLOW, DENY = RuleAction.ALLOW, RuleAction.DENY


def attribute(kind: int, data: bytes) -> bytes:
    return (struct.pack("=HH", 4 + len(data), kind) + data).ljust(4 + len(data) + 3 & ~3, b"\0")


def message(kind: int, body: bytes) -> bytes:
    whole = struct.pack("=IHHII", 20 + len(body), kind, 0, 0, 0) + bytes(4) + body
    return whole.ljust(len(whole) + 3 & ~3, b"\0")


def ipv4(protocol: int, behind: bytes, *, fragment: int = 0, words: int = 5) -> bytes:
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x40 | words, 0, 0, 0, fragment, 64, protocol, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
    )
    return head + bytes(4 * (words - 5)) + behind


def test_messages_are_taken_apart() -> None:
    """Several in one datagram, the attributes in any order, others left out."""
    packet = (
        attribute(10, b"garden deny\0")
        + attribute(2, b"\0\0\0\7")
        + attribute(9, b"payload")
        + attribute(99, b"x")
    )
    data = message(0x400, packet) + message(3, b"") + message(0x400, attribute(4, b"\0\0\0\5"))
    assert parse_messages(data) == [
        LoggedPacket("garden deny", 7, 0, b"payload"),
        LoggedPacket("", 0, 5, b""),
    ]


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parsers_fail(data: bytes) -> None:
    """What a packet holds is the container's choice."""
    parse_messages(data)
    parse_messages(message(0x400, data))
    parse_flow(data)
    parse_flow(b"\x45" + data)
    parse_flow(b"\x60" + data)


@pytest.mark.parametrize(
    ("packet", "flow"),
    [
        (ipv4(6, b"\x80\x01\x01\xbb" + bytes(16)), Flow("tcp", "10.0.0.1", "10.0.0.2", 0x8001, 443)),
        (ipv4(17, b"\x80\x01\x00\x35", words=8), Flow("udp", "10.0.0.1", "10.0.0.2", 0x8001, 53)),
        (ipv4(1, b"\x08\x00"), Flow("icmp", "10.0.0.1", "10.0.0.2", icmp="8/0")),
        (ipv4(47, b"\x08\x00\x08\x00"), Flow("47", "10.0.0.1", "10.0.0.2")),
        (ipv4(6, b"\x80\x01\x01\xbb", fragment=7), Flow("tcp", "10.0.0.1", "10.0.0.2")),
        (ipv4(6, b"\x80"), Flow("tcp", "10.0.0.1", "10.0.0.2")),
        (
            b"\x60" + bytes(5) + b"\x11\x40" + bytes(15) + b"\1" + bytes(15) + b"\2" + b"\0\1\0\2",
            Flow("udp", "::1", "::2", 1, 2),
        ),
        (b"", None),
        (b"\x45" + bytes(10), None),
        (b"\x20" + bytes(60), None),
    ],
)
def test_headers_are_read(packet: bytes, flow: Flow | None) -> None:
    """Options, later fragments, cut packets, both families."""
    assert parse_flow(packet) == flow


def test_what_decided_is_in_prefix_and_mark() -> None:
    """The inverse of what the compiler writes."""
    assert read_decision(LoggedPacket("garden allow 12", 0, 0, b"")) == Decision(ALLOW, Cause.RULE, 12)
    assert read_decision(LoggedPacket("garden deny", 1, 0, b"")) == Decision(DENY, Cause.RULE, 0)
    for cause, mark in CAUSE_MARKS.items():
        assert read_decision(LoggedPacket("garden deny", mark, 0, b"")) == Decision(DENY, cause)
    assert read_decision(LoggedPacket("somebody else's", 0, 0, b"")) is None
    assert read_decision(LoggedPacket("garden allow x", 0, 0, b"")) is None


@pytest.mark.parametrize(
    ("default", "rules", "denied", "tells"),
    [
        (DefaultAction.ALLOW, (), (), False),
        (DefaultAction.ALLOW, ("tcp:10.0.0.1:80",), (), False),
        (DefaultAction.ALLOW, ("tcp:10.0.0.1:80 log",), (), True),
        (DefaultAction.ALLOW, ("deny tcp",), (), True),
        (DefaultAction.ALLOW, (), ("10.0.0.0/8",), True),
        (DefaultAction.DENY, (), (), True),
    ],
)
def test_only_what_can_tell_is_listened_to(
    default: DefaultAction, rules: tuple[str, ...], denied: tuple[str, ...], tells: bool
) -> None:
    """An open container costs no descriptor."""
    policy = EgressPolicy(default, tuple(map(parse_egress_rule, rules)))
    assert can_tell(policy, tuple(map(AddressRange.parse, denied))) is tells
