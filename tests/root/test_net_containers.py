"""What containers can and cannot reach, with real packets between namespaces that the tests make."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from ipaddress import IPv4Address

import pytest
from kit.garden import wait_until
from net_lab import HOST_IP, OUTSIDE_IP, Lab, Probe, Refused, open_lab

from garden_py.agent.rtnetlink import Rtnetlink
from garden_py.backend.net.host_firewall import Access, HostPolicy, PortMapping, PortProtocol, Reach
from garden_py.model.errors import HostFault, PortInUse
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule

pytestmark = pytest.mark.root

ICMP_ECHO_REPLY = 0
OPEN = EgressPolicy(DefaultAction.ALLOW)
CLOSED = EgressPolicy(DefaultAction.DENY)


def only(*rules: str) -> EgressPolicy:
    return EgressPolicy(DefaultAction.DENY, tuple(parse_egress_rule(r) for r in rules))


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


@pytest.mark.parametrize("privileged", [False, True])
def test_egress_follows_each_replacement_and_keeps_established_connections(
    lab: Lab, privileged: bool
) -> None:
    """Promise 3: rules change on a running container, as a whole, without cutting what is established."""
    container = lab.container(2, CLOSED, privileged=privileged)
    assert container.try_connect(OUTSIDE_IP, 80) == "ECONNREFUSED"
    lab.replace(container, only(f"tcp:{OUTSIDE_IP}:80"))
    assert container.try_connect(OUTSIDE_IP, 80) == HOST_IP
    lab.replace(container, CLOSED)
    assert container.try_connect(OUTSIDE_IP, 80) == "ECONNREFUSED"
    assert container.order("exchange", 0) == "ping"


@pytest.mark.parametrize("privileged", [False, True])
def test_first_matching_rule_decides(lab: Lab, privileged: bool) -> None:
    """A deny before a wider allow must win; the other order must not."""
    container = lab.container(2, only(f"deny tcp:{OUTSIDE_IP}:80", "all"), privileged=privileged)
    assert container.try_connect(OUTSIDE_IP, 80) == "ECONNREFUSED"
    lab.replace(container, only("all", f"deny tcp:{OUTSIDE_IP}:80"))
    assert container.try_connect(OUTSIDE_IP, 80) == HOST_IP


@pytest.mark.parametrize("privileged", [False, True])
def test_counters_name_the_rule_that_decided(lab: Lab, privileged: bool) -> None:
    """The question "why was this denied" has an answer."""
    container = lab.container(2, only("udp", f"deny tcp:{OUTSIDE_IP}:80"), privileged=privileged)
    container.try_connect(OUTSIDE_IP, 80)
    if privileged:
        counters = lab.network.read_host_side_counters(container.link)
    else:
        counters = lab.network.read_egress_counters(container.netns_fd, container.userns_fd)
    packets = {counter.rule: counter.packets for counter in counters}
    assert packets[0] == 0
    assert packets[1] >= 1
    assert packets["default"] == 0


def test_a_refused_ruleset_leaves_the_former_in_force(lab: Lab) -> None:
    """One transaction: a bad replacement must not open the container for a moment."""
    container = lab.container(2, CLOSED)
    with pytest.raises(HostFault):
        lab.network.replace_egress(
            "flush ruleset\nadd rule inet nowhere x accept\n", container.netns_fd, container.userns_fd
        )
    assert container.try_connect(OUTSIDE_IP, 80) == "ECONNREFUSED"


def test_containers_have_no_ipv6_but_on_loopback(lab: Lab) -> None:
    """Rules speak of IPv4, so there must be no other way out."""
    container = lab.container(2, OPEN)
    assert container.order("read", "/proc/net/if_inet6").split()[-1::-6] == ["lo"]


def test_mtu_follows_a_smaller_uplink(lab: Lab) -> None:
    """The lab's uplink carries 1400 bytes; a container that sends more would lose packets."""
    container = lab.container(2, OPEN)
    assert lab.report.uplink == "uplink"
    assert json.loads(container.order("output", "ip", "-j", "link", "show", "eth0"))[0]["mtu"] == 1400
    with Rtnetlink() as netlink:
        link = netlink.find_link(container.link.host_link)
    assert link is not None
    assert (link.mtu, link.alias) == (1400, "container-2")


def test_mapped_port_is_reached_from_everywhere(lab: Lab) -> None:
    """From the host by both addresses, from outside, from another container and from the container itself."""
    server, client = lab.container(2, OPEN), lab.container(3, OPEN)
    server.order("listen", "0.0.0.0", 8000)
    lab.map_tcp(61001, server, 8000)
    for address in ("127.0.0.1", HOST_IP, str(lab.plan.gateway)):
        with socket.create_connection((address, 61001), timeout=20) as peer:
            assert peer.makefile().readline(), address
    assert lab.outside.try_connect(HOST_IP, 61001) == OUTSIDE_IP
    assert client.try_connect(HOST_IP, 61001) == client.address
    assert server.try_connect(HOST_IP, 61001) == str(lab.plan.gateway)


