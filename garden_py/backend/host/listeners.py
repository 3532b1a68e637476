"""What programs of the host listen on."""

from __future__ import annotations

import errno
import socket
import sys
from ipaddress import IPv4Address
from pathlib import Path

from garden_py.model.spec import Transport

_KINDS = {Transport.TCP: socket.SOCK_STREAM, Transport.UDP: socket.SOCK_DGRAM}
# States by number (net/tcp_states.h): LISTEN, and CLOSE, which is that of a datagram socket without a peer.
_LISTENING = {Transport.TCP: "0A", Transport.UDP: "07"}


def is_listened_on(transport: Transport, port: int) -> bool:
    """Whether a program of the host listens on a port, on whichever address.

    Mostly found out by trying to have it too. Who cannot looks closer: what holds a port may also be a connection that
    a program has made from it, or one that has ended a minute ago. Source: socket(7), ip(7), proc(5).
    """
    if all(_can_bind(family, transport, port) for family in (socket.AF_INET, socket.AF_INET6)):
        return False
    tables = (Path(f"/proc/net/{transport.value}{version}") for version in ("", "6"))
    return any(
        _is_listed(line.split(), transport, port)
        for table in tables
        if table.exists()
        for line in table.read_text().splitlines()[1:]
    )


def is_datagram_read_at(address: IPv4Address, port: int) -> bool:
    """Whether a program of the host gets datagrams to an address and port: listens there or on all addresses."""
    # Addresses are words in the host's byte order (proc_pid_net(5)); all of IPv6 means all of IPv4, too.
    wanted = {"udp": {_hexadecimal(address), _hexadecimal(IPv4Address(0))}, "udp6": {"0" * 32}}
    return any(
        (words := line.split())[1] in {f"{each}:{port:04X}" for each in wanted[table.name]}
        and words[3] == _LISTENING[Transport.UDP]
        for table in (Path("/proc/net") / name for name in wanted)
        if table.exists()
        for line in table.read_text().splitlines()[1:]
    )


def _hexadecimal(address: IPv4Address) -> str:
    return f"{int.from_bytes(address.packed, sys.byteorder):08X}"


def _can_bind(family: int, transport: Transport, port: int) -> bool:
    try:
        with socket.socket(family, _KINDS[transport]) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))  # any address; nobody listens
    except OSError as error:
        return error.errno != errno.EADDRINUSE  # without IPv6, for one, nobody listens on it
    return True


def _is_listed(words: list[str], transport: Transport, port: int) -> bool:
    """A line of /proc/net/tcp and its like: number, local address, remote address, state."""
    return words[3] == _LISTENING[transport] and int(words[1].rpartition(":")[2], 16) == port
