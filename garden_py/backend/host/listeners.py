"""What programs of the host listen on."""

from __future__ import annotations

import errno
import socket

from garden_py.model.spec import Transport

_KINDS = {Transport.TCP: socket.SOCK_STREAM, Transport.UDP: socket.SOCK_DGRAM}


def is_listened_on(transport: Transport, port: int) -> bool:
    """Whether a program of the host has a port, on any address: by trying to have it too. Source: socket(7), ip(7)."""
    return not all(_can_bind(family, transport, port) for family in (socket.AF_INET, socket.AF_INET6))


def _can_bind(family: int, transport: Transport, port: int) -> bool:
    try:
        with socket.socket(family, _KINDS[transport]) as probe:
            if transport is Transport.TCP:  # for UDP that would mean to share the port with whoever allows it
                probe.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # connections that end do not count
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))  # any address; nobody listens
    except OSError as error:
        return error.errno != errno.EADDRINUSE  # without IPv6, for one, nobody listens on it
    return True
