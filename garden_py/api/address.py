"""Addresses that doors listen on."""

from __future__ import annotations

import ipaddress

from garden_py.model.errors import InvalidField


def is_loopback(address: str, *, field: str) -> bool:
    """Whether HOST:PORT can be reached from this host only.

    Args:
        address: to look at.
        field: the setting it comes from, for the error.

    Raises:
        InvalidField: it is not HOST:PORT.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        shape = "HOST:PORT" if field in ("metrics", "debug") else "unix:PATH or HOST:PORT"
        raise InvalidField(field, f"{address!r} must be {shape}")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
