"""The ledger of one site: looks at the host, has it compared, removes orphans; implements service.ports.LeakFinder."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Protocol

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import ContainerCgroup, parent_of
from garden_py.backend.depot import Depot
from garden_py.backend.disk.store import LoopStore
from garden_py.backend.disk.volumes import Volumes
from garden_py.backend.host.pids import ProcessIdentity, kill_and_wait, read_start_time, read_wait_channel
from garden_py.backend.host.threads import in_thread
from garden_py.backend.ledger import cgroups, files, leases, mounts, network, processes
from garden_py.backend.ledger.book import Book, Holding, Mapping, Shared
from garden_py.backend.ledger.compare import Sight, compare
from garden_py.backend.linux.cgroup_driver import CgroupDriver
from garden_py.backend.linux.container import ContainerFacts
from garden_py.backend.net.plan import HostPlan, address_of_link
from garden_py.backend.net.survey import Survey, compile_forget, compile_forget_chain
from garden_py.backend.plugin.caller import PLACE as PLUGINS
from garden_py.config import Config
from garden_py.model.errors import HostFault
from garden_py.model.leak import Leak, LeakKind
from garden_py.service.ports import Claim, Witness

_KILL_TIMEOUT_S = 10.0


class Hands(Protocol):
    """What differs between a running server, with its launcher and pools, and one that has stopped."""

    async def network(self, op: str, params: dict[str, Any]) -> dict[str, Any]:
        """Do a job of net/jobs.py; HostFault."""

    async def staged(self) -> list[str]:
        """Ids of launches whose mounts the launcher holds."""

    async def release_mounts(self, runtime_id: str) -> None:
        """Have the launcher let go of one launch's mounts."""

    def launcher_sessions(self) -> frozenset[int]:
        """Sessions of the server's own launchers."""

    def leases(self) -> leases.Sight:
        """What the pools have given out."""

    def give_back(self, leak: Leak) -> None:
        """Put a lease of nobody back into its pool."""

    def hold(
        self, address: IPv4Address | IPv6Address | None, port: tuple[str, int] | None
    ) -> AbstractContextManager[None]:
        """A context in which the pools give neither away."""

    def needs_network(self) -> bool:
        """Whether what containers share of the network is the server's to make."""

    def shared(self, book_is_empty: bool) -> Shared:
        """What is to be thought of the parts that all containers share."""

    async def restore_network(self) -> bool:
        """Put back what the server and its containers have in the host's table; False: nobody here knows that."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where one server's things are."""

    tag: str
    host: HostPlan
    depot: Depot
    volumes: Volumes
    store: Path
    driver: CgroupDriver
    mount_dir: Path
    runtime_roots: tuple[Path, ...]

    @property
    def cgroups(self) -> cgroups.Places:
        """Where containers' groups are, by whichever driver they were made."""
        return cgroups.Places(self.tag, self.driver.parent, self.driver.scope.path)

    @property
    def launchers(self) -> tuple[Path, ...]:
        """What launchers have in their command lines."""
        return (self.mount_dir, self.mount_dir.with_name(PLUGINS))

    @property
    def private(self) -> tuple[Path, ...]:
        """Directories in which nothing is mounted on the host."""
        depot = self.depot
        return (depot.containers, depot.trash, depot.agents, self.mount_dir, *self.runtime_roots)


def places_of(config: Config, host: HostPlan, depot: Depot, volumes: Volumes, driver: CgroupDriver) -> Places:
    """The places that settings lead to; those of a runtime used by an earlier server included."""
    names = dict.fromkeys((Path(config.runtime).name, "runc", "crun"))
    roots = tuple(config.run_dir / name for name in names)
    store = config.state_dir / "store"
    return Places(config.tag, host, depot, volumes, store, driver, config.run_dir / "mnt", roots)