def test_unmapped_port_is_closed_again(lab: Lab) -> None:
    """A stale mapping would lead a client to whoever gets the address next."""
    server = lab.container(2, OPEN)
    server.order("listen", "0.0.0.0", 8000)
    mapping = lab.map_tcp(61001, server, 8000)
    lab.network.unmap_port(mapping)
    lab.network.unmap_port(mapping)
    assert lab.outside.try_connect(HOST_IP, 61001) == "ECONNREFUSED"


def test_a_port_is_mapped_once(lab: Lab) -> None:
    """The second container that asks for a host port must not take it from the first."""
    first, second = lab.container(2, OPEN), lab.container(3, OPEN)
    lab.map_tcp(61001, first, 8000)
    lab.map_tcp(61001, first, 8000)
    with pytest.raises(PortInUse) as caught:
        lab.map_tcp(61001, second, 8000)
    assert caught.value.port == 61001


def test_containers_ports_are_closed_to_the_outside(lab: Lab) -> None:
    """Only mapped ports are public, even for a neighbour that knows the way to the pool."""
    server = lab.container(2, OPEN)
    server.order("listen", "0.0.0.0", 8000)
    lab.outside.order("run", "ip", "route", "add", str(lab.plan.pool), "via", HOST_IP)
    assert lab.outside.try_connect(server.address, 8000) == "ECONNREFUSED"


def test_forged_source_addresses_are_dropped(lab: Lab) -> None:
    """A container that gives itself another address, even a neighbour's, gets nothing through."""
    container, neighbour = lab.container(2, OPEN), lab.container(3, OPEN)
    container.order("run", "ip", "addr", "add", f"{neighbour.address}/32", "dev", "eth0")
    assert container.try_connect(OUTSIDE_IP, 80, neighbour.address, patience_s=1) == "timeout"
    assert lab.dropped("spoofed") > 0
    assert container.try_connect(OUTSIDE_IP, 80) == HOST_IP


def test_loopback_services_of_the_host_stay_private(lab: Lab) -> None:
    """route_localnet must not let a container talk to 127.0.0.1 of the host (CVE-2020-8558)."""
    container = lab.container(2, OPEN, privileged=True)
    datagram = udp_datagram(IPv4Address(container.address), IPv4Address("127.0.0.1"))
    macs = (container.link.host_mac + container.link.container_mac).replace(":", "")
    container.order("frame", macs + "0800" + datagram.hex())
    assert lab.dropped("martian") == 1


def udp_datagram(source: IPv4Address, destination: IPv4Address) -> bytes:
    """An empty UDP datagram from port 4096 to port 53 (RFC 791, RFC 768; UDP checksum left out)."""
    header = struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0x4000, 64, socket.IPPROTO_UDP, 0)
    header += source.packed + destination.packed
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack(">H", checksum) + header[12:] + struct.pack(">HHHH", 4096, 53, 8, 0)


def test_host_ends_have_no_ipv6_address(lab: Lab) -> None:
    """With one, a privileged container could reach the host over a protocol that no rule speaks of."""
    container = lab.container(2, OPEN, privileged=True)
    with open("/proc/thread-self/net/if_inet6") as file:
        owners = {line.split()[-1] for line in file}
    assert "lo" in owners
    assert not owners & {container.link.host_link, lab.plan.anchor_link}


def test_host_is_closed_unless_access_is_granted(lab: Lab) -> None:
    """The host's own services are no business of a container's; pinging the gateway is."""
    container = lab.container(2, OPEN)
    with lab.serve(HOST_IP, 7777):
        assert container.try_connect(HOST_IP, 7777) == "ECONNREFUSED"
        assert container.order("ping", str(lab.plan.gateway)) == ICMP_ECHO_REPLY
        lab.network.ensure_host(HostPolicy(host_access=Access.ALLOW))
        assert container.try_connect(HOST_IP, 7777) == container.address


def test_dns_server_on_the_host_is_reachable_where_the_host_is_not(lab: Lab) -> None:
    """A container that was given the host as name server must be able to ask it."""
    container = lab.container(2, OPEN)
    gateway = str(lab.plan.gateway)
    lab.network.ensure_host(HostPolicy(dns_servers=(lab.plan.gateway,)))
    with lab.serve(gateway, 53), lab.serve(gateway, 54):
        assert container.try_connect(gateway, 53) == container.address
        assert container.try_connect(gateway, 54) == "ECONNREFUSED"


def test_containers_reach_each_other_only_if_the_server_allows_it(lab: Lab) -> None:
    """They share no wire: traffic between them is routed, and judged, by the host."""
    server, client = lab.container(2, OPEN), lab.container(3, OPEN)
    server.order("listen", "0.0.0.0", 8000)
    assert client.try_connect(server.address, 8000) == client.address
    lab.network.ensure_host(HostPolicy(reach=Reach.NONE))
    assert client.try_connect(server.address, 8000) == "ECONNREFUSED"


def test_addresses_without_container_are_unreachable(lab: Lab) -> None:
    """Packets to a free address of the pool must not leak to the uplink."""
    container = lab.container(2, OPEN)
    assert container.try_connect("10.254.0.200", 80) == "EHOSTUNREACH"


