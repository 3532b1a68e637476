"""Address and port bookkeeping."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.backend.net.pools import AddressPool, PortPool, Subnets
from garden_py.model.errors import InvalidField, PoolExhausted, PortInUse, SubnetFull
from garden_py.model.network import SubnetChoice


def address_pool(text: str = "10.254.0.0/29") -> AddressPool:
    return AddressPool(IPv4Network(text))


def test_lowest_free_address_goes_first() -> None:
    """Addresses stay predictable: the first container after the gateway has .2."""
    pool = address_pool()
    assert [str(pool.allocate()) for _ in range(3)] == ["10.254.0.2", "10.254.0.3", "10.254.0.4"]
    pool.release(IPv4Address("10.254.0.3"))
    pool.release(IPv4Address("10.254.0.2"))
    assert [str(pool.allocate()) for _ in range(3)] == ["10.254.0.2", "10.254.0.3", "10.254.0.5"]


def test_ports_that_somebody_else_has_are_passed_over() -> None:
    """And are none of ours; when all are somebody's there is none left."""
    pool = PortPool(100, 4)
    assert [pool.allocate(lambda port: port in (100, 102)) for _ in range(2)] == [101, 103]
    with pytest.raises(PoolExhausted):
        pool.allocate(lambda port: True)
    assert pool.taken == {101, 103}


def test_exhausted_address_pool_names_its_flag() -> None:
    """The operator must learn which setting to change."""
    pool = address_pool()
    for _ in range(5):
        pool.allocate()
    with pytest.raises(PoolExhausted) as caught:
        pool.allocate()
    assert (caught.value.pool, caught.value.size, caught.value.flag) == ("addresses", 5, "--network-pool")


@pytest.mark.parametrize(
    ("avoided", "size", "given"),
    [
        (["10.254.0.4/30"], 2, [2, 3]),
        (["10.254.0.3/32", "10.254.0.2/31"], 3, [4, 5, 6]),
        (["10.0.0.0/8", "192.0.2.0/24"], 0, []),
        (["192.0.2.0/24"], 5, [2, 3, 4, 5, 6]),
    ],
)
def test_addresses_that_others_have_are_not_given_out(
    avoided: list[str], size: int, given: list[int]
) -> None:
    """Nor when somebody who has one gives it back; the size says how many are left."""
    pool = address_pool()
    pool.reserve(IPv4Address("10.254.0.5"))
    pool.avoid(IPv4Network(each) for each in avoided)
    pool.release(IPv4Address("10.254.0.5"))
    assert pool.size == size
    assert [int(pool.allocate()) & 0xFF for _ in range(size)] == given
    with pytest.raises(PoolExhausted):
        pool.allocate()


@pytest.mark.parametrize("address", ["10.254.0.0", "10.254.0.1", "10.254.0.7", "10.254.1.2", "10.254.0.3"])
def test_addresses_that_cannot_be_had_are_refused(address: str) -> None:
    """Network, gateway and broadcast address, one outside, one taken."""
    pool = address_pool()
    pool.reserve(IPv4Address("10.254.0.3"))
    with pytest.raises(InvalidField) as caught:
        pool.reserve(IPv4Address(address))
    assert caught.value.field == "network"


def test_too_small_a_pool_is_refused() -> None:
    """A /30 would hold one container and most likely is a mistyped /20."""
    with pytest.raises(InvalidField):
        address_pool("10.254.0.0/30")


@given(
    st.lists(st.tuples(st.sampled_from(["allocate", "release", "reserve"]), st.integers(2, 6)), max_size=60)
)
def test_no_address_is_ever_held_twice(steps: list[tuple[str, int]]) -> None:
    """Whatever the order of calls, an address has one holder, and none is lost."""
    pool, held = address_pool(), set[IPv4Address]()
    for action, number in steps:
        address = pool.network[number]
        if action == "release":
            pool.release(address)
            held.discard(address)
        elif action == "reserve" and address not in held:
            pool.reserve(address)
            held.add(address)
        elif action == "allocate" and len(held) < pool.size:
            expected = min(set(pool.network.hosts()) - held - {pool.gateway})
            assert pool.allocate() == expected
            held.add(expected)
        assert pool.in_use == len(held)


def test_a_freed_port_is_not_reused_at_once() -> None:
    """A client of the old container must find the port closed, not a stranger behind it."""
    pool = PortPool(61001, 3)
    first = pool.allocate()
    pool.release(first)
    assert [pool.allocate() for _ in range(3)] == [61002, 61003, 61001]


