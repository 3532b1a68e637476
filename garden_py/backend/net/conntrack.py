"""Forgetting connections of an address that is going to be somebody else's.

The kernel tracks a connection until it times out, established ones of TCP for days. Packets of the next owner of an
address would count as part of them: past rules that let established connections go on, or into a datagram flow that
still comes in through a port that had been mapped.

Source: linux/netfilter/nfnetlink_conntrack.h, netlink(7), nfnetlink by its header linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
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
_ID, _ZONE, _FILTER = 12, 18, 25
_FILTER_IP_SRC = 1  # CTA_FILTER_FLAG(CTA_IP_SRC)
_NESTED = 0x8000
_RECEIVE_BYTES = 1 << 17
_TIMEOUT_S = 10.0
_DELETES_AT_ONCE = 64
_LAST = 2  # sequence number of the last message of a batch


class Side(Enum):
    """Whose source address is looked at: of the packets of who has connected, or of those that come back."""

    ORIGINAL = 1  # CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS
    REPLY = 2  # CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS


def forget_connections(address: IPv4Address | IPv6Address, sides: tuple[Side, ...]) -> int:
    """Have the network namespace of the caller forget the connections of an address; how many those were.

    Those in other zones than the default one are not ours: somebody keeps equal addresses apart by them.

    Costs a walk through the kernel's table for each side, some 10 ms if little is in it (262,144 buckets).

    Args:
        address: of a container whose link is gone, so that nothing is added meanwhile.
        sides: ORIGINAL: the connections that it has made; REPLY: those that have been made to it, as it has
            answered under its own address, whatever the other end calls it.

    Raises:
        OSError: the kernel refused, or has no ctnetlink.
    """
    with _open() as opened:
        found = {entry for side in sides for entry in _list(opened, address, side)}
        _delete(opened, address, sorted(found))
        return len(found)


def probe() -> None:
    """Find out whether the kernel can be asked.

    Raises:
        OSError: it has no ctnetlink (CONFIG_NF_CT_NETLINK), or refused.
    """
    with _open() as opened:
        _list(opened, IPv4Address(0), Side.ORIGINAL)


def _open() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    opened.settimeout(_TIMEOUT_S)
    return opened


def _list(opened: socket.socket, address: IPv4Address | IPv6Address, side: Side) -> list[bytes]:
    """What identifies each connection: its tuple in the original direction, and its number."""
    source = _IP_V4_SRC if address.version == 4 else _IP_V6_SRC
    opened.send(_message(_GET, NLM_F_DUMP, address, _filter(address, side)))
    entries = []
    for payload in _answers(opened, address.packed):
        attributes = dict(parse_attributes(payload[4:]))
        if _ZONE not in attributes and _source_of(attributes[side.value], source) == address.packed:
            named = pack_attribute(Side.ORIGINAL.value | _NESTED, attributes[Side.ORIGINAL.value])
            entries.append(named + pack_attribute(_ID, attributes[_ID]))
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


def _delete(opened: socket.socket, address: IPv4Address | IPv6Address, entries: list[bytes]) -> None:
    for start in range(0, len(entries), _DELETES_AT_ONCE):
        batch = entries[start : start + _DELETES_AT_ONCE]
        messages = [_message(_DELETE, 0, address, entry) for entry in batch[:-1]]
        opened.send(b"".join([*messages, _message(_DELETE, NLM_F_ACK, address, batch[-1], last=True)]))
        while not _read_acknowledgement(opened):
            pass


def _read_acknowledgement(opened: socket.socket) -> bool:
    """Whether the last one of a batch has been answered; those before it answer only if they are refused."""
    done = False
    for _kind, _flags, sequence, payload in split_messages(opened.recv(_RECEIVE_BYTES)):
        (code,) = struct.unpack_from("=i", payload)
        if code and -code != errno.ENOENT:  # that one has timed out
            raise OSError(-code, os.strerror(-code), "ctnetlink")
        done = done or sequence == _LAST
    return done


def _message(
    kind: int, flags: int, address: IPv4Address | IPv6Address, body: bytes, *, last: bool = False
) -> bytes:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = struct.pack(">BBH", family, 0, 0) + body
    number = _SUBSYS_CTNETLINK << 8 | kind
    header = struct.pack("=IHHII", 16 + len(body), number, flags | NLM_F_REQUEST, _LAST if last else 1, 0)
    return header + body


def _answers(opened: socket.socket, wanted: bytes) -> Iterator[bytes]:
    """Payloads of a dump that have these bytes somewhere; others are not taken apart, there may be many."""
    while True:
        data = opened.recv(_RECEIVE_BYTES)
        for kind, _flags, _sequence, payload in split_messages(data):
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                (code,) = struct.unpack_from("=i", payload)
                if code:
                    raise OSError(-code, os.strerror(-code), "ctnetlink")
                return
            if wanted in payload:
                yield payload


def _source_of(tuple_attribute: bytes, kind: int) -> bytes:
    ip = dict(parse_attributes(dict(parse_attributes(tuple_attribute)).get(_TUPLE_IP, b"")))
    return ip.get(kind, b"")
