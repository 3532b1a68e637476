"""A connection that a container tried to make, and what became of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.model.netrule import Decision


@dataclass(frozen=True, slots=True)
class Flow:
    """What the headers of a connection's first packet say.

    Attributes:
        protocol: tcp, udp, icmp, icmpv6 or a number of IANA's (protocol-numbers).
        source, destination: addresses.
        source_port, destination_port: of TCP and UDP; else 0.
        icmp: TYPE/CODE of ICMP; else empty.
    """

    protocol: str
    source: str
    destination: str
    source_port: int = 0
    destination_port: int = 0
    icmp: str = ""


@dataclass(frozen=True, slots=True)
class Connection:
    """What was done with one, and why."""

    decision: Decision
    flow: Flow
