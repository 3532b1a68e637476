"""Messages of nf_tables and what is in them, as bytes. Pure.

A rule is a list of expressions that share a register: one loads a field, the next compares it and ends the rule if it
differs. What repeats from rule to rule is made once.

Source: linux/netfilter/nf_tables.h, whose names the numbers have here without NFTA_ and NFT_;
linux/netfilter/nfnetlink.h; `nft --debug=netlink` shows the expressions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from garden_py.agent.rtnetlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST

SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
BATCH_BEGIN, BATCH_END = 16, 17  # NFNL_MSG_BATCH_*
NEWTABLE, DELTABLE, NEWCHAIN, NEWRULE, DELRULE, NEWSET, NEWSETELEM, NEWOBJ = 0, 2, 3, 6, 8, 9, 12, 18
FAMILIES = {"inet": 1, "netdev": 5}  # NFPROTO_*
HOOKS = {
    "inet": {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4},  # NF_INET_*
    "netdev": {"ingress": 0, "egress": 1},  # NF_NETDEV_*
}
META = {"protocol": 1, "mark": 3, "iifname": 6, "oifname": 7, "rtclassid": 13, "nfproto": 15, "l4proto": 16}
CT = {"state": 0, "direction": 1, "mark": 3}
CT_STATES = {"established": 2, "related": 4, "new": 8}  # NF_CT_STATE_BIT
CT_DIRECTIONS = {"original": 0, "reply": 1}
ACCEPT, DROP, GOTO = 1, 0, -4
EQUAL, NOT_EQUAL, AT_MOST, AT_LEAST = 0, 1, 3, 5  # CMP_*
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
REJECT_TCP_RESET, REJECT_ICMPX_ADMIN_PROHIBITED = (1, 0), (2, 3)

_NLM_F_APPEND = 0x800  # linux/netlink.h
_NESTED = 0x8000  # NLA_F_NESTED
_LIST_ELEM = 1
_SECOND = 1  # the unit of a rate
_LIMIT_OBJECT = 4  # OBJECT_LIMIT
_ANONYMOUS_CONSTANT, _INTERVAL = 1 | 2, 4  # SET_*
_INTERVAL_END = 1  # SET_ELEM_INTERVAL_END
_ELEMENTS_AT_ONCE = 1000  # an attribute has at most 64 KiB, and an element up to 44 bytes
_DYNSET_UPDATE = 1  # DYNSET_OP_UPDATE
_REGISTER = struct.pack(">I", 1)  # REG_1
_HEADER = struct.Struct("=IHHIIBBBB")  # nlmsghdr, nfgenmsg, whose last number is big endian
_ATTRIBUTE = struct.Struct("=HH")
_PADDING = (b"", bytes(3), bytes(2), bytes(1))
# What libnftables notes for itself, to list a set as it was said (NFTNL_UDATA_SET_*): big endian keys, merged ranges.
_SET_NOTE = bytes([0, 4]) + struct.pack("=I", 2)
_INTERVALS_NOTE = _SET_NOTE + bytes([2, 4]) + struct.pack("=I", 1)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a transaction, without its number.

    Attributes:
        kind: NEWTABLE ...
        family: one of FAMILIES.
        body: attributes.
    """

    kind: int
    family: int
    body: bytes


@dataclass(frozen=True, slots=True)
class AnonymousSet:
    """A set that a rule looks into, known by its number within the transaction.

    Attributes:
        place: of the expression in its rule that looks into it.
        definition: attributes of its NEWSET, without table and number.
        elements: attributes with all that is in it, one for each NEWSETELEM.
    """

    place: int
    definition: bytes
    elements: tuple[bytes, ...]


# --- messages


def batch(messages: Sequence[Message]) -> bytes:
    """All of them as one transaction; numbered from 1, and the kernel acknowledges the last."""
    last = len(messages)
    parts = [_pack(BATCH_BEGIN, 0, 0, 0, b"", SUBSYSTEM)]
    for number, each in enumerate(messages, 1):
        flags = _FLAGS[each.kind] | (NLM_F_ACK if number == last else 0)
        parts.append(_pack(SUBSYSTEM << 8 | each.kind, flags, number, each.family, each.body))
    parts.append(_pack(BATCH_END, 0, last + 1, 0, b"", SUBSYSTEM))
    return b"".join(parts)


