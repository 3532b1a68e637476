"""How full the pools of a site are."""

from __future__ import annotations

from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.site import UidPool
from garden_py.backend.net.pools import PortPool
from garden_py.service.ports import PoolLevel

UNLIMITED = 2**64 - 1
"""Of what is given out by somebody else (Garden statement CA1)."""


def pool_levels(network: LinuxNetwork, uids: UidPool, *, has_network: bool) -> dict[str, PoolLevel]:
    """Of addresses, of each transport's ports, and of ranges of uids.

    Args:
        network: of the server.
        uids: likewise.
        has_network: false: a plugin gives out addresses and ports.
    """
    if not has_network:
        return {"uid_ranges": PoolLevel(uids.size, len(uids.taken))}
    addresses = network.addresses
    levels = {"addresses": PoolLevel(addresses.size, addresses.in_use)}
    for transport, pool in network.ports.items():
        levels[f"{transport.value}_ports"] = PoolLevel(pool.size, _in_range(pool))
    return levels | {"uid_ranges": PoolLevel(uids.size, len(uids.taken))}


def _in_range(pool: PortPool) -> int:
    """Ports that are missing in the pool: those that callers chose outside of it are not."""
    return sum(pool.start <= port < pool.start + pool.size for port in pool.taken)
