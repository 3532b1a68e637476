"""What the ledger works with: in a running server its launcher and its pools, in a stopped one this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from garden_py.backend.launcher.client import Launcher
from garden_py.backend.ledger import leases
from garden_py.backend.ledger.book import Shared
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.site import Site
from garden_py.backend.net.jobs import JOBS, NetBench
from garden_py.backend.net.plan import HostPlan
from garden_py.backend.plugin.caller import PluginCaller
from garden_py.model.leak import Leak, LeakKind
from garden_py.model.spec import Transport


class ServerHands:
    """Of a running server; see leaks.Hands."""

    def __init__(self, site: Site, launcher: Launcher, network: LinuxNetwork, plugins: PluginCaller) -> None:
        self._site = site
        self._launcher = launcher
        self._plugins = plugins
        self._network = network

    async def network(self, op: str, params: dict[str, Any]) -> dict[str, Any]:
        """In a worker of the launcher."""
        return await self._network.job(op, params)

    async def staged(self) -> list[str]:
        """From a worker: only there they can be seen."""
        answer = await self._launcher.run("container.list_mounts", {"directory": str(self._site.mount_dir)})
        return list(answer["ids"])

    async def release_mounts(self, runtime_id: str) -> None:
        """In a worker."""
        directory = str(self._site.mount_dir / runtime_id)
        await self._launcher.run("container.release_mounts", {"directory": directory})

    def launcher_sessions(self) -> frozenset[int]:
        """The launchers lead them."""
        return frozenset(filter(None, (self._launcher.pid, self._plugins.launcher_pid)))

    def leases(self) -> leases.Sight:
        """From the pools."""
        return leases.Sight(
            frozenset(map(str, self._network.addresses.taken)),
            frozenset(self._network.taken_ports()),
            self._site.uids.taken,
        )

    def give_back(self, leak: Leak) -> None:
        """To the pools."""
        match leak.kind:
            case LeakKind.ADDRESS:
                self._network.addresses.release(IPv4Address(leak.name))
            case LeakKind.PORT:
                protocol, port = leak.name.split(" ")
                self._network.ports[Transport(protocol)].release(int(port))
            case _:
                self._site.uids.release(int(leak.name))

    @contextmanager
    def hold(self, address: IPv4Address | IPv6Address | None, port: tuple[str, int] | None) -> Iterator[None]:
        """Take from the pools what is free. What is taken by no row is leaked itself, and nobody can get it either."""
        addresses = self._network.addresses
        if isinstance(address, IPv6Address):  # it goes with an IPv4 address, which alone is leased
            address = IPv4Address(int(address) & 0xFFFF_FFFF)
        if address is not None and (address not in addresses.network or address in addresses.taken):
            address = None
        ports = None if port is None else self._network.ports[Transport(port[0])]
        if port is not None and ports is not None and port[1] in ports.taken:
            ports = None
        if address is not None:
            addresses.reserve(address)
        if port is not None and ports is not None:
            ports.reserve(port[1])
        try:
            yield
        finally:
            if address is not None:
                addresses.release(address)
            if port is not None and ports is not None:
                ports.release(port[1])

    def shared(self, book_is_empty: bool) -> Shared:
        """A running server needs them."""
        return Shared.REQUIRED

    def needs_network(self) -> bool:
        """Not where a plugin connects containers."""
        return self._network.is_needed

    async def restore_network(self) -> bool:
        """As at the start of a server."""
        await self._network.restore_host()
        return True


class StoppedHands:
    """Of a server that does not run, and cannot start meanwhile; see leaks.Hands."""

    def __init__(self, host: HostPlan) -> None:
        self._host = host
        self._bench = NetBench()

    async def network(self, op: str, params: dict[str, Any]) -> dict[str, Any]:
        """Here and now: nobody else's work waits for this process."""
        params = {"host": self._host.to_json(), **params}
        return JOBS[f"net.{op}"](self._bench.network(params), params, [])

    async def staged(self) -> list[str]:
        """They have gone with the launcher's mount namespace."""
        return []

    async def release_mounts(self, runtime_id: str) -> None:
        """There are none."""
        raise AssertionError(runtime_id)

    def launcher_sessions(self) -> frozenset[int]:
        """There are none."""
        return frozenset()

    def leases(self) -> leases.Sight:
        """The next server takes its leases from the journal."""
        return leases.Sight()

    def give_back(self, leak: Leak) -> None:
        """There are no pools."""
        raise AssertionError(leak.name)

    def hold(
        self, address: IPv4Address | IPv6Address | None, port: tuple[str, int] | None
    ) -> AbstractContextManager[None]:
        """Nobody gives anything away."""
        return nullcontext()

    def shared(self, book_is_empty: bool) -> Shared:
        """Containers that go on without a server need them."""
        return Shared.ORPHANED if book_is_empty else Shared.ALLOWED

    def needs_network(self) -> bool:
        """That is not known: containers say it."""
        return True

    async def restore_network(self) -> bool:
        """The next server does."""
        return False
