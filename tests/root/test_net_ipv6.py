"""What containers with IPv6 can and cannot do to others, with real packets between namespaces that the tests make."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path

import pytest
from kit.garden import wait_until
from net_lab import HOST_IP_V6, OUTSIDE_IP_V6, Container, Lab, Probe, Refused, open_lab

from garden_py.agent.rtnetlink import Rtnetlink
from garden_py.backend.net import host_firewall
from garden_py.backend.net.apply import HostNetwork
from garden_py.backend.net.conntrack import Side, forget_connections
from garden_py.backend.net.host_firewall import Access, HostPolicy, Reach
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule

pytestmark = pytest.mark.root

POOL = IPv6Network("fd67:6472::/64")
OPEN = EgressPolicy(DefaultAction.ALLOW)
CLOSED = EgressPolicy(DefaultAction.DENY)
both = pytest.mark.parametrize("privileged", [False, True])
UDP, DESTINATION_OPTIONS, FRAGMENT, ICMPV6 = 17, 60, 44, 58


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab(POOL) as lab:
        yield lab


def datagram(
    source: str,
    destination: str,
    *,
    port: int = 53,
    headers: bytes = b"",
    first: int = UDP,
    data: bytes = b"",
) -> bytes:
    """A UDP datagram from port 4096 in an IPv6 packet. Source: RFC 8200, RFC 768.

    Args:
        source: address.
        destination: likewise.
        port: of the destination.
        headers: extension headers, the last one naming UDP.
        first: number of the first of them.
        data: of the datagram.
    """
    addresses = IPv6Address(source).packed + IPv6Address(destination).packed
    length = 8 + len(data)
    udp = struct.pack(">HHH", 4096, port, length)
    pseudo = addresses + struct.pack(">II", length, UDP)
    checksum = _checksum(pseudo + udp + b"\0\0" + data)
    body = headers + udp + struct.pack(">H", checksum) + data
    return struct.pack(">IHBB", 6 << 28, len(body), first, 64) + addresses + body


def icmp(source: str, destination: str, message: bytes) -> bytes:
    """An ICMPv6 message, with its checksum put in. Source: RFC 4443."""
    addresses = IPv6Address(source).packed + IPv6Address(destination).packed
    checksum = _checksum(addresses + struct.pack(">II", len(message), ICMPV6) + message)
    body = message[:2] + struct.pack(">H", checksum) + message[4:]
    return struct.pack(">IHBB", 6 << 28, len(body), ICMPV6, 255) + addresses + body


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2])) + (data[-1] << 8) * (
        len(data) % 2
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF


def frame(container: Container, packet: bytes) -> str:
    """The packet on the wire to the host's end, in hexadecimal."""
    macs = (container.link.host_mac + container.link.container_mac).replace(":", "")
    return f"{macs}86dd{packet.hex()}"


def strays(probe: Probe) -> int:
    """UDP datagrams that arrived there and that nobody took (RFC 4113)."""
    lines = dict(line.split() for line in probe.order("read", "/proc/net/snmp6").splitlines())
    return int(lines["Udp6NoPorts"])


def strays_v4(probe: Probe) -> int:
    lines = [
        line.split() for line in probe.order("read", "/proc/net/snmp").splitlines() if line.startswith("Udp:")
    ]
    return int(lines[1][lines[0].index("NoPorts")])


def assert_only_last_arrives(lab: Lab, container: Container, before: int) -> None:
    """A datagram that is allowed comes through; those sent before it have not."""
    lab.replace(container, OPEN)
    container.order("raw_v6", datagram(container.link.address_v6, OUTSIDE_IP_V6).hex(), OUTSIDE_IP_V6)
    wait_until(lambda: strays(lab.outside) > before, "the datagram that is allowed")
    assert strays(lab.outside) == before + 1