def holding_of(claim: Claim) -> Holding:
    """A row's facts, as the judges read them."""
    if not claim.facts:
        return Holding(claim.handle)
    facts = ContainerFacts.from_json(claim.facts)
    return Holding(
        handle=claim.handle,
        runtime_id=facts.runtime_id,
        address=facts.lease.shown,
        in_subnet=facts.lease.subnet is not None,
        address_v6=facts.lease.shown_v6,
        mappings=tuple(
            Mapping(m.transport.value, m.host_port, m.container_port) for m in facts.lease.mappings
        ),
        uid_slot=facts.uid_slot,
        privileged=facts.privileged,
        init=facts.identity,
    )


class Ledger:
    """Finds and removes what belongs to nobody at one site."""

    def __init__(self, places: Places, hands: Hands) -> None:
        self._places = places
        self._hands = hands

    async def find_leaks(self, witness: Witness) -> list[Leak]:
        """See service.ports."""
        known = [holding_of(claim) for claim in witness.claims()]
        survey = Survey.from_json(await self._hands.network("survey", {}))
        staged = await self._hands.staged()
        seen = await asyncio.to_thread(self._look, known, survey, staged)
        # Leases are taken and recorded in one turn of the loop, so here pools and rows are of one mind.
        seen = replace(seen, leases=self._hands.leases())
        claims = witness.claims()
        book = Book(
            map(holding_of, claims), map(holding_of, witness.settled()), self._hands.shared(not claims)
        )
        return compare(book, seen)

    def _look(self, known: list[Holding], survey: Survey, staged: list[str]) -> Sight:
        places = self._places
        handles = {holding.handle for holding in known}
        addresses = {holding.address for holding in known}
        return Sight(
            files=files.look(places.depot, places.runtime_roots, places.volumes.place, handles),
            cgroups=cgroups.look(places.driver.hierarchies, places.cgroups, handles),
            processes=processes.look(places.launchers, self._hands.launcher_sessions(), known),
            network=network.look(places.host, survey, addresses, is_needed=self._hands.needs_network()),
            mounts=mounts.look(staged, places.private, places.store),
            leases=leases.Sight(),
        )

    async def put_back(self, leaks: list[Leak]) -> list[Leak]:
        """See service.ports: the network's shared parts, and what containers have in its table."""
        host = self._places.host
        shared = (host.anchor_link, f"table inet {host.table}")
        missing = [leak for leak in leaks if leak.kind is LeakKind.NFT_ELEMENT or leak.name in shared]
        return missing if missing and await self._hands.restore_network() else []

    async def remove_leak(self, leak: Leak, claims: list[Claim]) -> bool:
        """See service.ports."""
        book = Book(map(holding_of, claims), (), Shared.ALLOWED)
        match leak.kind:
            case LeakKind.PROCESS | LeakKind.CGROUP | LeakKind.DIRECTORY if leak.handle in book.handles:
                return False
            case LeakKind.PROCESS:
                await self._end(leak)
            case LeakKind.CGROUP:
                await self._remove_cgroup(leak)
            case LeakKind.LINK | LeakKind.NFT_ELEMENT | LeakKind.NFT_CHAIN:
                return await self._remove_from_network(leak, book)
            case LeakKind.MOUNT if leak.name == str(self._places.store):
                await asyncio.to_thread(LoopStore(self._places.store.parent).unmount)
            case LeakKind.MOUNT:
                await self._hands.release_mounts(leak.name.removeprefix("launcher:"))
            case LeakKind.DIRECTORY | LeakKind.SOCKET | LeakKind.RUNTIME:
                return await self._remove_file(leak, book)
            case LeakKind.ADDRESS | LeakKind.PORT | LeakKind.UID_RANGE:
                if _is_leased(leak, book):
                    return False
                self._hands.give_back(leak)
        return True

    async def _end(self, leak: Leak) -> None:
        """Kill a process, if it still is what it was: its number may be another's by now."""
        pid = int(leak.name)
        identity = ProcessIdentity(pid, read_start_time(pid) or 0)
        if leak.handle:
            is_it = cgroups.holds_process(self._places.cgroups, leak.handle, pid)
        else:
            own = self._hands.launcher_sessions()
            is_it = pid in processes.look(self._places.launchers, own, ()).strangers
        if is_it and not await kill_and_wait(identity, timeout_s=_KILL_TIMEOUT_S):
            raise HostFault("kill", f"process {pid} does not end: {read_wait_channel(pid)}")

    async def _remove_cgroup(self, leak: Leak) -> None:
        hierarchies, tag, scope = self._places.driver.hierarchies, self._places.tag, self._places.driver.scope
        if leak.name == parent_of(tag):
            groups.remove_parent(hierarchies, tag)
        elif leak.name == scope.path:
            await in_thread(scope.stop)
        else:
            await cgroups.remove(ContainerCgroup(hierarchies, leak.name))

    async def _remove_from_network(self, leak: Leak, book: Book) -> bool:
        host, words = self._places.host, leak.name.split(" ")
        if leak.name in (host.anchor_link, f"table inet {host.table}"):
            await self._hands.network("remove_host", {})
            return True
        address, port = _held_by(leak, host)
        if is_in_use(words, address, port, book):
            return False
        with self._hands.hold(address, port):
            match leak.kind:
                case LeakKind.LINK:
                    await self._hands.network("remove_link", {"link": leak.name})
                case LeakKind.NFT_ELEMENT:
                    await self._hands.network("forget", {"rules": compile_forget(host, leak.name)})
                case _:
                    await self._hands.network("forget", {"rules": compile_forget_chain(host, words[0])})
        return True

    async def _remove_file(self, leak: Leak, book: Book) -> bool:
        depot, (place, _, name) = self._places.depot, leak.name.rpartition("/")
        if leak.kind is LeakKind.SOCKET:
            if leak.name in {depot.socket(handle).name for handle in book.handles}:
                return False
            (depot.agents / leak.name).unlink(missing_ok=True)
        elif leak.kind is LeakKind.RUNTIME:
            if files.book_id(name) in book.runtime_ids:
                return False
            root = next(root for root in self._places.runtime_roots if root.name == place)
            await asyncio.to_thread(files.remove_runtime, root, name)
        elif place == "containers":
            depot.discard(name)
        elif place == "volumes":
            if files.book_id(name) in book.runtime_ids:
                return False
            await self._places.volumes.remove(name)
        else:
            depot.sweep()
            await depot.settle()
            if name in os.listdir(depot.trash):
                raise HostFault("empty trash", f"{name} cannot be deleted; the log says why")
        return True


