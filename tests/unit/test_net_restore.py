"""A table that somebody has removed is put back by whoever meets its absence, once, with what containers had in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.net.apply import TABLE_MISSING
from garden_py.config import load_config
from garden_py.model.errors import HostFault
from garden_py.model.netrule import DefaultAction, EgressPolicy
from garden_py.model.spec import PortMapping, Transport


class TablelessHost:
    """Stands for the launcher: refuses changes until the table is there."""

    def __init__(self) -> None:
        self.has_table = False
        self.done: list[tuple[str, dict[str, Any]]] = []
        self.finished: list[str] = []
        self.cure_fails = False

    async def run(self, op: str, params: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        self.done.append((op, params))
        for _ in range(10 if op == "net.restore_host" else 1):
            await asyncio.sleep(0)
        self.finished.append(op)
        if op == "net.restore_host":
            if self.cure_fails:
                raise HostFault("network.table", "no")
            self.has_table = True
        elif not self.has_table:
            raise HostFault(TABLE_MISSING, "somebody has removed it")
        return {}

    @property
    def ops(self) -> list[str]:
        return [op for op, _ in self.done]


@pytest.fixture
def host() -> TablelessHost:
    return TablelessHost()


@pytest.fixture
def network(host: TablelessHost) -> LinuxNetwork:
    launcher: Any = host
    return LinuxNetwork(
        load_config({"network_pool": "10.9.0.0/29"}, environ={}), launcher, 1500, lambda *_: None
    )


def lease(network: LinuxNetwork, *ports: int) -> NetworkLease:
    return network.lease(tuple(PortMapping(port, 80, Transport.TCP) for port in ports))


async def test_changes_that_meet_no_table_put_it_back_once(
    host: TablelessHost, network: LinuxNetwork
) -> None:
    """Eight at the same time: one repair, and each change is made."""
    found = lease(network, 61_001)
    mapping = found.mappings[0]
    await asyncio.gather(*(network.map_port("box", found, mapping) for _ in range(8)))
    assert host.ops.count("net.restore_host") == 1
    assert host.ops.count("net.map_port") == 16


async def test_what_containers_had_in_it_comes_back(host: TablelessHost, network: LinuxNetwork) -> None:
    """Address, mapped port, and a privileged container's rules on the host; of one that is gone, nothing."""
    plain, privileged, gone = lease(network, 61_001), lease(network), lease(network)
    network.remember("plain", plain, EgressPolicy(DefaultAction.DENY), privileged=False)
    network.remember("root", privileged, EgressPolicy(DefaultAction.DENY), privileged=True)
    network.remember("gone", gone, None, privileged=False)
    host.has_table = True
    await network.detach("gone", gone, privileged=False)
    await network.restore_host()
    (elements,) = [params["elements"] for op, params in host.done if op == "net.restore_host"]
    assert f". {plain.address} }}" in elements
    assert f"portmap {{ tcp . 61001 : {plain.address} . 80 }}" in elements
    assert f"egress {{ {privileged.address} : goto egress_" in elements
    assert str(gone.address) not in elements
    assert f"egress {{ {plain.address}" not in elements


async def test_repair_that_fails_is_the_answer(host: TablelessHost, network: LinuxNetwork) -> None:
    """Not a loop."""
    host.cure_fails = True
    found = lease(network, 61_001)
    with pytest.raises(HostFault, match="no"):
        await network.map_port("box", found, found.mappings[0])
    assert host.ops == ["net.map_port", "net.restore_host"]


async def test_container_that_goes_during_a_repair_is_not_put_back(
    host: TablelessHost, network: LinuxNetwork
) -> None:
    """The repair has taken down what there was before; so the detach comes after it (found by chaos)."""
    gone = lease(network, 61_001)
    network.remember("gone", gone, None, privileged=False)
    host.has_table = True
    repair = asyncio.ensure_future(network.restore_host())
    await asyncio.sleep(0)
    assert host.ops == ["net.restore_host"]
    await asyncio.gather(repair, network.detach("gone", gone, privileged=False))
    assert host.finished == ["net.restore_host", "net.detach"]
    await network.restore_host()
    assert str(gone.address) not in host.done[-1][1]["elements"]