@both
def test_whatever_is_connected_follows_each_replacement(lab: Lab, privileged: bool) -> None:
    """Rules of an address, all of IPv6, and the default; the outside sees the host's address."""
    container = lab.container(2, CLOSED, privileged=privileged)
    assert container.try_connect(OUTSIDE_IP_V6, 80) == "ECONNREFUSED"
    for text in (f"tcp:[{OUTSIDE_IP_V6}]:80", "all:[::/0]", "tcp"):
        lab.replace(container, EgressPolicy(DefaultAction.DENY, (parse_egress_rule(text),)))
        assert container.try_connect(OUTSIDE_IP_V6, 80) == HOST_IP_V6, text
    lab.replace(container, EgressPolicy(DefaultAction.DENY, (parse_egress_rule("all:0.0.0.0/0"),)))
    assert container.try_connect(OUTSIDE_IP_V6, 80) == "ECONNREFUSED"
    assert container.order("exchange", 0) == "ping"  # what was open goes on


def test_host_is_closed_unless_access_is_granted(lab: Lab) -> None:
    """By any of its addresses."""
    container = lab.container(2, OPEN)
    gateway = str(lab.plan.gateway_v6)
    with lab.serve(gateway, 7777), lab.serve(HOST_IP_V6, 7777):
        for address in (gateway, HOST_IP_V6):
            assert container.try_connect(address, 7777) == "ECONNREFUSED"
        lab.network.restore_host(HostPolicy(host_access=Access.ALLOW), "")
        assert container.try_connect(HOST_IP_V6, 7777) == container.link.address_v6


def test_containers_reach_each_other_only_if_the_server_allows_it(lab: Lab) -> None:
    """They share no wire: traffic between them is routed, and judged, by the host."""
    server, client = lab.container(2, OPEN), lab.container(3, OPEN)
    server.order("listen", "::", 8000)
    assert client.try_connect(server.link.address_v6, 8000) == client.link.address_v6
    lab.network.restore_host(HostPolicy(reach=Reach.NONE), "")
    assert client.try_connect(server.link.address_v6, 8000) == "ECONNREFUSED"


def test_mapped_port_is_reached_from_everywhere(lab: Lab) -> None:
    """From outside, from another container, and from the container itself."""
    server, client = lab.container(2, OPEN), lab.container(3, OPEN)
    server.order("listen", "::", 8000)
    mapping = lab.map_tcp(61001, server, 8000)
    assert lab.outside.try_connect(HOST_IP_V6, 61001) == OUTSIDE_IP_V6
    assert client.try_connect(HOST_IP_V6, 61001) == client.link.address_v6
    assert server.try_connect(HOST_IP_V6, 61001) == str(lab.plan.gateway_v6)
    assert lab.outside.try_connect(server.link.address_v6, 8000) == "ECONNREFUSED"
    lab.network.unmap_port(mapping)
    assert lab.outside.try_connect(HOST_IP_V6, 61001) == "ECONNREFUSED"


@pytest.mark.parametrize("privileged", [False, True])
def test_forged_sources_are_dropped(lab: Lab, privileged: bool) -> None:
    """Of another container, of the outside, link-local: nothing of it leaves the link."""
    container, other = lab.container(2, OPEN, privileged=privileged), lab.container(3, OPEN)
    before = strays(lab.outside)
    forged = (other.link.address_v6, OUTSIDE_IP_V6, "fe80::1", "::1", str(POOL[77]))
    for source in forged:
        container.order("frame", frame(container, datagram(source, OUTSIDE_IP_V6)))
    wait_until(
        lambda: lab.dropped("spoofed") >= len(forged) - 1, "the forged ones"
    )  # ::1 is no source for IP itself
    assert_only_last_arrives(lab, container, before)


