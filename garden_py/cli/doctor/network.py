"""Checks of the network: nftables by real transactions, links, the address pool, forwarding."""

from __future__ import annotations

import ipaddress
import socket
import struct
from pathlib import Path
from typing import Final

from garden_py.agent.nft import Nft, NftError, load_library
from garden_py.agent.rtnetlink import Rtnetlink, VethEnd
from garden_py.backend.host import syscalls
from garden_py.backend.host.listeners import is_datagram_read_at
from garden_py.backend.net import conntrack
from garden_py.backend.net.firewall import DNS_PORT
from garden_py.backend.net.plan import HostPlan
from garden_py.backend.rootfs.host_names import read_host_resolv_conf
from garden_py.backend.rootfs.names import build_resolv_conf, find_resolver_problem, read_name_servers
from garden_py.cli.doctor.finding import Doubt, Finding, Level, judge
from garden_py.cli.doctor.trial import attempt

# What the server asks of nf_tables: connection tracking, sets and maps, counters, address translation.
_HOST_TABLE: Final = """
table inet garden_doctor {
    set addresses { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }
    map ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
    chain forward {
        type filter hook forward priority 0; policy accept;
        ct state established,related accept
        ip daddr @addresses counter reject with icmp type admin-prohibited
    }
    chain postrouting {
        type nat hook postrouting priority 100;
        ip saddr 10.0.0.0/8 masquerade
    }
    chain prerouting {
        type nat hook prerouting priority -100;
        dnat ip to meta l4proto . th dport map @ports
    }
}
"""
_LOG_RULE: Final = """
table inet garden_doctor {
    chain output {
        type filter hook output priority 0;
        ct state new log group 7
    }
}
"""
_LINK_TABLE: Final = """
table netdev garden_doctor {
    chain egress {
        type filter hook egress device "lo" priority filter; policy drop;
        meta rtclassid 103 accept
    }
}
"""
_BRIDGE_TABLE: Final = """
table bridge garden_doctor {
    chain forward {
        type filter hook forward priority 0;
    }
}
"""


def _transaction(text: str) -> str:
    def run() -> None:
        nft = Nft()
        try:
            nft.run(text)
        except NftError as error:
            raise OSError(error.message) from error
        finally:
            nft.close()

    return attempt(run, namespaces=syscalls.CLONE_NEWNET)


def check_libnftables() -> Finding:
    """The server changes rules through the library, not through the nft program."""
    try:
        load_library()
        failure = ""
    except OSError as error:
        failure = str(error)
    doubt = Doubt(Level.FAIL, "no container gets a network", "apt install libnftables1")
    return judge("libnftables", failure, "loads", doubt)


def check_nf_tables() -> Finding:
    """Connection tracking, sets, maps and address translation, in one transaction as the server makes it."""
    doubt = Doubt(
        Level.FAIL,
        "no container gets a network",
        "kernel with CONFIG_NF_TABLES_INET, NFT_CT, NFT_NAT, NFT_MASQ, NFT_REJECT",
    )
    return judge("nf_tables", _transaction(_HOST_TABLE), "a whole table goes in", doubt)


def check_nflog() -> Finding:
    """Every refusal is reported through an NFLOG group, and so is what rules with `log` allow."""
    doubt = Doubt(
        Level.FAIL,
        "no container gets a network",
        "kernel with CONFIG_NFT_LOG and CONFIG_NETFILTER_NETLINK_LOG",
    )
    return judge("nf_tables log", _transaction(_LOG_RULE), "works", doubt)


def check_ctnetlink() -> Finding:
    """Connections of an address are forgotten before somebody else gets it."""
    doubt = Doubt(Level.FAIL, "the server does not start", "kernel with CONFIG_NF_CT_NETLINK")
    failure = attempt(conntrack.probe, namespaces=syscalls.CLONE_NEWNET)
    return judge("ctnetlink", failure, "works", doubt)


def check_link_egress() -> Finding:
    """Where a policy refuses anything, frames that a container makes by hand are dropped at its link."""
    doubt = Doubt(
        Level.FAIL,
        "no container with an egress policy that refuses anything can be made",
        "kernel with CONFIG_NETFILTER_EGRESS (5.16), CONFIG_NF_TABLES_NETDEV and CONFIG_IP_ROUTE_CLASSID",
    )
    return judge("nf_tables egress", _transaction(_LINK_TABLE), "works", doubt)


def check_bridge_family() -> Finding:
    """Only wanted to filter between containers on a switching bridge, which the server does not use."""
    failure = _transaction(_BRIDGE_TABLE)
    if failure:
        return Finding("nf_tables bridge", Level.OK, "not in this kernel; not needed: links are routed")
    return Finding("nf_tables bridge", Level.OK, "works; not needed: links are routed")


def check_links() -> Finding:
    """The kinds of links that containers hang on."""

    def make() -> None:
        with Rtnetlink() as netlink:
            netlink.add_bridge("gdoctor0", bytes([2, 0, 0, 0, 0, 1]))
            near, far = (VethEnd(f"gdoctor{n}", bytes([2, 0, 0, 0, 0, n])) for n in (2, 3))
            netlink.add_veth(near, far, mtu=1500)

    failure = attempt(make, namespaces=syscalls.CLONE_NEWNET)
    doubt = Doubt(Level.FAIL, "no container gets a network", "modprobe bridge; modprobe veth")
    return judge("links", failure, "bridge and veth can be made", doubt)