_FLAGS = {
    **dict.fromkeys((NEWTABLE, NEWCHAIN, NEWSET, NEWSETELEM, NEWOBJ), NLM_F_CREATE),
    NEWRULE: NLM_F_CREATE | _NLM_F_APPEND,
    **dict.fromkeys((DELTABLE, DELRULE), 0),
}


def _pack(kind: int, flags: int, number: int, family: int, body: bytes, resource: int = 0) -> bytes:
    head = _HEADER.pack(20 + len(body), kind, flags | NLM_F_REQUEST, number, 0, family, 0, 0, resource)
    return head + body


def new_table(name: str) -> bytes:
    """Body of NEWTABLE."""
    return _text(1, name) + _number(2, 0)


def table(name: str) -> bytes:
    """Body of DELTABLE."""
    return _text(1, name)


def new_chain(table: str, name: str, hook: bytes) -> bytes:
    """Body of NEWCHAIN; one that is there already keeps its rules."""
    return _text(1, table) + _text(3, name) + hook


def chain_name(table: str, name: str) -> bytes:
    """Body of GETCHAIN."""
    return _text(1, table) + _text(3, name)


def hook(kind: str, number: int, priority: int, policy: int, device: str) -> bytes:
    """What makes a chain a base chain; `device` is empty but for netdev."""
    place = _number(1, number) + _attribute(2, struct.pack(">i", priority))
    place += _text(3, device) if device else b""
    return _text(7, kind) + _number(5, policy) + _nested(4, place)


def rules_of(table: str, chain: str) -> bytes:
    """Body of DELRULE: all of a chain; and how NEWRULE begins."""
    return _text(1, table) + _text(2, chain)


def rule(table: str, chain: str, expressions: Sequence[bytes], comment: str) -> bytes:
    """Body of NEWRULE."""
    body = rules_of(table, chain) + _nested(4, b"".join(expressions))
    if not comment:
        return body
    text = comment.encode() + b"\0"
    return body + _attribute(7, bytes([0, len(text)]) + text)  # NFTNL_UDATA_RULE_COMMENT


def limit_object(table: str, name: str, per_second: int, burst: int) -> bytes:
    """Body of NEWOBJ."""
    named = _text(1, table) + _text(2, name) + _number(3, _LIMIT_OBJECT)
    return named + _nested(4, _limit(per_second, burst))


def new_set(table: str, each: AnonymousSet, number: int) -> bytes:
    """Body of NEWSET."""
    return _text(1, table) + each.definition + _number(10, number)


def set_elements(table: str, elements: bytes, number: int) -> bytes:
    """Body of NEWSETELEM."""
    return _text(1, table) + _text(2, _SET_NAME) + _number(4, number) + elements


_SET_NAME = "__set%d"  # the kernel puts a number in


def build_set(place: int, key_type: int, key_bytes: int, ranges: Sequence[tuple[int, int]]) -> AnonymousSet:
    """A set of keys; or of intervals: where each begins, and where what is behind it does.

    Args:
        place: see AnonymousSet.
        key_type: number in libnftables' list (include/datatype.h), by which the set is listed.
        key_bytes: length of a key.
        ranges: ascending, first and last key of each, neither overlapping nor touching.
    """
    has_intervals = any(start != end for start, end in ranges)
    flags = _ANONYMOUS_CONSTANT | (_INTERVAL if has_intervals else 0)
    keys = _number(4, key_type) + _number(5, key_bytes) + _nested(9, _number(1, len(ranges)))
    note = _attribute(13, _INTERVALS_NOTE if has_intervals else _SET_NOTE)
    elements = []
    if has_intervals and ranges[0][0]:
        elements.append(_element(bytes(key_bytes), _INTERVAL_END))
    for start, end in ranges:
        elements.append(_element(start.to_bytes(key_bytes), 0))
        if has_intervals and end + 1 < 1 << 8 * key_bytes:
            elements.append(_element((end + 1).to_bytes(key_bytes), _INTERVAL_END))
    parts = [elements[i : i + _ELEMENTS_AT_ONCE] for i in range(0, len(elements), _ELEMENTS_AT_ONCE)]
    definition = _text(2, _SET_NAME) + _number(3, flags) + keys + note
    return AnonymousSet(place, definition, tuple(_nested(3, b"".join(part)) for part in parts))


def _element(key: bytes, flags: int) -> bytes:
    flagged = _number(3, flags) if flags else b""
    return _nested(_LIST_ELEM, flagged + _nested(1, _attribute(1, key)))


# --- expressions