def test_neighbours_and_routers_cannot_be_played(lab: Lab) -> None:
    """Advertisements change neither the host's neighbours nor its routes; what has a meaning on a link stays there."""
    container, other = lab.container(2, OPEN, privileged=True), lab.container(3, OPEN)
    option = b"\2\1" + bytes.fromhex(container.link.container_mac.replace(":", ""))
    gateway, victim = str(lab.plan.gateway_v6), other.link.address_v6
    override = b"\x88\0\0\0" + struct.pack(">I", 0x60000000)  # neighbour advertisement, solicited, override
    router = b"\x86\0\0\0\x40\0\x07\x08" + bytes(8)  # router advertisement for half an hour
    seen = "ip", "-6", "neigh", "show", "nud", "permanent"
    neighbours, routes = output(*seen), output("ip", "-6", "route")
    for source in ("fe80::2", container.link.address_v6):
        for target in (gateway, victim):
            advertised = override + IPv6Address(target).packed + option
            for destination in ("ff02::1", gateway):
                container.order("frame", frame(container, icmp(source, destination, advertised)))
        container.order("frame", frame(container, icmp(source, "ff02::1", router + option)))
        container.order("frame", frame(container, datagram(source, "ff02::1")))
    assert output(*seen) == neighbours
    assert output("ip", "-6", "route") == routes
    assert lab.dropped("martian") >= 1
    other.order("listen", "::", 8000)
    assert lab.container(4, OPEN).try_connect(victim, 8000) == str(POOL[int(lab.plan.pool[4])])


def output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout


@both
def test_hand_made_frames_are_judged_like_any_others(lab: Lab, privileged: bool) -> None:
    """A packet socket passes by the hooks of IP; IPv6 routes have no realm to tell what came by them."""
    container = lab.container(2, CLOSED, privileged=privileged)
    before = strays(lab.outside)
    packet = frame(container, datagram(container.link.address_v6, OUTSIDE_IP_V6))
    for bypass in (False, True):
        with nullcontext() if privileged else pytest.raises(Refused, match="ENOBUFS"):
            container.order("frame", packet, bypass)
    assert_only_last_arrives(lab, container, before)


@both
def test_extension_headers_and_fragments_hide_nothing(lab: Lab, privileged: bool) -> None:
    """A port is denied wherever its number stands in the packet, and however the packet is cut."""
    rules = (parse_egress_rule("deny udp:*:53"), parse_egress_rule("udp"), parse_egress_rule("deny all"))
    container = lab.container(2, EgressPolicy(DefaultAction.DENY, rules), privileged=privileged)
    own = container.link.address_v6
    before = strays(lab.outside)
    options = bytes([UDP, 0, 1, 4, 0, 0, 0, 0])  # PadN
    two_options = bytes([DESTINATION_OPTIONS]) + options[1:] + options
    whole = datagram(own, OUTSIDE_IP_V6, data=b"x" * 24)
    atomic = bytes([UDP, 0]) + struct.pack(">HI", 0, 7)

    def fragment(offset: int, more: int, piece: bytes, number: int) -> bytes:
        header = bytes([UDP, 0]) + struct.pack(">HI", offset | more, number)
        return whole[:4] + struct.pack(">HB", 8 + len(piece), FRAGMENT) + whole[7:40] + header + piece

    hidden = [
        datagram(own, OUTSIDE_IP_V6),
        datagram(own, OUTSIDE_IP_V6, headers=options, first=DESTINATION_OPTIONS),
        datagram(own, OUTSIDE_IP_V6),
        datagram(own, OUTSIDE_IP_V6, headers=options, first=DESTINATION_OPTIONS),
        datagram(own, OUTSIDE_IP_V6, headers=two_options, first=DESTINATION_OPTIONS),
        datagram(own, OUTSIDE_IP_V6, headers=atomic, first=FRAGMENT),
        fragment(0, 1, whole[40:48], 8),
        fragment(8, 0, whole[48:], 8),
        fragment(16, 0, whole[56:], 9),  # the last before the first
        fragment(0, 1, whole[40:56], 9),
    ]
    for packet in hidden:
        for order in (("raw_v6", packet.hex(), OUTSIDE_IP_V6), ("frame", frame(container, packet))):
            with suppress(Refused):  # at once, which is as well
                container.order(*order)
    assert_only_last_arrives(lab, container, before)


