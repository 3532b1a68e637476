"""Ports of the host's programs: those that listen, and those that only hold a port."""

from __future__ import annotations

import socket

import pytest

from garden_py.backend.host.listeners import is_listened_on
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
