"""The facade that the service sees; implements service.ports.Backend."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.stats import read_usage
from garden_py.backend.disk.store import LoopStore
from garden_py.backend.host.pids import describe_stuck, read_stuck
from garden_py.backend.images.images import Images, Rootfs
from garden_py.backend.images.store import ImageStore
from garden_py.backend.launcher.client import Launcher
from garden_py.backend.linux import copying, process_limits
from garden_py.backend.linux.agent_owner import AgentOwner
from garden_py.backend.linux.clues import LinuxClues
from garden_py.backend.linux.construction import Construction
from garden_py.backend.linux.container import ContainerFacts, LinuxContainer, may_be_gone
from garden_py.backend.linux.container_limits import ContainerLimits
from garden_py.backend.linux.demolition import Demolition
from garden_py.backend.linux.disk import ContainerDisk, layer_of, with_disk
from garden_py.backend.linux.hands import ServerHands
from garden_py.backend.linux.heartbeat import Heartbeat
from garden_py.backend.linux.interrupted import (
    LimitChange,
    find_interrupted,
    forget_interrupted,
    written_down,
)
from garden_py.backend.linux.launching import AgentStarter
from garden_py.backend.linux.leaks import Ledger, places_of
from garden_py.backend.linux.lease import PluginLease
from garden_py.backend.linux.network import LinuxNetwork, check_dns_servers
from garden_py.backend.linux.plugin_network import PluginNetwork, facts_of
from garden_py.backend.linux.plugin_roots import PluginRoots
from garden_py.backend.linux.plugin_settings import check_plugins, image_commands
from garden_py.backend.linux.pools import UNLIMITED, pool_levels
from garden_py.backend.linux.process import LinuxProcess
from garden_py.backend.linux.processes import LinuxProcesses, usage_of, without_sidecars
from garden_py.backend.linux.sidecars import Sidecars, owner_of, sidecar_directories, sidecar_layer
from garden_py.backend.linux.site import Site, check_apparmor, disk_of, make_mount_dir, open_site, open_store
from garden_py.backend.linux.throttling import Throttling
from garden_py.backend.linux.traffic import LinkTraffic, read_inside
from garden_py.backend.linux.upgrades import Upgrades
from garden_py.backend.plugin.caller import PluginCaller
from garden_py.backend.plugin.image import ImagePlugins
from garden_py.backend.plugin.network import INTERFACE
from garden_py.backend.rootfs.embedded import build_embedded_rootfs
from garden_py.config import Config
from garden_py.model.codec import load_container_spec
from garden_py.model.cpu import Entitlement, Standing
from garden_py.model.errors import (
    ContainerBroken,
    ContainerNotFound,
    GardenError,
    HostFault,
    InvalidField,
    NoLink,
    NotSupported,
    ProcessExited,
    ProcessNotFound,
    ProcessNotLimited,
    Unkillable,
)
from garden_py.model.image import (
    PullProgress,
    UsedImage,
    image_problem,
    parse_image,
)
from garden_py.model.leak import Leak
from garden_py.model.lifecycle import USABLE, State
from garden_py.model.limits import Limits
from garden_py.model.netrule import Decision, Destination, EgressPolicy, EgressRule
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import ContainerSpec, PortMapping
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point
from garden_py.observe.steps import Step, step
from garden_py.service.ports import (
    AgentFacts,
    BackendEvents,
    Claim,
    Clue,
    ContainerRow,
    EgressCounts,
    HostCapacity,
    NetworkFacts,
    PoolLevel,
    ProcessRow,
    RuleCount,
    Usage,
    Witness,
)

log = structlog.get_logger()
_REATTACH_TIMEOUT_S = 5.0
_OWN_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


def open_linux_backend(config: Config) -> LinuxBackend:
    """The entry point `linux` of group garden_py.backends."""
    return LinuxBackend(config)


class LinuxBackend:
    """Containers of one server on this host. `open` must be awaited before anything else."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._containers: dict[str, LinuxContainer] = {}
        self._undead: dict[str, LinuxContainer] = {}  # being destroyed, and a process is left
        self._unleased: dict[str, str] = {}
        self._events: BackendEvents
        self._site: Site
        self._launcher: Launcher
        self._network: LinuxNetwork
        self._sidecars: Sidecars
        self._clues: LinuxClues
        self._processes: LinuxProcesses
        self._store: LoopStore | None = None
        self._plugin_caller = PluginCaller(config.run_dir)
        self._plugged = PluginNetwork(config, self._plugin_caller)
        self._image_plugins = ImagePlugins(
            image_commands(config), self._plugin_caller, create_timeout_s=config.image_plugin_timeout_s
        )
        self._disk: ContainerDisk
        self._limits: ContainerLimits
        self._construction: Construction
        self._images: Images
        self._demolition: Demolition
        self._upgrades: Upgrades
        self._heartbeat: Heartbeat
        self._ledger: Ledger
        self._throttling: Throttling

    # --- start and stop

    async def open(self, events: BackendEvents, rows: list[ContainerRow]) -> None:
        """Get ready, and hold what rows lease; see service.ports."""
        check_dns_servers(self._config)
        check_apparmor(self._config.apparmor)
        check_plugins(self._config)
        self._events = events
        self._store = await asyncio.to_thread(open_store, self._config)
        self._launcher = Launcher(
            make_mount_dir(self._config),
            workers=self._config.launchers,
            without_hybrid_cgroup=Path(self._config.runtime).name == "crun",
        )
        self._site, _ = await asyncio.gather(
            asyncio.to_thread(open_site, self._config, self._store), self._launcher.start()
        )
        self._network = LinuxNetwork(
            self._config, self._launcher, self._site.facts.uplink_mtu, self._events.connection
        )
        self._site.depot.open()
        default_image = await asyncio.to_thread(self._default_image)
        self._images = self._open_images(default_image)
        self._disk = ContainerDisk(self._site.volumes, self._images, default_image, self._image_plugins)
        self._limits = ContainerLimits(self._site, self._disk, self._network, self._plugged)
        roots = PluginRoots(self._images, self._image_plugins)
        starter = AgentStarter(self._site, self._launcher)
        self._construction = Construction(
            self._site, starter, self._network, self._images, self._disk, roots, self._plugged
        )
        self._processes = LinuxProcesses(self._site, starter, self._images, self._disk, roots, self._events)
        self._sidecars = self._processes.sidecars
        self._clues = LinuxClues(self._site, self._network, self._launcher)
        self._throttling = Throttling(self._site)
        self._demolition = Demolition(
            self._site, self._launcher, self._network, self._disk, roots, self._plugged
        )
        site = self._site
        self._ledger = Ledger(
            places_of(self._config, self._network.host, site.depot, site.volumes, site.driver),
            ServerHands(site, self._launcher, self._network, self._plugin_caller),
        )
        self._hold_leases(rows)
        await self._network.ensure_host(has_containers=bool(rows))
        await self._site.driver.open({scope for row in rows if (scope := row.facts.get("scope"))})
        self._site.block_io.open()
        self._discard_orphans({row.handle for row in rows})
        self._hold_images()
        self._upgrades = Upgrades(self._site.bundle)
        self._heartbeat = Heartbeat(self._agents, period_s=self._config.agent_check_s)
        self._heartbeat.start()
        self._image_plugins.capacity_bytes()  # asked for now; see capacity_told

    def _agents(self) -> Iterator[AgentOwner]:
        for container in self._containers.values():
            yield container
            yield from container.sidecars.values()

    def _open_images(self, default: str) -> Images:
        place = self._config.state_dir / "images"
        layers = place / "layers"  # of a time before the store
        if not layers.is_dir() or not any(layers.iterdir()):
            place = self._site.store_root / "images"
        store = ImageStore(place, self._site.depot.throw_away)
        store.open()
        return Images(store, self._config, default)

    def _default_image(self) -> str:
        if not self._config.default_rootfs:
            return str(build_embedded_rootfs(self._config.state_dir / "rootfs"))
        if problem := image_problem(self._config.default_rootfs):
            raise InvalidField("default_rootfs", problem)
        ref = parse_image(self._config.default_rootfs)
        if ref.path and not os.path.exists(ref.path):
            raise InvalidField("default_rootfs", f"{ref.path} does not exist")
        return str(ref)

    def _hold_images(self) -> None:
        """Keep the layers of what an earlier server has made, also of what is broken or half destroyed."""
        depot = self._site.depot
        for handle in depot.handles():
            self._images.store.hold_again(handle, depot.directory(handle))
            for process_id, directory in sidecar_directories(depot.directory(handle)):
                self._images.store.hold_again(owner_of(handle, process_id), directory)

    def _discard_orphans(self, known: set[str]) -> None:
        """Directories without a journal row are from a server killed between two steps; nothing else exists yet."""
        for handle in self._site.depot.handles():
            if handle not in known:
                log.info("depot.orphan_removed", handle=handle)
                self._site.depot.discard(handle)

    def _hold_leases(self, rows: list[ContainerRow]) -> None:
        for row in rows:
            if not row.facts:
                continue
            facts = ContainerFacts.from_json(row.facts)
            self._site.uids.reserve(facts.uid_slot)
            try:
                self._network.adopt(facts.lease)
            except GardenError as error:
                self._unleased[row.handle] = (
                    f"its address or ports are not in the server's pools any more: {error}"
                )
                continue
            if row.state in USABLE:
                policy = load_container_spec(row.spec).egress
                self._network.remember(row.handle, facts.lease, policy, privileged=facts.privileged)

    async def adopt(self, row: ContainerRow) -> None:
        """Take over a container; see service.ports."""
        reason = self._unleased.pop(row.handle, "")
        if row.state is State.BROKEN:
            reason = reason or row.state_reason or "its agent is gone"
        reason = reason or await self._reconnect(row)
        if reason:
            self._keep_broken(row, reason)
            raise ContainerBroken(row.handle, reason)

    def _keep_broken(self, row: ContainerRow, reason: str) -> None:
        """A container that can only be destroyed; until then its processes' exits and output can be asked for."""
        facts, site = ContainerFacts.from_json(row.facts), self._site
        cgroup = site.cgroup(row.handle, facts)
        container = LinuxContainer(row.handle, facts, cgroup, site.depot.directory(row.handle), self._events)
        container.broken_because = reason
        self._containers[row.handle] = container

    async def _reconnect(self, row: ContainerRow) -> str:
        """Connect to a running container's agent; the reason if that fails."""
        facts = ContainerFacts.from_json(row.facts)
        identity = facts.identity
        pidfd = identity.open() if identity is not None else None
        if pidfd is None:
            return "its PID 1 is gone"
        site = self._site
        cgroup = site.cgroup(row.handle, facts)
        container = LinuxContainer(row.handle, facts, cgroup, site.depot.directory(row.handle), self._events)
        spec = load_container_spec(row.spec)
        container.image, container.disk = spec.image, spec.limits.disk_only()
        container.policy, container.rlimits = spec.egress, spec.limits.rlimits
        container.bandwidth = spec.limits.network_only()
        container.stated = spec.limits
        container.watch(pidfd)
        try:
            await self._throttling.adopt(container)
            container.connect(site.depot.socket(row.handle), patience_s=self._config.agent_patience_s)
            await container.greet(timeout_s=_REATTACH_TIMEOUT_S)
            await self._sidecars.adopt(container)
        except ContainerBroken as error:
            container.let_go()
            return error.reason
        except OSError as error:
            if error.errno not in _OWN_SHORTAGES:
                container.give_up()
            container.let_go()
            return f"its agent cannot be reached: {error}"
        except asyncio.CancelledError:  # the server stops before it has taken everything over
            container.let_go()
            raise
        self._containers[row.handle] = container
        return ""

    async def adopted(self, handle: str) -> None:
        """End what a container runs without the journal knowing; see service.ports."""
        container = self._containers.get(handle)
        if container is None or container.broken_because:
            return
        for process_id in container.held.keys() - container.processes.keys():
            log.info("process.unknown_ended", handle=handle, process_id=process_id)
            await container.link.cancel(process_id)
        container.held.clear()
        container.tell_oom()
        await self._take_back(container)
        await self._renew_rules(container)
        self._sidecars.tidy(container)
        self._upgrades.consider(container)
        for sidecar in container.sidecars.values():
            self._upgrades.consider(sidecar)

    async def _renew_rules(self, container: LinuxContainer) -> None:
        """Hear of its connections again, and put its rules in force as this server has them.

        If that fails, those that it had stay in force, and the log says so.
        """
        policy, facts = container.policy, container.facts
        if policy is None or facts.lease.address is None:
            return
        if facts.privileged:  # those are on the host, and have been renewed with the table
            return
        try:
            if self._network.has_rules(container.directory, facts.lease, policy):
                await self._network.watch(container.handle, facts.pid, policy)
            else:
                await self._set_egress(container, policy, renews=True)
        except (HostFault, OSError) as error:
            log.error("network.rules_not_renewed", handle=container.handle, error=str(error))

    def agent(self, handle: str) -> AgentFacts:
        """Which agent a container has."""
        container = self._get_whole(handle)
        build, version = container.link.build, container.link.wire
        return AgentFacts(
            build, version, current=build == self._site.bundle.version, problem=container.agent_problem
        )

    async def close(self) -> None:
        """Let go; with no container left, also give back what they shared."""
        self._heartbeat.stop()
        await self._upgrades.close()
        self._network.close()
        for container in (*self._containers.values(), *self._undead.values()):
            container.let_go()
        await self._images.settle()
        await self._site.depot.settle()
        if not self._containers and not self._site.depot.handles():
            await self._network.remove_host()
            await self._site.driver.close()
        await self._image_plugins.close()
        await self._plugin_caller.close()
        await self._launcher.close()
        if self._store is not None and not self._containers and not self._site.depot.handles():
            await asyncio.to_thread(self._store.close)

    # --- images

    @property
    def images(self) -> Images:
        """Those of this server."""
        return self._images

    def used_image(self, handle: str) -> UsedImage | None:
        """What a container was made of."""
        return self._images.store.held_by(handle)

    # --- containers

    def capacity(self) -> HostCapacity:
        """What host and pools offer."""
        size, free = disk_of(self._site.store_root)
        addresses = UNLIMITED if self._plugged.is_used else self._network.addresses.size
        uids = addresses if self._config.compat == "garden" else self._site.uids.size
        schedulable = self._image_plugins.capacity_bytes() or size
        return HostCapacity(
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            disk_bytes=size,
            disk_free_bytes=free,
            containers=min(addresses, uids),
            containers_limited_by="--network-pool" if addresses <= uids else "--uid-pool-size",
            ports=0 if self._plugged.is_used else self._config.port_pool_size,
            ports_in_use=self._network.ports_in_use,
            cpus=len(os.sched_getaffinity(0)),
            schedulable_disk_bytes=0 if self._config.no_image_plugin else schedulable,
        )

    async def capacity_told(self) -> None:
        """Wait until the image plugin has told its part, or has not; see service.ports."""
        await self._image_plugins.capacity_told()

    def pools(self) -> dict[str, PoolLevel]:
        """How full they are."""
        return pool_levels(self._network, self._site.uids, has_network=not self._plugged.is_used)

    async def create(
        self,
        spec: ContainerSpec,
        record: Callable[[dict[str, Any]], None],
        report: Callable[[PullProgress], None],
    ) -> None:
        """Make a container; on failure nothing of it is left."""
        if self._construction.image_plugins_of(spec):
            await self._create(spec, None, record, report)
            return
        async with AsyncExitStack() as held:
            with step(Step.IMAGE):
                rootfs = await held.enter_async_context(
                    self._images.prepared(spec.image, spec.image_auth, "spec.image", report)
                )
            await self._create(spec, rootfs, record, report)

    async def _create(
        self,
        spec: ContainerSpec,
        rootfs: Rootfs | None,
        record: Callable[[dict[str, Any]], None],
        report: Callable[[PullProgress], None],
    ) -> None:
        with step(Step.LEASE):
            facts = self._construction.lease(spec)
        try:
            with step(Step.JOURNAL):
                record(facts.to_json())
            failpoints.reach(Point.CREATE_LEASE)
            if rootfs is None:
                report(PullProgress("pulling"))  # how far it is, plugins do not tell
            container = await self._construction.build(spec, facts, rootfs, record, self._events)
        except BaseException as failure:
            await self._undo(spec.handle, facts, failure)
            raise _as_garden_error("create", failure) from failure
        self._containers[spec.handle] = container

    async def _undo(self, handle: str, facts: ContainerFacts, failure: BaseException) -> None:
        try:
            await asyncio.shield(self._demolition.demolish(handle, facts))
            self._images.store.let_go(handle)
        except (GardenError, OSError, ExceptionGroup) as error:
            first = _as_garden_error("create", failure)
            reason = f"create failed ({first}), and undoing it failed too ({_as_garden_error('undo', error)})"
            raise Unkillable(handle, reason) from failure

    async def destroy(self, handle: str, facts: dict[str, Any]) -> None:
        """Remove whatever exists of a container; its processes are told to have ended when none is left."""
        container = self._containers.pop(handle, None) or self._undead.pop(handle, None)
        if container is not None:
            container.condemn()
        try:
            if container is not None:
                await self._sidecars.abandon(container)
            if facts:
                await self._demolition.demolish(handle, ContainerFacts.from_json(facts))
            else:
                self._site.depot.discard(handle)
            self._images.store.let_go(handle)
        except (OSError, ExceptionGroup) as error:
            raise _as_garden_error("destroy", error) from error
        finally:
            if container is not None and groups.pids_in(container.cgroup):
                self._undead[handle] = container
            elif container is not None:
                container.end_all("the container was destroyed")

    def clues(self, handle: str, facts: dict[str, Any]) -> list[Clue]:
        """Where to look at it; see service.ports."""
        known = ContainerFacts.from_json(facts) if facts else None
        return self._clues.about(handle, known, self._containers.get(handle) or self._undead.get(handle))

    def _get(self, handle: str) -> LinuxContainer:
        container = self._containers.get(handle)
        if container is None:
            raise ContainerNotFound(handle)
        return container

    def _get_linked(self, handle: str) -> LinuxContainer:
        """A container that has a link of ours: without one there is nothing that rules or ports could be about.

        Raises:
            ContainerNotFound, NoLink.
            NotSupported: its link is a network plugin's, who is not asked for this.
        """
        container = self._get(handle)
        if container.facts.lease.plugin is not None:
            raise NotSupported(
                f"the network of container {handle!r} is a plugin's: rules that allow can be added, and ports, "
                "and that is all"
            )
        if container.facts.lease.address is None:
            raise NoLink(handle, container.facts.lease.mode.value)
        return container

    def _get_whole(self, handle: str) -> LinuxContainer:
        """A container that is up: what is said of a broken one's pid and addresses would be out of date."""
        container = self._get(handle)
        if container.broken_because:
            raise ContainerNotFound(handle)
        return container

    def facts_of_network(self, handle: str) -> NetworkFacts:
        """A container's addresses."""
        lease = self._get_whole(handle).facts.lease
        if lease.plugin is not None:
            return facts_of(lease.plugin)
        return NetworkFacts(
            container_ip=lease.shown,
            container_ipv6=lease.shown_v6 if self._network.has_ipv6(lease) else "",
            host_ip=str(self._network.host.gateway) if lease.shown else "",
            external_ip=self._network.external_ip,
            mapped_ports=lease.mappings,
        )

    def pid(self, handle: str) -> int:
        """PID 1 as the host numbers it."""
        return self._get_whole(handle).facts.pid

    async def signal_all(self, handle: str, number: int) -> None:
        """Signal everything in the container but PID 1; what is frozen is thawed, for the agent may be too."""
        with may_be_gone(handle):
            groups.thaw(self._get(handle).cgroup)
        await self._get(handle).link.signal_all(number)

    def workload_count(self, handle: str) -> int:
        """Tasks in the container, the agent not counted."""
        with may_be_gone(handle):
            return groups.workload_count(self._get(handle).cgroup)

    def describe_workload(self, handle: str) -> str:
        """Which processes do not end, and where in the kernel they are."""
        with may_be_gone(handle):
            pids = groups.workload_pids(self._get(handle).cgroup)
        return describe_stuck(list(filter(None, map(read_stuck, pids))))

    async def usage(self, handle: str, process_id: str | None = None) -> Usage:
        """What a container uses now, or one of its processes; see service.ports."""
        container = self._get(handle)
        if process_id is not None:
            found, layer = usage_of(container, process_id), sidecar_layer(container, process_id)
            return found if layer is None else with_disk(found, await self._disk.usage(layer))
        with may_be_gone(handle):
            found = without_sidecars(container, read_usage(container.cgroup))
            traffic = self._read_traffic(container.facts)
        return replace(
            with_disk(found, await self._disk.usage(layer_of(container))),
            network_rx_bytes=traffic.rx_bytes,
            network_tx_bytes=traffic.tx_bytes,
            network_rx_packets=traffic.rx_packets,
            network_tx_packets=traffic.tx_packets,
        )

    def _read_traffic(self, facts: ContainerFacts) -> LinkTraffic:
        if facts.lease.plugin is None:
            return self._network.read_traffic(facts.lease)
        return read_inside(facts.pid, facts.lease.plugin.property(INTERFACE))

    def cpu_usage_ns(self, handle: str) -> int:
        """CPU time of a container, without that of sidecars beside its limits."""
        container = self._get(handle)
        with may_be_gone(handle):
            return without_sidecars(container, read_usage(container.cgroup)).cpu_usage_ns

    async def balance_cpu(self, standings: Mapping[str, Standing], entitlement: Entitlement) -> None:
        """Throttle those over their entitlement; see service.ports."""
        containers = [self._containers[handle] for handle in standings if handle in self._containers]
        await self._throttling.balance(containers, standings, entitlement)

    async def limits(self, handle: str, process_id: str | None = None) -> Limits:
        """The limits in force."""
        container = self._get(handle)
        if process_id is not None:
            return await process_limits.read(container, process_id, self._disk)
        return await self._limits.read(container)

    async def update_limits(
        self,
        handle: str,
        limits: Limits,
        process_id: str | None = None,
        *,
        record: Callable[[Limits], None] | None = None,
    ) -> Limits:
        """Change limits; those in force afterwards. See service.ports."""
        container = self._get(handle)
        try:
            in_force = await self.limits(handle, process_id)
        except ProcessNotLimited:  # its first ones
            in_force = Limits()
        change = LimitChange.of(limits, in_force, process_id)
        with written_down(container.directory, change):
            return await self._change_limits(container, limits, process_id, record)

    async def _change_limits(
        self,
        container: LinuxContainer,
        limits: Limits,
        process_id: str | None,
        record: Callable[[Limits], None] | None = None,
    ) -> Limits:
        if process_id is not None:
            return await process_limits.change(container, process_id, limits, self._disk, record)
        return await self._limits.change(container, limits, record)

    async def _take_back(self, container: LinuxContainer) -> None:
        """Put the limits in force again that a change left changed which a former server was killed in."""
        change = find_interrupted(container.directory)
        if change is None:
            return
        process_id = change.process_id
        try:
            if process_id is None:
                stated = container.stated
            else:
                spec = process_limits.find(container, process_id).spec
                stated = replace(spec.limits, rlimits=spec.rlimits)
            if not change.is_recorded(stated):
                await self._change_limits(container, change.former, process_id)
                container.bandwidth = container.stated.network_only()
                log.info("limits.change_taken_back", handle=container.handle, process_id=process_id)
        except (ProcessExited, ProcessNotFound):
            pass  # and its limits with it
        except (GardenError, OSError) as error:
            log.error("limits.change_not_taken_back", handle=container.handle, error=str(error))
        forget_interrupted(container.directory)

    async def map_port(
        self, handle: str, mapping: PortMapping, record: Callable[[dict[str, Any]], None]
    ) -> PortMapping:
        """Map one more port."""
        plugin = self._get(handle).facts.lease.plugin
        if plugin is not None:
            return await self._map_port_by_plugin(self._get(handle), plugin, mapping, record)
        container = self._get_linked(handle)
        leased = self._network.lease_port(mapping)
        before = container.facts.lease
        try:
            container.facts.lease = replace(before, mappings=(*before.mappings, leased))
            record(container.facts.to_json())
            await self._network.map_port(handle, container.facts.lease, leased)
        except BaseException:
            container.facts.lease = before
            self._network.release_port(leased)
            record(container.facts.to_json())
            raise
        return leased

    async def _map_port_by_plugin(
        self,
        container: LinuxContainer,
        plugin: PluginLease,
        mapping: PortMapping,
        record: Callable[[dict[str, Any]], None],
    ) -> PortMapping:
        """Map one more port; a plugin cannot take it back, so it stays mapped even if it cannot be taken down."""
        mapped = await container.until_it_goes(self._plugged.map_port(container.handle, plugin, mapping))
        ports = (*plugin.ports, mapped)
        container.facts.lease = replace(container.facts.lease, plugin=replace(plugin, ports=ports))
        record(container.facts.to_json())
        return mapped

    async def open_egress(
        self, handle: str, policy: EgressPolicy, opened: tuple[EgressRule, ...], *, bulk: bool
    ) -> None:
        """Put rules to those in force; see service.ports."""
        container = self._get(handle)
        plugin = container.facts.lease.plugin
        if plugin is None:
            await self.set_egress(handle, policy)
        elif opened:
            await container.until_it_goes(self._plugged.open(handle, plugin, opened, bulk=bulk))

    async def set_egress(self, handle: str, policy: EgressPolicy) -> None:
        """Replace the egress policy."""
        container = self._get_linked(handle)
        await self._set_egress(container, policy)

    async def _set_egress(
        self, container: LinuxContainer, policy: EgressPolicy, *, renews: bool = False
    ) -> None:
        facts = container.facts
        await self._network.set_egress(
            container.handle,
            facts.pid,
            facts.lease,
            policy,
            container.directory,
            privileged=facts.privileged,
            renews=renews,
        )

    async def explain_egress(self, handle: str, policy: EgressPolicy, destination: Destination) -> Decision:
        """What would become of a new connection."""
        return await self._network.explain(self._get_linked(handle).facts.lease, policy, destination)

    async def egress_counts(self, handle: str, rules: int) -> EgressCounts:
        """What each of the policy's rules has decided; 0 where a network plugin does, for it does not tell."""
        if self._get(handle).facts.lease.plugin is not None:
            return EgressCounts((RuleCount(),) * rules, RuleCount())
        facts = self._get_linked(handle).facts
        return await self._network.egress_counts(
            handle, facts.pid, facts.lease, rules, privileged=facts.privileged
        )

    # --- leaks

    async def find_leaks(self, witness: Witness) -> list[Leak]:
        """Compare what is on the host with what is claimed."""
        return await self._ledger.find_leaks(witness)

    async def put_back(self, leaks: list[Leak]) -> list[Leak]:
        """Make again what is missing; see service.ports.LeakFinder."""
        return await self._ledger.put_back(leaks)

    async def wait_for_loss(self) -> None:
        """Return when what all containers share has surely gone; see service.ports.Backend."""
        await self._network.wait_for_loss()

    async def remove_leak(self, leak: Leak, claims: list[Claim]) -> bool:
        """Remove an orphan."""
        return await self._ledger.remove_leak(leak, claims)

    # --- processes

    async def start_process(
        self, handle: str, spec: ProcessSpec, env: tuple[str, ...], record: Callable[[], None]
    ) -> LinuxProcess:
        """Start a process; see service.ports."""
        return await self._processes.start(self._get(handle), spec, env, record)

    def end_fetches(self) -> None:
        """Give up starts of sidecars that still wait for their image; see service.ports."""
        self._sidecars.end_fetches()

    async def adopt_process(self, handle: str, row: ProcessRow, spec: ProcessSpec) -> LinuxProcess:
        """The process of a row after a restart; see service.ports."""
        return await self._processes.adopt(self._get(handle), row, spec)

    async def forget_process(self, handle: str, process_id: str) -> None:
        """Drop a finished process and its output."""
        self._processes.forget(self._get(handle), process_id)

    # --- files

    async def stream_in(self, handle: str, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        """Unpack a tar in the container."""
        await copying.stream_in(self._get(handle), path, user, chunks)

    def stream_out(self, handle: str, path: str, user: str) -> AsyncGenerator[bytes, None]:
        """Pack a path of the container."""
        return copying.stream_out(self._get(handle), path, user)


def _as_garden_error(verb: str, failure: BaseException) -> BaseException:
    """The first error of a group of parallel steps; time-outs and system errors as faults of the host."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, ContainerBroken):  # no caller has a container yet, or still, that could be broken
        return HostFault(verb, failure.reason)
    if isinstance(failure, TimeoutError):
        return HostFault(verb, "the create deadline has passed (server setting create_timeout_s)")
    if isinstance(failure, OSError):
        return HostFault(verb, str(failure))
    return failure