def test_no_connection_is_made_up_on_loopback(lab: Lab) -> None:
    """A packet to itself in the name of a host outside must not make its own datagrams to that host replies."""
    container = lab.container(2, CLOSED)
    before = strays(lab.outside)
    for destination in (container.link.address_v6, "::1"):
        forged = datagram(OUTSIDE_IP_V6, destination, port=4096)
        container.order("raw_v6", forged.hex(), destination)
        with pytest.raises(Refused, match="EPERM"):
            container.order(
                "raw_v6", datagram(container.link.address_v6, OUTSIDE_IP_V6, port=4096).hex(), OUTSIDE_IP_V6
            )
    assert_only_last_arrives(lab, container, before)


def test_host_ends_have_no_address_of_the_kernels_choice(lab: Lab) -> None:
    """By a link-local one a container would reach the host past the rules that name its addresses."""
    container = lab.container(2, OPEN, privileged=True)
    with open("/proc/thread-self/net/if_inet6") as file:
        held = {line.split()[-1]: IPv6Address(int(line.split()[0], 16)) for line in file}
    assert container.link.host_link not in held
    assert held[lab.plan.anchor_link] == lab.plan.gateway_v6


def test_host_that_begins_to_forward_keeps_taking_routes_where_it_did(lab: Lab) -> None:
    """Forwarding alone would have it ignore router advertisements, and lose its default route with the next."""
    conf = Path("/proc/sys/net/ipv6/conf")
    (conf / "all/forwarding").write_text("0")
    (conf / "uplink/accept_ra").write_text("1")
    with Rtnetlink() as netlink:
        netlink.add_bridge("refuser", b"\x02\x00\x00\x00\x00\x09")
    (conf / "refuser/accept_ra").write_text("0")
    lab.network.ensure_host(HostPolicy())
    assert (conf / "all/forwarding").read_text() == "1\n"
    assert (conf / "uplink/accept_ra").read_text() == "2\n"
    assert (conf / "refuser/accept_ra").read_text() == "0\n"


def test_giving_up_a_pool_leaves_nothing_of_it(lab: Lab) -> None:
    """Gateway address and route; the rest of the network stays."""
    lab.network.forget_pool(POOL)
    assert "fd67" not in output("ip", "-6", "route") + output("ip", "-6", "address")
    lab.network.forget_pool(POOL)
    lab.network.remove_host()
    lab.network.forget_pool(POOL)
    assert "garden" not in output("nft", "list", "tables")


def test_giving_up_a_pool_takes_nobody_elses_route(lab: Lab) -> None:
    """The kernel deletes an IPv6 route by its network, whatever kind of route it is."""
    other = "fd12::/64"
    subprocess.run(
        ["ip", "route", "add", other, "via", OUTSIDE_IP_V6, "proto", "static"], check=True, timeout=20
    )
    lab.network.forget_pool(IPv6Network(other))
    assert other in output("ip", "-6", "route")
    subprocess.run(["ip", "route", "add", "unreachable", other, "metric", "2048"], check=True, timeout=20)
    lab.network.forget_pool(IPv6Network(other))
    assert "via" in output("ip", "-6", "route", "show", other)


@both
def test_another_pool_leaves_nothing_of_the_former_in_force(lab: Lab, privileged: bool) -> None:
    """A server that starts with it finds containers with addresses of the former: those can do nothing with them."""
    policy = EgressPolicy(DefaultAction.ALLOW, (parse_egress_rule(f"deny all:[{OUTSIDE_IP_V6}]"),))
    container = lab.container(2, policy, privileged=privileged)
    container.order("listen", "::", 8000)
    lab.map_tcp(61001, container, 8000)
    assert lab.outside.try_connect(HOST_IP_V6, 61001) == OUTSIDE_IP_V6
    lab.replace(container, OPEN)
    assert container.try_connect(OUTSIDE_IP_V6, 80) == HOST_IP_V6
    lab.network.forget_pool(POOL)
    with HostNetwork(replace(lab.plan, pool_v6=IPv6Network("fd99::/64"))) as server:
        without = replace(container.link, address_v6="", gateway_v6="")
        host_side = policy if privileged else None
        server.ensure_host(
            HostPolicy(), host_firewall.compile_attach(lab.plan, without, host_side_policy=host_side)
        )
        assert container.try_connect(OUTSIDE_IP_V6, 80, patience_s=1) not in (
            HOST_IP_V6,
            container.link.address_v6,
        )
        assert lab.outside.try_connect(HOST_IP_V6, 61001) == "ECONNREFUSED"
        server.forget_pool(IPv6Network("fd99::/64"))


