"""The few rtnetlink requests that a container's network needs: links, addresses, routes, neighbours.

Synchronous, standard library only, one socket, each request acknowledged before the next is sent. A socket
belongs to the network namespace in which it was opened, whatever the process joins later.

Source: rtnetlink(7), netlink(7), linux/if_link.h, linux/rtnetlink.h; the numbers below are kernel ABI.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from types import TracebackType

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_ACK_TLVS, NLM_F_CAPPED = 0x200, 0x100
NLM_F_DUMP_INTR = 0x10
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH = 28
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_OPERSTATE, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 16, 18, 20
IFLA_NET_NS_FD = 28
IF_OPER_UP = 6
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD = 0x02
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_FLOW, RTA_TABLE = 1, 4, 5, 6, 11, 15
NDA_DST, NDA_LLADDR = 1, 2
NUD_PERMANENT = 0x80
RT_TABLE_MAIN, RTPROT_STATIC = 254, 4
LOOPBACK_INDEX = 1
RTN_UNICAST, RTN_LOCAL, RTN_UNREACHABLE = 1, 2, 7
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TC_H_ROOT, TC_LINKLAYER_ETHERNET = 0xFFFF_FFFF, 1
QDISC_HANDLE, _OTHER_HANDLE = 1 << 16, 2 << 16  # "1:" and "2:" of tc(8)
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
IFF_UP = 0x1

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_RECEIVE_BYTES = 1 << 16
_ATTEMPTS = 10
_TIMEOUT_S = 10.0
"""The kernel answers a request while it is sent; a longer wait means it is stuck, and we say so."""


class RtnetlinkError(OSError):
    """A request was refused; errno is the kernel's, filename names the request."""

    def __init__(self, code: int, request: str, hint: str = "") -> None:
        super().__init__(code, f"{os.strerror(code)}{f' ({hint})' if hint else ''}", request)


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `kind` is empty for real devices, `alias` if none was set.

    `is_operational`: its queue takes packets, and it says so (operstates.rst, IF_OPER_UP; loopback does not say). A
    link can be up and have its carrier a while before that.
    """

    index: int
    name: str
    mtu: int
    is_up: bool
    is_operational: bool
    kind: str
    alias: str


@dataclass(frozen=True, slots=True)
class Address:
    """An address with its prefix length on an interface."""

    link_index: int
    address: IPAddress
    prefix_length: int


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table. `type` is an RTN_ number; `link_index` of an unreachable one is 0, of IPv6 lo's."""

    destination: IPNetwork
    link_index: int
    type: int
    metric: int


@dataclass(frozen=True, slots=True)
class Rate:
    """What a link may send: bytes per second, and how many bytes at once."""

    bytes_per_s: int
    burst_bytes: int


@dataclass(frozen=True, slots=True)
class VethEnd:
    """One end of a veth pair to be made: name, six MAC bytes, and the namespace's fd (None: ours)."""

    name: str
    mac: bytes
    netns_fd: int | None = None


