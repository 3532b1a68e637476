"""Names, MACs and the MTU: limits of the kernel kept, and everything derived from the address alone."""

from __future__ import annotations

import dataclasses
import json
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.backend.net.host_firewall import PortMapping, PortProtocol
from garden_py.backend.net.messages import Attachment, Foreign, HostReport
from garden_py.backend.net.plan import (
    HostPlan,
    LinkPlan,
    address_of_link,
    choose_mtu,
    host_link_name,
    plan_link,
)
from garden_py.backend.net.survey import Survey

HOST = HostPlan("3fa1", IPv4Network("10.254.0.0/22"), IPv4Address("10.254.0.1"))


def test_link_is_named_after_server_and_address() -> None:
    """`ip link` on the host tells whose link it is."""
    link = plan_link(HOST, IPv4Address("10.254.1.15"), handle="web", mtu_bytes=1400)
    assert link == LinkPlan(
        host_link="gdn3fa1-10f",
        container_link="eth0",
        host_mac="06:00:0a:fe:01:0f",
        container_mac="02:00:0a:fe:01:0f",
        address="10.254.1.15",
        gateway="10.254.0.1",
        mtu_bytes=1400,
        alias="web",
    )


def test_names_fit_the_kernel_even_in_the_largest_pool() -> None:
    """IFNAMSIZ leaves 15 bytes; a longer name is refused by the kernel at create."""
    host = HostPlan("ffff", IPv4Network("0.0.0.0/4"), IPv4Address("0.0.0.1"))
    link = plan_link(host, IPv4Address("15.255.255.254"), handle="x", mtu_bytes=1500)
    assert len(link.host_link) == 15
    assert not host.anchor_link.startswith(host.link_prefix)


def test_long_handles_are_cut_at_a_character() -> None:
    """An alias holds 255 bytes; half a character would not be text any more."""
    link = plan_link(HOST, IPv4Address("10.254.0.2"), handle="é" * 200, mtu_bytes=1500)
    assert link.alias == "é" * 127


@pytest.mark.parametrize(
    ("uplink", "wanted", "mtu"),
    [(9000, None, 1500), (1400, None, 1400), (None, None, 1500), (1500, 9000, 9000)],
)
def test_mtu_is_the_uplinks_up_to_1500_unless_chosen(
    uplink: int | None, wanted: int | None, mtu: int
) -> None:
    """Larger packets would be cut at the uplink, or vanish."""
    assert choose_mtu(uplink, wanted_bytes=wanted) == mtu


@pytest.mark.parametrize("tag", ["", "3FA1", "3fa", "3fa1a", "x000", '3fa"'])
def test_tags_that_could_leave_their_place_are_refused(tag: str) -> None:
    """The tag becomes part of link names and of nft text."""
    with pytest.raises(ValueError, match="tag"):
        HostPlan(tag, HOST.pool, HOST.gateway)


@given(st.integers(0, 0xFFFF_FFFF).map(IPv4Address))
def test_every_address_has_a_link_name_of_its_own(address: IPv4Address) -> None:
    """Also one in a subnet that a caller has chosen; the name says which it is."""
    name = host_link_name(HOST, address)
    assert len(name) <= 15
    own = (HOST.pool[0], HOST.gateway, HOST.pool[-1])
    assert address_of_link(HOST, name) == (None if address in own else address)


def test_values_cross_a_process_boundary_unchanged() -> None:
    """They travel as JSON to the helper that carries them out."""
    link = plan_link(HOST, IPv4Address("10.254.0.2"), handle="x", mtu_bytes=1500)
    attachment = Attachment(link, "host", "container")
    mapping = PortMapping(PortProtocol.UDP, 61001, IPv4Address("10.254.0.2"), 53)
    report = HostReport(
        ip_forward_turned_on=True, uplink="eth0", mtu_bytes=1500, foreign=(Foreign("10.254.0.8/29", "route"),)
    )
    survey = Survey({"gdn3fa1-2": "veth"}, anchor=True, table=True, elements=("a b",), chains=("input",))
    for value in (HOST, link, attachment, mapping, report, survey):
        assert type(value).from_json(json.loads(json.dumps(value.to_json()))) == value


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("fd67:6472::afe:0/126", "10.254.0.0/30"),
        ("fd67:6472::/48", "0.0.0.0/0"),
        ("fd67:6472::/96", "0.0.0.0/0"),
        ("fd67:6472::1:0:0:0/80", None),
        ("fd99::/64", None),
    ],
)
def test_ipv4_addresses_that_go_with_an_ipv6_network(network: str, expected: str | None) -> None:
    """Containers' addresses are the first 2^32 of the pool."""
    host = dataclasses.replace(HOST, pool_v6=IPv6Network("fd67:6472::/64"))
    assert host.network_v4(IPv6Network(network)) == (expected and IPv4Network(expected))
    assert HOST.network_v4(IPv6Network(network)) is None
