"""Being told by the kernel of packets that a rule logs: NFLOG sockets and their messages.

A group belongs to the network namespace that its socket was made in. `parse_messages` is pure.

Source: linux/netfilter/nfnetlink_log.h, nfnetlink(7) by its header linux/netfilter/nfnetlink.h, netlink(7).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from garden_py.agent.rtnetlink import NLM_F_ACK, pack_attribute, parse_attributes, split_messages
from garden_py.backend.net.nfnetlink import open_socket_in, pack_request, read_answers
from garden_py.model.connection import Flow

_SUBSYS_ULOG = 4  # NFNL_SUBSYS_ULOG
_MSG_PACKET, _MSG_CONFIG = 0, 1
_CFG_CMD, _CFG_MODE, _CFG_TIMEOUT = 1, 2, 4
_CMD_BIND, _COPY_PACKET = 1, 2
_MARK, _IFINDEX_INDEV, _PAYLOAD, _PREFIX = 2, 4, 9, 10
_FLUSH_CENTISECONDS = 10
"""How long the kernel collects messages before it sends them together."""
_COPY_BYTES = 128
_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class LoggedPacket:
    """One message.

    Attributes:
        prefix: of the log statement.
        mark: of the packet; 0 for none.
        in_index: of the link it came in by, 0 for one that was sent from here.
        payload: its first bytes, beginning with the IP header.
    """

    prefix: str
    mark: int
    in_index: int
    payload: bytes


def open_group(group: int, netns_fd: int | None = None) -> socket.socket:
    """A non-blocking socket that receives what the rules of a network namespace log to a group.

    Args:
        group: 0..65535.
        netns_fd: the namespace; None: the caller's own.

    Raises:
        OSError: EBUSY if somebody else listens to the group there, EPERM without CAP_NET_ADMIN over it.
    """
    opened = open_socket_in(netns_fd, _ANSWER_S)
    try:
        mode = struct.pack(">IBB", _COPY_BYTES, _COPY_PACKET, 0)
        _configure(opened, group, pack_attribute(_CFG_CMD, bytes([_CMD_BIND])))
        _configure(opened, group, pack_attribute(_CFG_MODE, mode))
        _configure(opened, group, pack_attribute(_CFG_TIMEOUT, struct.pack(">I", _FLUSH_CENTISECONDS)))
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


def _configure(opened: socket.socket, group: int, attribute: bytes) -> None:
    opened.send(pack_request(_SUBSYS_ULOG, _MSG_CONFIG, attribute, flags=NLM_F_ACK, resource=group))
    for _ in read_answers(opened):
        pass


def parse_messages(data: bytes) -> list[LoggedPacket]:
    """The packets in what one recv(2) returned; anything else in it is left out."""
    packets = []
    for kind, _flags, _sequence, payload in split_messages(data):
        if kind != _SUBSYS_ULOG << 8 | _MSG_PACKET:
            continue
        found = dict(parse_attributes(payload[4:]))
        packets.append(
            LoggedPacket(
                prefix=found.get(_PREFIX, b"").rstrip(b"\0").decode(errors="replace"),
                mark=int.from_bytes(found.get(_MARK, b"")),
                in_index=int.from_bytes(found.get(_IFINDEX_INDEV, b"")),
                payload=found.get(_PAYLOAD, b""),
            )
        )
    return packets


def parse_flow(packet: bytes) -> Flow | None:
    """Protocol, addresses and ports of a packet; None if it has no whole IP header.

    Source: RFC 791, RFC 8200 (extension headers are not followed), RFC 9293, RFC 768, RFC 792.
    """
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        number, behind = packet[9], packet[(packet[0] & 15) * 4 :]
        source, destination = str(IPv4Address(packet[12:16])), str(IPv4Address(packet[16:20]))
        is_first = not (packet[6] & 0x1F or packet[7])
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        number, behind, is_first = packet[6], packet[40:], True
        source, destination = str(IPv6Address(packet[8:24])), str(IPv6Address(packet[24:40]))
    else:
        return None
    name = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}.get(number, str(number))
    if is_first and name in ("tcp", "udp") and len(behind) >= 4:
        source_port, destination_port = struct.unpack_from(">HH", behind)
        return Flow(name, source, destination, source_port, destination_port)
    if is_first and name in ("icmp", "icmpv6") and len(behind) >= 2:
        return Flow(name, source, destination, icmp=f"{behind[0]}/{behind[1]}")
    return Flow(name, source, destination)
