"""Addresses that doors listen on."""

from __future__ import annotations

import ipaddress

from garden_py.model.errors import InvalidField


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
    if not colon or not port.isdigit():
        raise InvalidField(field, f"{address!r} must be {shape}")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
