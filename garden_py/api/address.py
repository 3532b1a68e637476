"""Addresses that doors listen on."""

from __future__ import annotations

import ipaddress
from typing import Final

from garden_py.config import Config
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


def check_listen(config: Config) -> None:
    """Refuse an address that the gRPC door cannot have, or not without more settings.

    Raises:
        InvalidField: the message says which.
    """
    address = config.listen_address
    if address.startswith("unix:"):
        return
    loopback = is_loopback(address, field="listen")
    given = [config.tls_cert, config.tls_key, config.tls_client_ca]
    if all(given) or (loopback and config.insecure_loopback and not any(given)):
        return
    if any(given):
        raise InvalidField("tls_client_ca", "a TCP door needs all of tls_cert, tls_key and tls_client_ca")
    raise InvalidField(
        "listen",
        f"{address}: a TCP door needs mutual TLS (--tls-cert, --tls-key, --tls-client-ca), "
        "or a loopback address with --insecure-loopback",
    )


def check_page(config: Config, setting: str) -> None:
    """Likewise, of `metrics` or `debug`. Pages of the latter tell command lines, so they are for this host only."""
    address, insecure = getattr(config, setting), setting == "metrics" and config.metrics_insecure
    if address and not is_loopback(address, field=setting, shape="HOST:PORT") and not insecure:
        remedy = ", or say --metrics-insecure" if setting == "metrics" else ""
        problem = f"{address}: whoever reaches it can read it; use a loopback address{remedy}"
        raise InvalidField(setting, problem)


def check_garden_http(config: Config) -> None:
    """Likewise, of the Garden door."""
    address = config.garden_http
    if not address or address.startswith("unix:"):
        return
    if not is_loopback(address, field="garden_http") and not config.garden_http_insecure:
        raise InvalidField(
            "garden_http",
            f"{address}: the protocol has no authentication, and whoever reaches it is root here; use a unix "
            "socket or a loopback address, or say --garden-http-insecure",
        )