def test_exhausted_port_pool_names_its_flag() -> None:
    """The operator must learn which setting to change."""
    pool = PortPool(61001, 1)
    pool.allocate()
    with pytest.raises(PoolExhausted) as caught:
        pool.allocate()
    assert (caught.value.pool, caught.value.size, caught.value.flag) == ("ports", 1, "--port-pool-size")


def test_a_taken_port_is_refused_and_never_handed_out() -> None:
    """Chosen ports may lie inside the pool's range or outside."""
    pool = PortPool(61001, 2)
    pool.reserve(61001)
    pool.reserve(80)
    for port in (61001, 80):
        with pytest.raises(PortInUse) as caught:
            pool.reserve(port)
        assert caught.value.port == port
    assert pool.allocate() == 61002
    with pytest.raises(InvalidField):
        pool.reserve(0)


@pytest.mark.parametrize(("start", "size"), [(0, 5), (61001, 0), (65535, 2)])
def test_port_range_must_be_of_ports(start: int, size: int) -> None:
    """A range beyond 65535 would fail later, at somebody's create."""
    with pytest.raises(InvalidField):
        PortPool(start, size)


@pytest.mark.parametrize(
    ("text", "network", "address"),
    [
        ("10.80.0.0/24", "10.80.0.0/24", None),
        ("10.80.0.0", "10.80.0.0/30", None),
        ("10.80.0.7/24", "10.80.0.0/24", "10.80.0.7"),
        ("10.80.0.6", "10.80.0.4/30", "10.80.0.6"),
    ],
)
def test_subnets_are_read_as_garden_writes_them(text: str, network: str, address: str | None) -> None:
    """N2: /30 without a size; host bits choose the address."""
    found = SubnetChoice.parse(text)
    assert (str(found.network), found.address and str(found.address)) == (network, address)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ten", "invalid CIDR address: ten"),
        ("10.80.0.1/24", "a container IP must not equal the gateway IP"),
        ("10.80.0.255/24", "a container IP must not equal the broadcast IP"),
        ("10.80.0.2/31", "is not of a size"),
        ("0.0.0.0/0", "is not of a size"),
        ("0.0.0.0/8", "0.0.0.0/8 is not a network of unicast addresses"),
        ("224.1.2.3/24", "224.1.2.0/24 is not a network of unicast addresses"),
        ("2001:db8::/64", "invalid CIDR address: 2001:db8::/64"),
    ],
)
def test_bad_subnets_are_refused(text: str, problem: str) -> None:
    """N4, in the words that clients know."""
    with pytest.raises(InvalidField, match=re.escape(problem)):
        SubnetChoice.parse(text)


def test_subnets_come_and_go_with_their_containers() -> None:
    """N3, N4, N5: shared, never overlapping, free again with the last one."""
    subnets = Subnets(IPv4Network("10.254.0.0/22"))

    def lease(text: str) -> str:
        return str(subnets.lease(SubnetChoice.parse(text)))

    def refused(text: str) -> str:
        with pytest.raises(InvalidField) as caught:
            lease(text)
        return caught.value.problem

    assert [lease("10.80.0.0/29") for _ in range(5)] == [f"10.80.0.{n}" for n in range(2, 7)]
    full = "insufficient IPs remaining in the pool: all 5 addresses of 10.80.0.0/29 are in use"
    with pytest.raises(SubnetFull, match=re.escape(full)):
        lease("10.80.0.0/29")
    assert refused("10.80.0.3/29") == "the requested IP is already allocated"
    overlap = "the requested subnet (10.80.0.0/24) overlaps an existing subnet (10.80.0.0/29)"
    assert refused("10.80.0.9/24") == overlap
    overlap = "the requested subnet (10.254.1.0/24) overlaps the dynamic allocation range (10.254.0.0/22)"
    assert refused("10.254.1.0/24") == overlap
    subnets.release(IPv4Network("10.80.0.0/29"), IPv4Address("10.80.0.4"))
    assert lease("10.80.0.0/29") == "10.80.0.4"
    for address in list(subnets.taken):
        subnets.release(IPv4Network("10.80.0.0/29"), address)
        subnets.release(IPv4Network("10.80.0.0/29"), address)
    assert subnets.networks == ()
    assert lease("10.80.0.0/24") == "10.80.0.2"
