"""Address and port bookkeeping."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.backend.net.pools import AddressPool, PortPool
from garden_py.model.errors import InvalidField, PoolExhausted, PortInUse


def address_pool(text: str = "10.254.0.0/29") -> AddressPool:
    return AddressPool(IPv4Network(text))


def test_lowest_free_address_goes_first() -> None:
    """Addresses stay predictable: the first container after the gateway has .2."""
    pool = address_pool()
    assert [str(pool.allocate()) for _ in range(3)] == ["10.254.0.2", "10.254.0.3", "10.254.0.4"]
    pool.release(IPv4Address("10.254.0.3"))
    pool.release(IPv4Address("10.254.0.2"))
    assert [str(pool.allocate()) for _ in range(3)] == ["10.254.0.2", "10.254.0.3", "10.254.0.5"]


def test_exhausted_address_pool_names_its_flag() -> None:
    """The operator must learn which setting to change."""
    pool = address_pool()
    for _ in range(5):
        pool.allocate()
    with pytest.raises(PoolExhausted) as caught:
        pool.allocate()
    assert (caught.value.pool, caught.value.size, caught.value.flag) == ("addresses", 5, "--network-pool")


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
