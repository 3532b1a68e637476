"""What is foretold of a connection where the address itself, or whose it is, decides."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest

from garden_py.backend.linux.explanation import Surroundings, explain
from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.net.host_firewall import Reach
from garden_py.backend.net.plan import HostPlan
from garden_py.model.netrule import Cause, Destination, EgressPolicy, RuleAction

HOST = HostPlan("3fa1", IPv4Network("10.254.0.0/22"), IPv4Address("10.254.0.1"), IPv6Network("fd67::/64"))
AROUND = Surroundings(
    host=HOST,
    denied=(),
    dns_servers=(IPv6Address("fd67::afe:1"),),
    host_access=False,
    reach=Reach.SUBNET,
    host_addresses={IPv4Address("192.0.2.1"), IPv6Address("fd67::afe:1"), IPv6Address("2001:db8::")},
    subnets=(IPv4Network("10.80.0.0/24"),),
    containers=frozenset({IPv4Address("10.80.0.3"), IPv6Address("fd67::a50:3"), IPv6Address("fd67::afe:9")}),
    mapped_ports={(4, "tcp", 61001), (4, "tcp", 61002), (6, "tcp", 61002)},
)
LEASE = NetworkLease(
    IPv4Address("10.80.0.2"), (), IPv4Network("10.80.0.0/24"), address_v6=IPv6Address("fd67::a50:2")
)
DENY, ALLOW = RuleAction.DENY, RuleAction.ALLOW


@pytest.mark.parametrize(
    ("asked", "action", "cause"),
    [
        ("[fd67::a50:2]:80", ALLOW, Cause.LOOPBACK),
        ("[::1]:80", ALLOW, Cause.LOOPBACK),
        ("[::]:80", ALLOW, Cause.LOOPBACK),
        ("0.0.0.0:80", ALLOW, Cause.LOOPBACK),
        ("[fe80::1]:80", DENY, Cause.MARTIAN),
        ("[ff02::1]:80", DENY, Cause.MARTIAN),
        ("[fd67::a50:3]:80", ALLOW, Cause.DEFAULT),
        ("[fd67::afe:9]:80", DENY, Cause.CONTAINERS),
        ("[fd67::afe:8]:80", DENY, Cause.UNREACHABLE),
        ("[fd67::afe:1]:80", DENY, Cause.HOST),
        ("[fd67::afe:1]:53", ALLOW, Cause.DEFAULT),
        ("[2001:db8::]:80", DENY, Cause.HOST),
        ("192.0.2.1:61001", ALLOW, Cause.DEFAULT),
        ("[fd67::afe:1]:61001", DENY, Cause.HOST),
        ("[fd67::afe:1]:61002", ALLOW, Cause.DEFAULT),
        ("[::ffff:192.0.2.1]:61001", ALLOW, Cause.DEFAULT),
        ("[2001:db8::1]:80", ALLOW, Cause.DEFAULT),
    ],
)
def test_address_decides(asked: str, action: RuleAction, cause: Cause) -> None:
    """Of the container itself, others, the host, nobody, everybody else."""
    found = explain(AROUND, LEASE, EgressPolicy(), Destination.parse("tcp", asked))
    assert (found.action, found.cause) == (action, cause)


def test_echo_requests_have_a_number_of_their_own_in_each_version() -> None:
    """The gateway answers them, and nothing else of the kind."""
    around = replace(AROUND, host_addresses={*AROUND.host_addresses, HOST.gateway})
    for asked, action in (
        ("[fd67::afe:1]", ALLOW), ("[fd67::afe:1]:128", ALLOW), ("[fd67::afe:1]:8", DENY),
        ("10.254.0.1", ALLOW), ("10.254.0.1:128", DENY),
    ):  # fmt: skip
        found = explain(around, LEASE, EgressPolicy(), Destination.parse("icmp", asked))
        assert found.action is action, asked


def test_container_without_ipv6() -> None:
    """It has an address of another pool, or none."""
    lease = replace(LEASE, address_v6=None)
    assert (
        explain(AROUND, lease, EgressPolicy(), Destination.parse("tcp", "[2001:db8::1]:80")).cause
        is Cause.IPV6
    )
