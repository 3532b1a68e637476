"""Forgetting connections of an address that is going to be somebody else's.

The kernel tracks a connection until it times out, established ones of TCP for days. Packets of the next owner of an
address would count as part of them: past rules that let established connections go on, or into a datagram flow that
still comes in through a port that had been mapped.

Source: linux/netfilter/nfnetlink_conntrack.h, netlink(7), nfnetlink by its header linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from garden_py.agent.rtnetlink import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    pack_attribute,
    parse_attributes,
    split_messages,
)

_NETLINK_NETFILTER = 12  # linux/netlink.h
_SUBSYS_CTNETLINK = 1
_GET, _DELETE = 1, 2  # IPCTNL_MSG_CT_*
_TUPLE_IP = 1
_IP_V4_SRC, _IP_V6_SRC = 1, 3
_ZONE, _FILTER = 18, 25
_FILTER_IP_SRC = 1  # CTA_FILTER_FLAG(CTA_IP_SRC)
_NESTED = 0x8000
_RECEIVE_BYTES = 1 << 16
_TIMEOUT_S = 10.0


class Side(Enum):
    """Whose source address is looked at: of the packets of who has connected, or of those that come back."""

    ORIGINAL = 1  # CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS
    REPLY = 2  # CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS


def forget_connections(address: IPv4Address | IPv6Address, sides: tuple[Side, ...]) -> int:
    """Have the network namespace of the caller forget the connections of an address; how many those were.

    Costs a walk through the kernel's table for each side, some 10 ms whatever is in it.

    Args:
        address: of a container whose link is gone, so that nothing is added meanwhile.
        sides: ORIGINAL: the connections that it has made; REPLY: those that have been made to it, as it has
            answered under its own address, whatever the other end calls it.

    Raises:
        OSError: the kernel refused, or has no ctnetlink.
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    with opened:
        opened.settimeout(_TIMEOUT_S)
        found = [entry for side in sides for entry in _list(opened, address, side)]
        return sum(_delete(opened, address, entry) for entry in found)


def probe() -> None:
    """Find out whether the kernel can be asked.

    Raises:
        OSError: it has no ctnetlink (CONFIG_NF_CT_NETLINK), or refused.
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    with opened:
        opened.settimeout(_TIMEOUT_S)
        _list(opened, IPv4Address(0), Side.ORIGINAL)


def _list(opened: socket.socket, address: IPv4Address | IPv6Address, side: Side) -> list[bytes]:
    """What identifies each connection: its tuple in the original direction, and its zone."""
    source = _IP_V4_SRC if address.version == 4 else _IP_V6_SRC
    entries = []
    for payload in _ask(opened, _GET, NLM_F_DUMP, address, _filter(address, side)):
        if address.packed not in payload:
            continue
        attributes = dict(parse_attributes(payload[4:]))
        if _source_of(attributes[side.value], source) == address.packed:
            zone = attributes.get(_ZONE)
            named = pack_attribute(Side.ORIGINAL.value | _NESTED, attributes[Side.ORIGINAL.value])
            entries.append(named + (b"" if zone is None else pack_attribute(_ZONE, zone)))
    return entries


def _filter(address: IPv4Address | IPv6Address, side: Side) -> bytes:
    """What spares us most of the list.

    Kernels before 5.8 ignore it. For IPv6, Linux 6.18 takes it for its opposite (ctnetlink_filter_match_tuple).
    """
    if address.version == 6:
        return b""
    wanted = pack_attribute(_TUPLE_IP | _NESTED, pack_attribute(_IP_V4_SRC, address.packed))
    flags = pack_attribute(side.value, struct.pack("=I", _FILTER_IP_SRC))
    return pack_attribute(side.value | _NESTED, wanted) + pack_attribute(_FILTER | _NESTED, flags)


def _delete(opened: socket.socket, address: IPv4Address | IPv6Address, entry: bytes) -> bool:
    try:
        list(_ask(opened, _DELETE, NLM_F_ACK, address, entry))
    except FileNotFoundError:  # it has timed out, or stood in both lists
        return False
    return True


def _ask(
    opened: socket.socket, message: int, flags: int, address: IPv4Address | IPv6Address, body: bytes
) -> Iterator[bytes]:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = struct.pack(">BBH", family, 0, 0) + body
    kind = _SUBSYS_CTNETLINK << 8 | message
    opened.send(struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST, 1, 0) + body)
    while True:
        for message_kind, _flags, _sequence, payload in split_messages(opened.recv(_RECEIVE_BYTES)):
            if message_kind == NLMSG_DONE:
                return
            if message_kind == NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", payload)
                if code:
                    raise OSError(-code, os.strerror(-code), "ctnetlink")
                return
            yield payload


def _source_of(tuple_attribute: bytes, kind: int) -> bytes:
    ip = dict(parse_attributes(dict(parse_attributes(tuple_attribute)).get(_TUPLE_IP, b"")))
    return ip.get(kind, b"")
