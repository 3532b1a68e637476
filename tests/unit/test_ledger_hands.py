"""What the ledger may take from the pools of a running server, and what it gives back."""

from __future__ import annotations

from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest

from garden_py.backend.ledger.leases import Sight
from garden_py.backend.linux.hands import ServerHands
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.site import UidPool
from garden_py.config import load_config
from garden_py.model.errors import PortInUse
from garden_py.model.leak import Direction, Leak, LeakKind
from garden_py.model.spec import PortMapping, Transport

PORT = 61_001


@pytest.fixture
def network() -> LinuxNetwork:
    """Pools of addresses and ports; no launcher is asked for anything here."""
    launcher: Any = None
    return LinuxNetwork(
        load_config({"network_pool": "10.9.0.0/29"}, environ={}), launcher, 1500, lambda *_: None
    )


@pytest.fixture
def hands(network: LinuxNetwork) -> ServerHands:
    """Over those pools and one of uid ranges."""
    site: Any = SimpleNamespace(uids=UidPool(0x7000_0000, 4))
    launcher: Any = SimpleNamespace(pid=1)
    plugins: Any = SimpleNamespace(launcher_pid=None)
    return ServerHands(site, launcher, network, plugins)


def test_launchers_sessions_are_those_there_are(hands: ServerHands) -> None:
    """The one for plugins is started only when one is called."""
    assert hands.launcher_sessions() == {1}


def test_what_is_held_is_given_to_nobody_and_comes_back(hands: ServerHands, network: LinuxNetwork) -> None:
    """A removal must not take what a create has just been given."""
    lowest = IPv4Address("10.9.0.2")
    with hands.hold(lowest, ("tcp", PORT)):
        assert network.addresses.allocate() != lowest
        with pytest.raises(PortInUse):
            network.lease_port(PortMapping(PORT, 80, Transport.TCP))
        network.lease_port(PortMapping(PORT, 80, Transport.UDP))
    assert network.addresses.allocate() == lowest
    network.lease_port(PortMapping(PORT, 80, Transport.TCP))


def test_what_was_taken_already_stays_taken(hands: ServerHands, network: LinuxNetwork) -> None:
    """A leaked lease is given back as a leak of its own, not in passing."""
    lease = network.lease((PortMapping(PORT, 80, Transport.TCP),))
    with hands.hold(lease.address, ("tcp", PORT)):
        pass
    assert hands.leases() == Sight(frozenset({str(lease.address)}), frozenset({("tcp", PORT)}))


def test_address_outside_the_pool_needs_no_hold(hands: ServerHands, network: LinuxNetwork) -> None:
    """Nobody can be given it."""
    with hands.hold(IPv4Address("192.0.2.1"), None):
        assert network.addresses.taken == frozenset()


def test_leases_of_nobody_are_given_back(hands: ServerHands, network: LinuxNetwork) -> None:
    """All three kinds, twice if asked."""
    lease = network.lease((PortMapping(PORT, 80, Transport.TCP),))
    hands._site.uids.reserve(2)
    for kind, name in (
        (LeakKind.ADDRESS, str(lease.address)),
        (LeakKind.PORT, f"tcp {PORT}"),
        (LeakKind.UID_RANGE, "2"),
    ):
        for _ in range(2):
            hands.give_back(Leak(kind, Direction.ORPHAN, name))
    assert hands.leases() == Sight()
