"""Addresses that doors listen on."""

from __future__ import annotations

import ipaddress
from typing import Final

from garden_py.model.errors import InvalidField

_PORT_MAX: Final = 0xFFFF


def is_loopback(address: str, *, field: str, shape: str = "unix:PATH or HOST:PORT") -> bool:
    """Whether HOST:PORT can be reached from this host only.

    Args:
        address: to look at.
        field: the setting it comes from, for the error.
        shape: what the setting takes, for the error.

    Raises:
        InvalidField: it is not HOST:PORT.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise InvalidField(field, f"{address!r} must be {shape}")
    if int(port) > _PORT_MAX:
        raise InvalidField(field, f"{address!r}: ports go up to {_PORT_MAX}")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