def _held_by(leak: Leak, host: HostPlan) -> tuple[IPv4Address | IPv6Address | None, tuple[str, int] | None]:
    """The address and the port that a thing of the network stands for."""
    match leak.name.split(" "):
        case ["member", _, address] | ["egress", address, _]:
            return ip_address(address), None
        case ["portmap", protocol, host_port, address, _]:
            return ip_address(address), (protocol, int(host_port))
        case [name] if leak.kind is LeakKind.LINK:
            return address_of_link(host, name), None
        case [chain]:
            return address_of_link(host, f"{host.link_prefix}{chain.partition('_')[2]}"), None
    raise ValueError(leak.name)


def is_in_use(
    words: list[str], address: IPv4Address | IPv6Address | None, port: tuple[str, int] | None, book: Book
) -> bool:
    """Whether what an orphan of the network stands for is claimed by now."""
    if words[0] == "portmap" and port is not None:
        # Port and address can be taken again, by different containers even; this element belongs to neither then, and
        # is in the way of both. It is removed as it is, or not at all.
        return (str(address), Mapping(*port, int(words[4]))) in book.mappings
    return (address is not None and str(address) in book.addresses) or port in book.ports


def _is_leased(leak: Leak, book: Book) -> bool:
    match leak.kind:
        case LeakKind.ADDRESS:
            return leak.name in book.addresses
        case LeakKind.PORT:
            protocol, port = leak.name.split(" ")
            return (protocol, int(port)) in book.ports
        case _:
            return int(leak.name) in book.uid_slots
