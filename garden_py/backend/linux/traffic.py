"""What a container has sent and received, as the kernel counts it."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.backend.host.small_files import lines_of, read_small

# Columns of /proc/net/dev after the name (dev_seq_printf_stats in net/core/net-procfs.c).
_RX_BYTES, _RX_PACKETS, _TX_BYTES, _TX_PACKETS = 0, 1, 8, 9


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """Bytes and packets that a container has received (rx) and sent (tx)."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    tx_packets: int = 0


def read_host_end(link: str) -> LinkTraffic:
    """Of the container's end of a veth pair: what the host's end receives is what the container sends.

    Raises:
        OSError: there is no such link (any more).
    """
    statistics = f"/sys/class/net/{link}/statistics"

    def read(name: str) -> int:
        return int(read_small(f"{statistics}/{name}"))

    return LinkTraffic(read("tx_bytes"), read("rx_bytes"), read("tx_packets"), read("rx_packets"))


def read_inside(pid: int, interface: str) -> LinkTraffic:
    """Of an interface in the network namespace that a process is in. Source: proc(5), /proc/net/dev.

    Args:
        pid: of the process.
        interface: its name; empty: all but loopback together.

    Raises:
        OSError: the process has ended.
    """
    return parse_net_dev(read_small(f"/proc/{pid}/net/dev"), interface)


def parse_net_dev(text: str, interface: str) -> LinkTraffic:
    """Counters of one interface in the text of /proc/net/dev, or of all but loopback; see `read_inside`."""
    sums = LinkTraffic()
    for line in lines_of(text)[2:]:
        name, _, rest = line.partition(":")
        name, columns = name.strip(), [int(word) for word in rest.split()]
        if name == interface or (not interface and name != "lo"):
            sums = LinkTraffic(
                sums.rx_bytes + columns[_RX_BYTES],
                sums.tx_bytes + columns[_TX_BYTES],
                sums.rx_packets + columns[_RX_PACKETS],
                sums.tx_packets + columns[_TX_PACKETS],
            )
    return sums
