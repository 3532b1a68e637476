"""Where the server is, and how to reach it: addresses, TLS files, channel options."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

DEFAULT_ADDRESS: Final = "unix:/run/garden/garden.sock"
MAX_MESSAGE_BYTES: Final = 16 << 20
CHUNK_BYTES: Final = 256 << 10
# Limit of a call that does not wait for something by its nature; creating is the slowest of them.
DEFAULT_CALL_TIMEOUT: Final = timedelta(minutes=2)

_HOST_PORT: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")


class BadAddress(ValueError):
    """An address of none of the known forms."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for mutual TLS, all PEM.

    Attributes:
        ca: certificates that may have signed the server's.
        cert: this client's certificate chain; with `key`, or neither.
        key: its private key.
        server_name: the name to expect in the server's certificate, if not the address's host.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate and its key go together: give both or neither")


def resolve_target(address: str | None) -> str:
    """The gRPC target for an address.

    Args:
        address: `unix:/path`, `/path` or `host:port`; None: `GARDEN_ADDRESS`, else the default socket.

    Raises:
        BadAddress: none of these forms.

    Source:
        gRPC naming: `unix:path` takes absolute paths, a bare host goes to the DNS resolver.
    """
    text = address if address is not None else os.environ.get("GARDEN_ADDRESS") or DEFAULT_ADDRESS
    path = text.removeprefix("unix://") if text.startswith("unix://") else text.removeprefix("unix:")
    if path.startswith("/"):
        return f"unix:{path}"
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise BadAddress(f"address {text!r} is not unix:/path, /path or host:port")
    return text


def channel_options(target: str, tls: Tls | None) -> list[tuple[str, str | int]]:
    """Options for a channel to target; see grpc_types.h for what each means."""
    is_unix = target.startswith("unix:")
    options: list[tuple[str, str | int]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A server restart takes a second or less; gRPC's own first back-off of 1 s growing to 120 s would
        # outlast it. On a unix socket a try is one connect(2) that the kernel answers at once, so the pause
        # need not grow; 100 ms is the shortest that gRPC makes (its subchannel.cc).
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 100 if is_unix else 1000),
        # By its name a pause, in truth how long a try may take until the server has greeted. On a unix socket
        # only a server that is slow or stopped for a moment lets one wait, and that one is not to be given up.
        ("grpc.min_reconnect_backoff_ms", 5000 if is_unix else 500),
        # A cell is reached directly; a proxy from the environment is for other traffic.
        ("grpc.enable_http_proxy", 0),
        # Each client has its own connection; channels with equal options would otherwise share one, and with
        # it a back-off that another client has earned.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if not is_unix:
        # The kernel tells when the peer of a unix socket is gone; of a TCP peer only pings can.
        options += [
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def read_tls_files(tls: Tls) -> tuple[bytes, bytes | None, bytes | None]:
    """CA, key and certificate chain, in the order `grpc.ssl_channel_credentials` takes them."""
    return (
        tls.ca.read_bytes(),
        None if tls.key is None else tls.key.read_bytes(),
        None if tls.cert is None else tls.cert.read_bytes(),
    )