def check_address_pool(pool: ipaddress.IPv4Network, tag: str) -> Finding:
    """Whether the host has a route of somebody else into the containers' addresses.

    Args:
        pool: of the server.
        tag: of its links, whose routes are its own.
    """
    plan = HostPlan(tag, pool, pool[1])
    overlapping = [
        (network, link)
        for network, link in overlapping_routes(pool, Path("/proc/net/route").read_text())
        # A route without a link is one that makes its destination unreachable, as a server's of its pool.
        if not (link == "*" and network == pool) and not link.startswith((plan.link_prefix, plan.anchor_link))
    ]
    if not overlapping:
        return Finding("address pool", Level.OK, f"{pool} is free: {pool.num_addresses - 3} containers")
    shown = ", ".join(f"{network} on {link}" for network, link in overlapping)
    return Finding(
        "address pool",
        Level.WARN,
        f"{pool} overlaps with {shown}",
        "containers and hosts there cannot tell each other apart: a server without containers does not start, one with "
        "containers goes on and gives none of these addresses to new ones",
        "garden server --network-pool with another range, or remove the route and start the server again",
    )


def overlapping_routes(
    pool: ipaddress.IPv4Network, route_table: str
) -> list[tuple[ipaddress.IPv4Network, str]]:
    """Routes other than the default that touch the pool, from the text of /proc/net/route. Pure."""
    found = []
    for line in route_table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[7] == "00000000":
            continue
        # Addresses are hexadecimal in the host's byte order (proc_net_route(5): as the kernel stores them).
        destination, mask = (struct.pack("=I", int(fields[column], 16)) for column in (1, 7))
        network = ipaddress.IPv4Network((destination, str(ipaddress.IPv4Address(mask))))
        if network.overlaps(pool):
            found.append((network, fields[0]))
    return found


def check_names(pool: ipaddress.IPv4Network, dns_servers: tuple[str, ...], *, has_ipv6: bool) -> Finding:
    """Whether containers are told of a DNS server that can answer them."""
    told = build_resolv_conf(read_host_resolv_conf(), dns_servers, str(pool[1]))
    problem, remedy = find_resolver_problem(
        told, str(pool[1]), gateway_answers=is_datagram_read_at(pool[1], DNS_PORT), has_ipv6=has_ipv6
    )
    if problem:
        return Finding("names", Level.WARN, problem, "containers find no host by its name", remedy)
    return Finding("names", Level.OK, f"containers ask {', '.join(read_name_servers(told))}")


def check_forwarding() -> Finding:
    """The server turns it on by itself; this tells whether that changes something."""
    on = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
    return Finding("ip_forward", Level.OK, "on" if on else "off; the server turns it on")


def check_ipv6(pool: ipaddress.IPv6Network) -> Finding:
    """Whether containers can have the IPv6 addresses that were asked for."""
    conf = Path("/proc/sys/net/ipv6/conf")
    if not conf.exists():
        cost, remedy = (
            "no container has IPv6, and a server that is asked to give it does not start",
            "ipv6.disable=0",
        )
        return Finding("ipv6", Level.FAIL, "the kernel has none, or it is off", cost, remedy)
    off = [
        name for name in ("all", "default", "lo") if (conf / name / "disable_ipv6").read_text().strip() == "1"
    ]
    if off:
        cost = (
            "containers reach each other by IPv6, and perhaps nobody else; what cannot be reached is not told"
        )
        remedy = " ".join(f"sysctl net.ipv6.conf.{name}.disable_ipv6=0" for name in off)
        return Finding("ipv6", Level.WARN, f"it is turned off for {', '.join(off)}", cost, remedy)
    with Rtnetlink() as netlink:
        routes = netlink.routes(socket.AF_INET6)
    taken = [r.destination for r in routes if r.destination.prefixlen and r.destination.overlaps(pool)]
    if taken:
        return Finding(
            "ipv6",
            Level.WARN,
            f"{pool} overlaps with the route {taken[0]}",
            "if that is no garden server of yours, it does not start",
            "garden server --network-pool-v6 with another prefix",
        )
    forwards = (conf / "all/forwarding").read_text().strip() != "0"
    return Finding(
        "ipv6", Level.OK, f"{pool} is free; forwarding is {'on' if forwards else 'turned on by the server'}"
    )


def check_conntrack() -> Finding:
    """Each connection of a container takes an entry."""
    path = Path("/proc/sys/net/netfilter/nf_conntrack_max")
    if not path.exists():
        return Finding("conntrack", Level.OK, "not loaded yet; the server's first rule loads it")
    entries = int(path.read_text())
    if entries >= 65_536:
        return Finding("conntrack", Level.OK, f"{entries} entries")
    return Finding(
        "conntrack",
        Level.WARN,
        f"{entries} entries",
        "busy containers run out of connections",
        "sysctl net.netfilter.nf_conntrack_max=262144",
    )
