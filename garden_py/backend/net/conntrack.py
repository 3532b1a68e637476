"""Forgetting connections that would lead somewhere else if they began now.

The kernel tracks a connection until it times out, established ones of TCP for days. Packets of the next owner of an
address would count as part of them: past rules that let established connections go on, or into a datagram flow that
still comes in through a port that had been mapped. And a flow of datagrams that was there before a port was mapped goes
on past the mapping, for only its first packet is asked where it leads.

Source: linux/netfilter/nfnetlink_conntrack.h, netlink(7), nfnetlink by its header linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from garden_py.agent.nft import open_netfilter_socket
from garden_py.agent.rtnetlink import NLM_F_ACK, NLM_F_DUMP, pack_attribute, parse_attributes
from garden_py.backend.net.nfnetlink import pack_request, read_answers

_SUBSYS_CTNETLINK = 1
_GET, _DELETE = 1, 2  # IPCTNL_MSG_CT_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_V4_SRC, _IP_V6_SRC = 1, 3
_IP_V4_DST, _IP_V6_DST = 2, 4
_PROTO_NUMBER, _PROTO_DST_PORT = 1, 3
_ID, _ZONE, _FILTER = 12, 18, 25
_FILTER_IP_SRC = 1  # CTA_FILTER_FLAG(CTA_IP_SRC)
_NESTED = 0x8000
_UDP = bytes([socket.IPPROTO_UDP])
_TIMEOUT_S = 10.0
_DELETES_AT_ONCE = 64
_LAST = 2  # sequence number of the last message of a batch


IPAddress = IPv4Address | IPv6Address


class Side(Enum):
    """Whose source address is looked at: of the packets of who has connected, or of those that come back."""

    ORIGINAL = 1  # CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS
    REPLY = 2  # CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS


def forget_connections(address: IPAddress, sides: tuple[Side, ...]) -> int:
    """Have the network namespace of the caller forget the connections of an address; how many those were.

    Those in other zones than the default one are not ours: somebody keeps equal addresses apart by them.

    Costs a walk through the kernel's table, of IPv4 one for each side, some 10 ms if little is in it (262,144 buckets).

    Args:
        address: of a container whose link is gone, so that nothing is added meanwhile.
        sides: ORIGINAL: the connections that it has made; REPLY: those that have been made to it, as it has
            answered under its own address, whatever the other end calls it.

    Raises:
        OSError: the kernel refused, or has no ctnetlink.
    """
    with open_netfilter_socket(_TIMEOUT_S) as opened:
        found = _list(opened, address, sides)
        _delete(opened, address, sorted(found))
        return len(found)


def forget_datagrams(port: int, local: Collection[IPAddress], owners: Collection[IPAddress]) -> int:
    """Have the network namespace of the caller forget UDP flows that a mapped port does not lead to its container.

    Args:
        port: of the host.
        local: the host's addresses; flows to a port of this number elsewhere are left alone.
        owners: the addresses that the port is mapped to, one of each version of IP that it is mapped in.

    Returns:
        How many those were.

    Raises:
        OSError: the kernel refused, or has no ctnetlink.
    """
    forgotten = 0
    with open_netfilter_socket(_TIMEOUT_S) as opened:
        for family in owners:  # each of another version of IP
            here, theirs = ({each.packed for each in some} for some in (local, owners))
            found = _list_datagrams(opened, family, struct.pack("!H", port), here, theirs)
            _delete(opened, family, sorted(found))
            forgotten += len(found)
    return forgotten


def _list_datagrams(
    opened: socket.socket, family: IPAddress, port: bytes, local: set[bytes], owners: set[bytes]
) -> set[bytes]:
    source, destination = (_IP_V4_SRC, _IP_V4_DST) if family.version == 4 else (_IP_V6_SRC, _IP_V6_DST)
    entries = set()
    opened.send(_request(_GET, NLM_F_DUMP, family, b""))
    for payload in read_answers(opened):
        if port not in payload:
            continue
        found = dict(parse_attributes(payload[4:]))
        original, reply = found[Side.ORIGINAL.value], found[Side.REPLY.value]
        ports = dict(parse_attributes(dict(parse_attributes(original)).get(_TUPLE_PROTO, b"")))
        is_meant = ports.get(_PROTO_NUMBER) == _UDP and ports.get(_PROTO_DST_PORT) == port
        leads_elsewhere = _ip_of(original, destination) in local and _ip_of(reply, source) not in owners
        if is_meant and leads_elsewhere and _ZONE not in found:
            entries.add(_name_of(found))
    return entries


def probe() -> None:
    """Find out whether the kernel can be asked.

    Raises:
        OSError: it has no ctnetlink (CONFIG_NF_CT_NETLINK), or refused.
    """
    with open_netfilter_socket(_TIMEOUT_S) as opened:
        _list(opened, IPv4Address(0), (Side.ORIGINAL,))


def _list(opened: socket.socket, address: IPAddress, sides: tuple[Side, ...]) -> set[bytes]:
    """What identifies each connection: its tuple in the original direction, and its number."""
    source = _IP_V4_SRC if address.version == 4 else _IP_V6_SRC
    entries = set()
    for wanted in {_filter(address, side) for side in sides}:
        opened.send(_request(_GET, NLM_F_DUMP, address, wanted))
        for payload in read_answers(opened):
            if address.packed not in payload:  # there may be many, and these need not be taken apart
                continue
            found = dict(parse_attributes(payload[4:]))
            is_its_own = any(_ip_of(found[side.value], source) == address.packed for side in sides)
            if is_its_own and _ZONE not in found:
                entries.add(_name_of(found))
    return entries


def _filter(address: IPAddress, side: Side) -> bytes:
    """What spares us most of the list.

    Kernels before 5.8 ignore it. For IPv6, Linux 6.18 takes it for its opposite (ctnetlink_filter_match_tuple).
    """
    if address.version == 6:
        return b""
    wanted = pack_attribute(_TUPLE_IP | _NESTED, pack_attribute(_IP_V4_SRC, address.packed))
    flags = pack_attribute(side.value, struct.pack("=I", _FILTER_IP_SRC))
    return pack_attribute(side.value | _NESTED, wanted) + pack_attribute(_FILTER | _NESTED, flags)


def _delete(opened: socket.socket, address: IPAddress, entries: list[bytes]) -> None:
    for start in range(0, len(entries), _DELETES_AT_ONCE):
        *others, last = entries[start : start + _DELETES_AT_ONCE]
        requests = [_request(_DELETE, 0, address, entry) for entry in others]
        opened.send(b"".join(requests) + _request(_DELETE, NLM_F_ACK, address, last, sequence=_LAST))
        for _ in read_answers(opened, _LAST, ignored=(errno.ENOENT,)):  # one that has timed out
            pass


def _request(message: int, flags: int, address: IPAddress, body: bytes, sequence: int = 1) -> bytes:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return pack_request(_SUBSYS_CTNETLINK, message, body, flags=flags, family=family, sequence=sequence)


def _name_of(found: dict[int, bytes]) -> bytes:
    original = pack_attribute(Side.ORIGINAL.value | _NESTED, found[Side.ORIGINAL.value])
    return original + pack_attribute(_ID, found[_ID])


def _ip_of(tuple_attribute: bytes, kind: int) -> bytes:
    """An address of a tuple; kind: CTA_IP_*."""
    ip = dict(parse_attributes(dict(parse_attributes(tuple_attribute)).get(_TUPLE_IP, b"")))
    return ip.get(kind, b"")