@cache
def load_payload(base: int, offset: int, size: int) -> bytes:
    """Bytes of a header."""
    place = _number(2, base) + _number(3, offset) + _number(4, size)
    return _expression("payload", _attribute(1, _REGISTER) + place)


@cache
def load_meta(key: str) -> bytes:
    """Something that the kernel knows of the packet."""
    return _expression("meta", _number(2, META[key]) + _attribute(1, _REGISTER))


@cache
def store_meta(key: str) -> bytes:
    """The inverse."""
    return _expression("meta", _number(2, META[key]) + _attribute(3, _REGISTER))


@cache
def load_ct(key: str) -> bytes:
    """Something that the kernel knows of its connection."""
    return _expression("ct", _number(2, CT[key]) + _attribute(1, _REGISTER))


@cache
def store_ct(key: str) -> bytes:
    """The inverse."""
    return _expression("ct", _number(2, CT[key]) + _attribute(4, _REGISTER))


def load_constant(value: bytes) -> bytes:
    """A value of the rule's."""
    return _expression("immediate", _attribute(1, _REGISTER) + _nested(2, _attribute(1, value)))


@lru_cache(maxsize=512)
def compare(operator: int, value: bytes) -> bytes:
    """End the rule unless what has been loaded is so."""
    body = _attribute(1, _REGISTER) + _number(2, operator) + _nested(3, _attribute(1, value))
    return _expression("cmp", body)


@cache
def mask(bits: bytes) -> bytes:
    """Clear the other bits."""
    registers = _attribute(1, _REGISTER) + _attribute(2, _REGISTER) + _number(3, len(bits))
    values = _nested(4, _attribute(1, bits)) + _nested(5, _attribute(1, bytes(len(bits))))
    return _expression("bitwise", registers + values)


def look_up(number: int) -> bytes:
    """End the rule unless what has been loaded is in a set."""
    return _LOOKUP + number.to_bytes(4)


def decide(code: int, chain: str = "") -> bytes:
    """A verdict; `chain` is where GOTO goes."""
    verdict = _attribute(1, struct.pack(">i", code)) + (_text(2, chain) if chain else b"")
    return _expression("immediate", _number(1, 0) + _nested(2, _nested(2, verdict)))


def reject(kind: int, code: int) -> bytes:
    """Drop, and say so: REJECT_*."""
    return _expression("reject", _number(1, kind) + _attribute(2, bytes([code])))


def log(prefix: str, group: int, snap_bytes: int) -> bytes:
    """Tell a group of NFLOG."""
    to = _attribute(1, struct.pack(">H", group)) + _number(3, snap_bytes)
    return _expression("log", _text(2, prefix) + to)


def use_limit(name: str) -> bytes:
    """End the rule if an object's limit is passed."""
    return _expression("objref", _number(1, _LIMIT_OBJECT) + _attribute(2, name.encode()))


def limit_each(set_name: str, per_second: int, burst: int) -> bytes:
    """End the rule if the limit of what has been loaded is passed; a named set has one for each key."""
    limit = _attribute(1, b"limit\0") + _nested(2, _limit(per_second, burst))
    use = _number(3, _DYNSET_UPDATE) + _attribute(4, _REGISTER)
    return _expression("dynset", _text(1, set_name) + use + _nested(7, limit))


def _limit(per_second: int, burst: int) -> bytes:
    rate = _attribute(1, struct.pack(">Q", per_second)) + _attribute(2, struct.pack(">Q", _SECOND))
    return rate + _number(3, burst) + _number(4, 0) + _number(5, 0)  # of packets, no flags


# --- attributes


def _expression(name: str, body: bytes) -> bytes:
    return _nested(_LIST_ELEM, _text(1, name) + _nested(2, body))


def _attribute(kind: int, data: bytes) -> bytes:
    size = len(data)  # rtnetlink.pack_attribute takes three times as long, and a rule has twenty of these
    return _ATTRIBUTE.pack(4 + size, kind) + data + _PADDING[size & 3]


def _nested(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(data), kind | _NESTED) + data  # attributes, which are padded already


def _number(kind: int, value: int) -> bytes:
    return _ATTRIBUTE.pack(8, kind) + value.to_bytes(4)


@lru_cache(maxsize=256)
def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


COUNTER = _expression("counter", b"")
NOT_TRACKED = _nested(_LIST_ELEM, _text(1, "notrack"))
_LOOKUP = _expression("lookup", _attribute(2, _REGISTER) + _text(1, _SET_NAME) + _number(4, 0))[:-4]
