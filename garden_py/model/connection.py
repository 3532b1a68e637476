"""A connection that a container tried to make, and what became of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.model.netrule import Decision


@dataclass(frozen=True, slots=True)
class Connection:
    """The first packet of a connection, as the network saw it.

    Attributes:
        decision: what was done with it, and why.
        protocol: tcp, udp, icmp or a number of IANA's (protocol-numbers).
        source, destination: addresses.
        source_port, destination_port: of TCP and UDP; else 0.
        icmp: TYPE/CODE of ICMP; else empty.
    """

    decision: Decision
    protocol: str
    source: str
    destination: str
    source_port: int = 0
    destination_port: int = 0
    icmp: str = ""