class Rtnetlink:
    """An open rtnetlink socket. Close it, or use it in a `with` statement."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; safe to call twice."""
        self._socket.close()

    # --- links ---

    def add_bridge(self, name: str, mac: bytes) -> None:
        """Make a bridge without ports; EEXIST if the name is taken."""
        info = _nested(IFLA_LINKINFO, _text(IFLA_INFO_KIND, "bridge"))
        body = _link_header() + _text(IFLA_IFNAME, name) + pack_attribute(IFLA_ADDRESS, mac) + info
        self._ask(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"link add {name} type bridge")

    def add_veth(self, near: VethEnd, far: VethEnd, *, mtu: int) -> None:
        """Make a pair, each end directly in its namespace, so that no half of it is ever in the wrong one.

        EEXIST if a name is taken there; EPERM if the namespace's owner is not below ours.
        """
        peer = _nested(VETH_INFO_PEER, _link_header() + _veth_end(far, mtu))
        info = _nested(IFLA_LINKINFO, _text(IFLA_INFO_KIND, "veth") + _nested(IFLA_INFO_DATA, peer))
        body = _link_header() + _veth_end(near, mtu) + info
        self._ask(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"link add {near.name} type veth")

    def set_link_up(self, index: int, *, alias: str = "") -> None:
        """Bring an interface up and, if given, name its purpose (`ip link` shows the alias)."""
        label = _text(IFLA_IFALIAS, alias, terminated=False) if alias else b""
        header = _link_header(index, flags=IFF_UP, change=IFF_UP)
        self._ask(RTM_SETLINK, 0, header + label, f"link set {index} up")

    def delete_link(self, name: str) -> None:
        """Delete an interface (of a veth pair: both ends); ENODEV if there is none of that name."""
        self._ask(RTM_DELLINK, 0, _link_header() + _text(IFLA_IFNAME, name), f"link del {name}")

    def find_link(self, name: str) -> Link | None:
        """The interface of that name, or None."""
        try:
            answers = self._request(RTM_GETLINK, 0, _link_header() + _text(IFLA_IFNAME, name), f"link {name}")
        except RtnetlinkError as error:
            if error.errno == 19:  # ENODEV
                return None
            raise
        return _parse_link(answers[0])

    def links(self) -> list[Link]:
        """Every interface of the namespace."""
        return [_parse_link(a) for a in self._request(RTM_GETLINK, NLM_F_DUMP, _link_header(), "link show")]

    # --- addresses, routes, neighbours ---

    def set_address(self, index: int, address: IPAddress, prefix_length: int) -> None:
        """Give an interface an address; that it has it already is fine.

        An IPv6 address can be used at once: nobody is asked whether he has it, too (RFC 4862 §5.4).
        """
        flags = IFA_F_NODAD if address.version == 6 else 0
        body = _address_body(index, address, prefix_length, flags)
        self._ask(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, f"addr add {address} dev {index}")

    def delete_address(self, index: int, address: IPAddress, prefix_length: int) -> None:
        """Undo set_address; EADDRNOTAVAIL if the interface has no such address."""
        body = _address_body(index, address, prefix_length, 0)
        self._ask(RTM_DELADDR, 0, body, f"addr del {address} dev {index}")

    def addresses(self, family: int = socket.AF_INET) -> list[Address]:
        """Every IPv4 address of the namespace, or with AF_INET6 every IPv6 address."""
        body = struct.pack("=BBBBi", family, 0, 0, 0, 0)
        found = []
        for answer in self._request(RTM_GETADDR, NLM_F_DUMP, body, "addr show"):
            _family, prefix_length, _flags, _scope, index = struct.unpack_from("=BBBBi", answer)
            attributes = dict(parse_attributes(answer[8:]))
            packed = attributes.get(IFA_LOCAL) or attributes[IFA_ADDRESS]
            found.append(Address(index, ip_address(packed), prefix_length))
        return found

    def set_route(
        self,
        destination: IPNetwork,
        *,
        link_index: int,
        gateway: IPAddress | None = None,
        realm: int = 0,
    ) -> None:
        """Route `destination` to a link, directly or through a gateway; replaces a route to the same.

        Args:
            destination: of the packets.
            link_index: where they go.
            gateway: whose MAC they are sent to; None: their own destination's.
            realm: that packets on this route carry inside the kernel (ip-route(8)); 0: none. IPv6 has no realms.
        """
        scope = SCOPE_LINK if gateway is None else SCOPE_UNIVERSE
        body = _route_header(destination, scope, RTN_UNICAST) + pack_attribute(
            RTA_OIF, struct.pack("=i", link_index)
        )
        if gateway is not None:
            body += pack_attribute(RTA_GATEWAY, gateway.packed)
        if realm:
            body += pack_attribute(RTA_FLOW, struct.pack("=I", realm))
        self._ask(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, f"route replace {destination}")

    def set_unreachable(self, destination: IPNetwork) -> None:
        """Answer "host unreachable" for what no more specific route knows, instead of sending it upstream."""
        body = _route_header(destination, SCOPE_UNIVERSE, RTN_UNREACHABLE)
        self._ask(
            RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body, f"route replace unreachable {destination}"
        )

    def delete_unreachable(self, destination: IPNetwork) -> None:
        """Undo set_unreachable; ESRCH if there is none.

        IPv6 compares metric and link, but not the kind: an unreachable route is on lo, where others are not.
        """
        body = _route_header(destination, SCOPE_UNIVERSE, RTN_UNREACHABLE)
        if destination.version == 6:
            body += pack_attribute(RTA_OIF, struct.pack("=i", LOOPBACK_INDEX))
        self._ask(RTM_DELROUTE, 0, body, f"route del unreachable {destination}")

    def routes(self, family: int = socket.AF_INET) -> list[Route]:
        """The IPv4 routes of the main table, or with AF_INET6 the IPv6 routes."""
        body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)
        answers = self._request(RTM_GETROUTE, NLM_F_DUMP, body, "route show")
        return [route for answer in answers if (route := _parse_route(answer)) is not None]

    def is_local(self, address: IPAddress) -> bool:
        """Whether packets to an address would be delivered here."""
        header = struct.pack("=BBBBBBBBI", _family(address), address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        body = header + pack_attribute(RTA_DST, address.packed)
        try:
            answers = self._request(RTM_GETROUTE, 0, body, f"route get {address}")
        except RtnetlinkError as error:
            if error.errno in (101, 113):  # ENETUNREACH, EHOSTUNREACH
                return False
            raise
        return bool(answers[0][7] == RTN_LOCAL)

    def set_neighbour(self, index: int, address: IPAddress, mac: bytes) -> None:
        """Fix the MAC of an address for good: nobody is asked for it, and no answer (ARP, ND) changes it."""
        body = struct.pack("=BxxxiHBB", _family(address), index, NUD_PERMANENT, 0, RTN_UNICAST)
        body += pack_attribute(NDA_DST, address.packed) + pack_attribute(NDA_LLADDR, mac)
        self._ask(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"neigh replace {address} dev {index}")

    # --- rates ---

    def set_rate(self, index: int, rate: Rate) -> None:
        """Hold back what an interface sends: a token bucket filter as its root qdisc, in place of any other.

        Always a new one: what waits in the old one is dropped. Were that one changed to a burst smaller than a packet
        that waits in it, this packet could never leave, and none behind it (tbf_dequeue in net/sched/sch_tbf.c).

        Source: tc-tbf(8), linux/pkt_sched.h.
        """
        former = self._find_tbf(index)
        handle = _OTHER_HANDLE if former is not None and former[0] == QDISC_HANDLE else QDISC_HANDLE
        # Up to a tenth of a second's worth waits; what is more is lost, which is what makes a sender slow down.
        limit = min(rate.burst_bytes + rate.bytes_per_s // 10 + 16384, 0xFFFF_FFFF)
        spec = struct.pack("=BBHhHI", 0, TC_LINKLAYER_ETHERNET, 0, 0, 0, min(rate.bytes_per_s, 0xFFFF_FFFF))
        options = pack_attribute(TCA_TBF_PARMS, spec + bytes(12) + struct.pack("=III", limit, 0, 0))
        options += pack_attribute(TCA_TBF_BURST, struct.pack("=I", rate.burst_bytes))
        options += pack_attribute(TCA_TBF_RATE64, struct.pack("=Q", rate.bytes_per_s))
        body = _qdisc_header(index, handle) + _text(TCA_KIND, "tbf") + _nested(TCA_OPTIONS, options)
        self._ask(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body, f"qdisc replace {index} tbf")

    def clear_rate(self, index: int) -> None:
        """Undo set_rate; none is fine."""
        try:
            self._ask(RTM_DELQDISC, 0, _qdisc_header(index, 0), f"qdisc del {index} root")
        except RtnetlinkError as error:
            if error.errno not in (2, 22):  # ENOENT, EINVAL: the root qdisc is the one that every link has
                raise

    def rate(self, index: int) -> Rate | None:
        """What set_rate has set; None: nothing holds the interface back."""
        found = self._find_tbf(index)
        return None if found is None else _parse_rate(found[1])

    def _find_tbf(self, index: int) -> tuple[int, bytes] | None:
        """Handle and options of an interface's root qdisc, if it is such a filter."""
        answers = self._request(RTM_GETQDISC, NLM_F_DUMP, _qdisc_header(0, 0), "qdisc show")
        for answer in answers:
            _family, found, handle, parent = struct.unpack_from("=BxxxiII", answer)
            attributes = dict(parse_attributes(answer[20:]))
            if found == index and parent == TC_H_ROOT and _decode(attributes[TCA_KIND]) == "tbf":
                return handle, attributes[TCA_OPTIONS]
        return None

    # --- the socket ---

    def _ask(self, kind: int, flags: int, body: bytes, label: str) -> None:
        self._request(kind, flags | NLM_F_ACK, body, label)

    def _request(self, kind: int, flags: int, body: bytes, label: str) -> list[bytes]:
        """Send one request and collect the payloads of its answer; RtnetlinkError if it is refused.

        A listing that something has changed under may lack something: it is asked for again, a few times.
        """
        for _ in range(_ATTEMPTS):
            answers, is_whole = self._request_once(kind, flags, body, label)
            if is_whole:
                break
        return answers

    def _request_once(self, kind: int, flags: int, body: bytes, label: str) -> tuple[list[bytes], bool]:
        self._sequence += 1
        self._socket.send(pack_message(kind, flags | NLM_F_REQUEST, self._sequence, body))
        answers: list[bytes] = []
        is_whole = True
        while True:
            for message_kind, message_flags, sequence, payload in self._receive():
                if sequence != self._sequence:
                    continue  # the tail of an answer that an earlier exception kept us from reading
                if message_kind == NLMSG_ERROR:
                    _raise_refusal(payload, message_flags, label)
                    return answers, True
                if flags & NLM_F_DUMP:
                    is_whole = is_whole and not message_flags & NLM_F_DUMP_INTR
                if message_kind == NLMSG_DONE:
                    _raise_refusal(payload, 0, label)
                    return answers, is_whole
                answers.append(payload)
                if not flags & (NLM_F_DUMP | NLM_F_ACK):
                    return answers, True

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        return split_messages(self._socket.recv(_RECEIVE_BYTES))


def pack_message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One netlink message; netlink(7)."""
    message = struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body
    return message.ljust(_align(len(message)), b"\0")


def split_messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of each netlink message in what one recv(2) returned; netlink(7)."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _port = struct.unpack_from("=IHHII", data, offset)
        yield kind, flags, sequence, data[offset + 16 : offset + length]
        offset += max(_align(length), 16)


def _raise_refusal(payload: bytes, flags: int, label: str) -> None:
    (code,) = struct.unpack_from("=i", payload)
    if code == 0:
        return
    hint = ""
    if flags & NLM_F_ACK_TLVS and flags & NLM_F_CAPPED:
        # NLMSGERR_ATTR_MSG (1): the kernel's own words, behind errno and the header of our request.
        hint = dict(parse_attributes(payload[20:])).get(1, b"").rstrip(b"\0").decode(errors="replace")
    raise RtnetlinkError(-code, label, hint)


def _parse_link(answer: bytes) -> Link:
    _family, _kind, index, flags, _change = struct.unpack_from("=BxHiII", answer)
    attributes = dict(parse_attributes(answer[16:]))
    info = dict(parse_attributes(attributes.get(IFLA_LINKINFO, b"")))
    return Link(
        index=index,
        name=_decode(attributes[IFLA_IFNAME]),
        mtu=struct.unpack("=I", attributes[IFLA_MTU])[0],
        is_up=bool(flags & IFF_UP),
        is_operational=attributes[IFLA_OPERSTATE][0] == IF_OPER_UP,
        kind=_decode(info.get(IFLA_INFO_KIND, b"")),
        alias=_decode(attributes.get(IFLA_IFALIAS, b"")),
    )


def _parse_route(answer: bytes) -> Route | None:
    family, length, _src, _tos, table, _proto, _scope, kind, _flags = struct.unpack_from("=BBBBBBBBI", answer)
    attributes = dict(parse_attributes(answer[12:]))
    if RTA_TABLE in attributes:
        (table,) = struct.unpack("=I", attributes[RTA_TABLE])
    if table != RT_TABLE_MAIN:
        return None
    (index,) = struct.unpack("=i", attributes.get(RTA_OIF, bytes(4)))
    (metric,) = struct.unpack("=I", attributes.get(RTA_PRIORITY, bytes(4)))
    packed = attributes.get(RTA_DST)
    destination: IPNetwork
    if family == socket.AF_INET6:
        destination = IPv6Network((packed or bytes(16), length))
    else:
        destination = IPv4Network((packed or bytes(4), length))
    return Route(destination, index, kind, metric)


def _parse_rate(options: bytes) -> Rate:
    attributes = dict(parse_attributes(options))
    parameters = attributes[TCA_TBF_PARMS]
    (slow,) = struct.unpack_from("=I", parameters, 8)
    fast = attributes.get(TCA_TBF_RATE64)
    bytes_per_s = struct.unpack("=Q", fast)[0] if fast else slow
    # The kernel tells the burst as the time that it takes, in its ticks of 64 ns (psched.h, PSCHED_SHIFT).
    (ticks,) = struct.unpack_from("=I", parameters, 28)
    return Rate(bytes_per_s, round(ticks * 64 * bytes_per_s / 1e9))


def parse_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each attribute; rtnetlink(7). What has no length ends it."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]  # without the NESTED and BYTEORDER bits
        offset += _align(length)


def _veth_end(end: VethEnd, mtu: int) -> bytes:
    body = _text(IFLA_IFNAME, end.name) + pack_attribute(IFLA_ADDRESS, end.mac)
    body += pack_attribute(IFLA_MTU, struct.pack("=I", mtu))
    if end.netns_fd is not None:
        body += pack_attribute(IFLA_NET_NS_FD, struct.pack("=I", end.netns_fd))
    return body


def _link_header(index: int = 0, *, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change)


def _qdisc_header(index: int, handle: int) -> bytes:
    return struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, handle, TC_H_ROOT, 0)


def _family(address: IPAddress | IPNetwork) -> int:
    return socket.AF_INET6 if address.version == 6 else socket.AF_INET


def _address_body(index: int, address: IPAddress, prefix_length: int, flags: int) -> bytes:
    header = struct.pack("=BBBBi", _family(address), prefix_length, flags, SCOPE_UNIVERSE, index)
    return header + pack_attribute(IFA_LOCAL, address.packed) + pack_attribute(IFA_ADDRESS, address.packed)


def _route_header(destination: IPNetwork, scope: int, kind: int) -> bytes:
    header = struct.pack(
        "=BBBBBBBBI",
        _family(destination), destination.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, kind, 0,
    )  # fmt: skip
    return (
        header + pack_attribute(RTA_DST, destination.network_address.packed)
        if destination.prefixlen
        else header
    )


def pack_attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to the next."""
    return (struct.pack("=HH", 4 + len(data), kind) + data).ljust(_align(4 + len(data)), b"\0")


def _nested(kind: int, data: bytes) -> bytes:
    return pack_attribute(kind, data)


def _text(kind: int, value: str, *, terminated: bool = True) -> bytes:
    return pack_attribute(kind, value.encode() + (b"\0" if terminated else b""))


def _decode(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _align(length: int) -> int:
    return (length + 3) & ~3