def test_udp_can_be_mapped(lab: Lab) -> None:
    """The map is keyed by protocol, so tcp and udp of one number are two ports."""
    container = lab.container(2, OPEN)
    tcp = lab.map_tcp(61001, container, 8000)
    udp = type(tcp)(PortProtocol.UDP, 61001, tcp.address, 9000)
    lab.network.map_port(udp)
    lab.network.unmap_port(tcp)
    lab.network.unmap_port(udp)


def test_nothing_stays_open(lab: Lab) -> None:
    """Attaching, replacing and detaching must not leak a descriptor: the helper lives for months."""
    container = lab.container(2, OPEN)
    lab.replace(container, CLOSED)  # by a socket that rests from now on
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        lab.replace(container, CLOSED)
        lab.detach(container)
        lab.network.attach_container(lab.attachment(container, OPEN), container.netns_fd, container.userns_fd)
    assert len(os.listdir("/proc/self/fd")) == before


def udp_strays(probe: Probe) -> int:
    """UDP datagrams that arrived there and that nobody took (RFC 4113, udpNoPorts)."""
    names, values = [
        line.split() for line in probe.order("read", "/proc/net/snmp").splitlines() if "Udp:" in line
    ][:2]
    return int(values[names.index("NoPorts")])


@pytest.mark.parametrize("privileged", [False, True])
def test_hand_made_frames_are_judged_like_any_others(lab: Lab, privileged: bool) -> None:
    """A packet socket (CAP_NET_RAW) passes by the hooks of IP; the policy must hold all the same."""
    container = lab.container(2, CLOSED, privileged=privileged)
    datagram = udp_datagram(IPv4Address(container.address), IPv4Address(OUTSIDE_IP))
    macs = (container.link.host_mac + container.link.container_mac).replace(":", "")
    before = udp_strays(lab.outside)
    for bypass in (False, True):
        with (
            nullcontext() if privileged else pytest.raises(Refused, match="ENOBUFS")
        ):  # judged on the host, or inside
            container.order("frame", macs + "0800" + datagram.hex(), bypass)
    lab.replace(container, OPEN)
    container.order("frame", macs + "0800" + datagram.hex())
    wait_until(lambda: udp_strays(lab.outside) > before, "the datagram that is allowed")
    assert udp_strays(lab.outside) == before + 1


def test_no_connection_is_made_up_on_loopback(lab: Lab) -> None:
    """A packet to itself in the name of a host outside must not make its own datagrams to that host replies."""
    container = lab.container(2, CLOSED)
    before = udp_strays(lab.outside)
    for destination in (container.address, "127.0.0.1"):
        container.order("forge", OUTSIDE_IP, 53, destination, 5555)
        with pytest.raises(Refused, match="EPERM"):
            container.order("send_from", 5555, OUTSIDE_IP, 53)
    assert udp_strays(lab.outside) == before


@pytest.mark.parametrize("privileged", [False, True])
def test_next_owner_of_an_address_has_no_part_in_connections_of_the_former(
    lab: Lab, privileged: bool
) -> None:
    """What the kernel still takes for established must not let a closed container out."""
    former = lab.container(2, OPEN)
    former.order("send_from", 5555, OUTSIDE_IP, 53)  # refused there, by ICMP, which ends nothing
    lab.outside.order("send_from", 53, HOST_IP, 5555)  # an answer: the connection is established from now on
    lab.detach(former)
    closed = lab.container(2, CLOSED, privileged=privileged)
    before = udp_strays(lab.outside)
    with nullcontext() if privileged else pytest.raises(Refused, match="EPERM"):
        closed.order("send_from", 5555, OUTSIDE_IP, 53)
    open_again = lab.container(3, OPEN)
    open_again.order("send_from", 5555, OUTSIDE_IP, 53)  # comes after it, if it comes at all
    wait_until(lambda: udp_strays(lab.outside) > before, "the datagram that is allowed")
    assert udp_strays(lab.outside) == before + 1


def test_datagrams_to_a_former_mapping_reach_nobody(lab: Lab) -> None:
    """A client that goes on sending keeps its connection alive, and would be heard by the next owner."""
    former = lab.container(2, OPEN)
    mapping = PortMapping(PortProtocol.UDP, 61001, IPv4Address(former.address), 9000)
    lab.network.map_port(mapping)
    before = udp_strays(former)
    lab.outside.order("send_from", 7000, HOST_IP, 61001)
    wait_until(lambda: udp_strays(former) > before, "the datagram to the mapped port")
    lab.detach(former, (mapping,))
    owner, other = lab.container(2, OPEN), lab.container(3, OPEN)
    again = PortMapping(PortProtocol.UDP, 61001, IPv4Address(other.address), 9000)
    lab.network.map_port(again)
    lab.outside.order("send_from", 7000, HOST_IP, 61001)
    wait_until(lambda: udp_strays(other) > 0, "the datagram to the port's next owner")
    assert udp_strays(owner) == 0