def test_next_owner_of_an_address_has_no_part_in_connections_of_the_former(lab: Lab) -> None:
    """What the kernel still takes for established must not let a closed container out."""
    former = lab.container(2, OPEN)
    own = former.link.address_v6
    former.order("raw_v6", datagram(own, OUTSIDE_IP_V6).hex(), OUTSIDE_IP_V6)
    answer = datagram(OUTSIDE_IP_V6, HOST_IP_V6, port=4096)
    answer = answer[:40] + struct.pack(">HH", 53, 4096) + answer[44:46] + answer[46:]
    lab.outside.order("raw_v6", answer.hex(), HOST_IP_V6)  # the connection is established from now on
    lab.detach(former)
    closed = lab.container(2, CLOSED, privileged=True)
    before = strays(lab.outside)
    closed.order("raw_v6", datagram(own, OUTSIDE_IP_V6).hex(), OUTSIDE_IP_V6)
    assert_only_last_arrives(lab, closed, before)


def test_next_owner_does_not_answer_for_the_former(lab: Lab) -> None:
    """What somebody had begun with the former owner is established as well, and its replies would pass."""
    for address in (lambda each: each.link.address_v6, lambda each: each.address):
        peer, former = lab.container(3, OPEN), lab.container(2, OPEN)
        peer.order("send_from", 4096, address(former), 53)
        former.order("send_from", 53, address(peer), 4096)
        lab.detach(former)
        closed = lab.container(2, CLOSED, privileged=True)
        before = strays(peer) + strays_v4(peer)
        closed.order("send_from", 53, address(peer), 4096)
        lab.replace(closed, OPEN)
        closed.order("send_from", 53, address(peer), 4097)
        wait_until(lambda: strays(peer) + strays_v4(peer) > before, "the datagram that is allowed")  # noqa: B023
        assert strays(peer) + strays_v4(peer) == before + 1
        lab.detach(closed)
        lab.detach(peer)


def test_connections_in_other_zones_stay(lab: Lab) -> None:
    """Somebody else keeps equal addresses apart by conntrack zones."""
    rule = "ip daddr 127.0.0.9 ct zone set 5"
    hook = "type filter hook output priority -300"
    table = f"table inet zones {{\nchain out {{\n{hook}\n{rule}\n}}\n}}\n"
    subprocess.run(["nft", "-f", "-"], input=table, check=True, text=True, timeout=20)
    for name in ("127.0.0.9", "127.0.0.8"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("127.0.0.7", 0))
            sender.sendto(b"", (name, 9))
    address = IPv4Address("127.0.0.7")
    assert forget_connections(address, (Side.ORIGINAL, Side.REPLY)) == 1
    assert forget_connections(address, (Side.ORIGINAL,)) == 0


@pytest.mark.parametrize("address", ["10.9.9.9", "fd99::9"])
def test_many_connections_are_forgotten_in_batches(lab: Lab, address: str) -> None:
    """More than one message's worth, and all of them."""
    subprocess.run(["ip", "address", "add", address, "dev", "lo", "nodad"], check=True, timeout=20)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in range(300):
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.bind((address, 0))
            sender.sendto(b"", (address, 20000 + port))
    assert forget_connections(ip_address(address), (Side.ORIGINAL, Side.REPLY)) >= 300
    assert forget_connections(ip_address(address), (Side.ORIGINAL, Side.REPLY)) == 0
