"""Ports of the host's programs: those that listen, and those that only hold a port."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address

import pytest

from garden_py.backend.host.listeners import is_datagram_read_at, is_listened_on
from garden_py.model.spec import Transport


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
@pytest.mark.parametrize("transport", Transport)
def test_who_listens_is_seen_on_any_address(transport: Transport, family: int, address: str) -> None:
    kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
    with socket.socket(family, kind) as listener:
        listener.bind((address, 0))
        if transport is Transport.TCP:
            listener.listen()
        port = listener.getsockname()[1]
        assert is_listened_on(transport, port)
        other = Transport.UDP if transport is Transport.TCP else Transport.TCP
        assert not is_listened_on(other, port)
    assert not is_listened_on(transport, port)


def test_a_connection_made_from_a_port_is_no_listener() -> None:
    """Neither while it is there nor when it has ended, which takes the kernel a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            port = client.getsockname()[1]
            with server.accept()[0]:
                assert not is_listened_on(Transport.TCP, port)
                client.close()
        assert not is_listened_on(Transport.TCP, port)


@pytest.mark.parametrize(
    ("family", "address", "heard"),
    [
        (socket.AF_INET, "127.0.0.2", (False, True)),
        (socket.AF_INET, "0.0.0.0", (True, True)),
        (socket.AF_INET6, "::", (True, True)),
    ],
)
def test_datagrams_are_read_at_one_address_or_all(
    family: int, address: str, heard: tuple[bool, bool]
) -> None:
    """A resolver on one loopback address is none for who asks at another."""
    with socket.socket(family, socket.SOCK_DGRAM) as reader:
        reader.bind((address, 0))
        port = reader.getsockname()[1]
        found = [is_datagram_read_at(IPv4Address(each), port) for each in ("127.0.0.1", "127.0.0.2")]
        assert tuple(found) == heard
    assert not is_datagram_read_at(IPv4Address("127.0.0.2"), port)
