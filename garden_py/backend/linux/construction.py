"""Making a container. `build` reads like a table of contents; each step is recorded before it is taken."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from garden_py.backend.cgroup import groups
from garden_py.backend.host import apparmor
from garden_py.backend.host.pids import read_start_time
from garden_py.backend.images.images import Images, Rootfs
from garden_py.backend.linux import resource_limits
from garden_py.backend.linux.container import ContainerFacts, LinuxContainer
from garden_py.backend.linux.disk import ContainerDisk
from garden_py.backend.linux.launching import AgentStarter, Launch, check_bind_sources, listen
from garden_py.backend.linux.lease import NetworkLease, PluginLease
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.plugin_network import PluginNetwork, facts_of
from garden_py.backend.linux.plugin_roots import PluginRoots
from garden_py.backend.linux.site import NO_SLOT, Site
from garden_py.backend.plugin.image import Command
from garden_py.backend.plugin.network import Connected
from garden_py.backend.rootfs.host_names import read_host_resolv_conf, read_if_there
from garden_py.backend.rootfs.names import LOOPBACK, add_own_name, build_hosts, build_resolv_conf
from garden_py.model.errors import HandleInUse, ProfileNotLoaded
from garden_py.model.handle import hostname_for
from garden_py.model.netrule import DefaultAction, EgressPolicy, at_field
from garden_py.model.network import NetworkMode, SubnetChoice
from garden_py.model.spec import ContainerSpec
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point
from garden_py.observe.steps import Step, step
from garden_py.service.ports import BackendEvents, NetworkFacts

Record = Callable[[dict[str, Any]], None]


class Construction:
    """How containers are made at one site."""

    def __init__(
        self,
        site: Site,
        starter: AgentStarter,
        network: LinuxNetwork,
        images: Images,
        disk: ContainerDisk,
        roots: PluginRoots,
        plugged: PluginNetwork,
    ) -> None:
        self._site = site
        self._disk = disk
        self._roots = roots
        self._plugged = plugged
        self._starter = starter
        self._network = network
        self._images = images

    def image_plugins_of(self, spec: ContainerSpec) -> tuple[Command, ...]:
        """The plugins that a container's root file system is to be removed by; none: they do not make it.

        Raises:
            ImageNotFound.
        """
        return self._roots.commands_for(spec.image, "spec.image")

    def lease(self, spec: ContainerSpec) -> ContainerFacts:
        """Check what the spec points at on the host, then take what the container needs from the pools.

        Raises:
            InvalidRequest, LimitRefused, NotSupported, PoolExhausted, PortInUse, ProfileNotLoaded: nothing was taken.
        """
        profile = self._site.config.apparmor
        if profile and not spec.privileged and apparmor.is_known_missing(profile):
            raise ProfileNotLoaded(profile)
        image_plugins = self.image_plugins_of(spec)
        if image_plugins:
            if not self._roots.is_free(spec.handle):
                raise HandleInUse(spec.handle)  # by a sidecar
            self._disk.check_for_plugin(spec.limits)
        else:
            self._disk.check(spec.limits)
        self._site.block_io.check(spec.limits)
        resource_limits.check(spec.limits.rlimits, self._site.facts.nofile_hard)
        self._site.depot.refuse_foreign(spec.handle)
        check_bind_sources(spec.bind_mounts, "spec.bind_mounts")
        with at_field("spec"):
            lease = self._lease_network(spec)
        try:
            slot = NO_SLOT if self._shares_ids(spec) else self._site.uids.allocate()
        except BaseException:
            self._network.release(lease)
            raise
        isolation = self._site.isolation(privileged=spec.privileged, slot=slot)
        return ContainerFacts(
            secrets.token_hex(8),
            spec.privileged,
            lease,
            slot,
            isolation=isolation,
            throttleable=self._site.config.enable_cpu_throttling and self._site.hierarchies.version == 1,
            scope=self._site.driver.parent if self._site.driver.uses_systemd else "",
            image_plugins=image_plugins,
        )

    def _lease_network(self, spec: ContainerSpec) -> NetworkLease:
        if self._plugged.is_used and spec.network_mode is NetworkMode.OWN:
            return self._plugged.lease(spec)
        choice = SubnetChoice.parse(spec.subnet) if spec.subnet else None
        return self._network.lease(spec.port_mappings, spec.network_mode, choice)

    async def build(
        self,
        spec: ContainerSpec,
        facts: ContainerFacts,
        rootfs: Rootfs | None,
        record: Record,
        events: BackendEvents,
    ) -> LinuxContainer:
        """Make the container that facts were leased for.

        Args:
            spec: of the container.
            facts: recorded.
            rootfs: None: an image plugin is to make it.
            record: takes down facts again, once more is known.
            events: told of what happens by itself.

        Whatever was made when a step fails is found by `demolition` from the facts alone, which were recorded.
        """
        site = self._site
        await site.driver.hold()
        directory = site.depot.claim(spec.handle)
        if rootfs is None:
            rootfs = await self._make_root(spec, directory)
        async with asyncio.timeout(site.config.create_timeout_s):
            return await self._build_on(spec, facts, rootfs, directory, record, events)

    async def _make_root(self, spec: ContainerSpec, directory: Path) -> Rootfs:
        with step(Step.IMAGE):
            return await self._roots.make(
                spec.handle,
                directory,
                spec.image,
                spec.image_auth,
                spec.limits,
                privileged=spec.privileged,
            )

    async def _build_on(
        self,
        spec: ContainerSpec,
        facts: ContainerFacts,
        rootfs: Rootfs,
        directory: Path,
        record: Record,
        events: BackendEvents,
    ) -> LinuxContainer:
        site = self._site
        cgroup = site.cgroup(spec.handle, facts)
        container = LinuxContainer(spec.handle, facts, cgroup, directory, events)
        if rootfs.used is not None:
            self._images.store.hold(spec.handle, directory, rootfs.used)
        container.image, container.disk = spec.image, spec.limits.disk_only()
        container.bandwidth, container.rlimits = spec.limits.network_only(), spec.limits.rlimits
        with step(Step.DISK):
            layer = directory
            if rootfs.ready is None:
                layer = (
                    await self._disk.make(facts.runtime_id, spec.limits, rootfs, "spec.limits") or directory
                )
        with step(Step.BUNDLE):
            launch = self._launch(spec, facts, rootfs, directory, layer)
            await self._write_names(launch, facts)
            self._starter.prepare(launch)
        failpoints.reach(Point.CREATE_DIRECTORY)
        with listen(site.depot.socket(spec.handle)) as listener:
            failpoints.reach(Point.CREATE_LISTEN)
            with step(Step.LAUNCH):
                facts.pid = await self._starter.start(launch, listener)
        facts.pid_start = read_start_time(facts.pid) or 0
        with step(Step.JOURNAL):
            record(facts.to_json())
        failpoints.reach(Point.CREATE_PID)
        container.connect(site.depot.socket(spec.handle), patience_s=site.config.agent_patience_s)
        with step(Step.LIMITS):
            groups.furnish(container.cgroup, facts.pid, spec.limits)
            site.block_io.furnish(container.cgroup, spec.limits)
        container.watch(os.pidfd_open(facts.pid))
        failpoints.reach(Point.CREATE_LIMIT)
        async with asyncio.TaskGroup() as steps:
            steps.create_task(self._greet(container))
            steps.create_task(self._connect(container, spec, record))
        return container

    async def _greet(self, container: LinuxContainer) -> None:
        with step(Step.AGENT):
            await container.greet(timeout_s=self._site.config.create_timeout_s)
        failpoints.reach(Point.CREATE_GREET)

    async def _connect(self, container: LinuxContainer, spec: ContainerSpec, record: Record) -> None:
        if (plugin := container.facts.lease.plugin) is not None:
            await self._connect_by_plugin(container, plugin, spec, record)
        else:
            await self._connect_here(container, spec)
        failpoints.reach(Point.CREATE_CONNECT)

    async def _connect_by_plugin(
        self, container: LinuxContainer, plugin: PluginLease, spec: ContainerSpec, record: Record
    ) -> None:
        facts = container.facts
        with step(Step.NETWORK):
            made, told = await self._plugged.attach(facts.pid, spec, plugin, self._network.external_ip)
            facts.lease = replace(facts.lease, plugin=made)
            record(facts.to_json())
            hostname = spec.hostname or hostname_for(spec.handle)
            for name, content in self._names_by_plugin(hostname, facts_of(made), told).items():
                # Over what is there, since the container has these very files mounted.
                (container.directory / "etc" / name).write_text(content)

    async def _connect_here(self, container: LinuxContainer, spec: ContainerSpec) -> None:
        facts = container.facts
        policy = spec.egress or EgressPolicy(default_action=DefaultAction(self._site.config.default_egress))
        with step(Step.NETWORK), at_field("spec"):
            await self._network.attach(
                spec.handle,
                facts.pid,
                facts.lease,
                policy,
                spec.limits,
                container.directory,
                privileged=spec.privileged,
            )

    def _shares_ids(self, spec: ContainerSpec) -> bool:
        return spec.privileged or self._site.config.compat == "garden"

    def _launch(
        self, spec: ContainerSpec, facts: ContainerFacts, rootfs: Rootfs, directory: Path, layer: Path
    ) -> Launch:
        site = self._site
        assert facts.isolation is not None  # by `lease`
        return Launch(
            handle=spec.handle,
            runtime_id=facts.runtime_id,
            directory=directory,
            layer=layer,
            etc=directory / "etc",
            layers=rootfs.directories,
            image=rootfs.name,
            isolation=facts.isolation,
            hostname=spec.hostname or hostname_for(spec.handle),
            cgroup_path=site.cgroup(spec.handle, facts).runtime_path,
            bind_mounts=spec.bind_mounts,
            fail_points=failpoints.hand_over(Point.CREATE_MOUNT, Point.CREATE_RUN),
            host_network=facts.lease.mode is NetworkMode.HOST,
            ready=rootfs.ready,
            first_mounts=rootfs.mounts,
        )

    async def _write_names(self, launch: Launch, facts: ContainerFacts) -> None:
        """Write hosts and resolv.conf, which belong to the container's root."""
        launch.etc.mkdir()
        config, lease = self._site.config, facts.lease
        if lease.mode is NetworkMode.HOST:
            hosts = add_own_name(read_if_there(Path("/etc/hosts")), launch.hostname)
            resolv_conf = read_if_there(Path("/etc/resolv.conf"))
        else:
            address = LOOPBACK if lease.mode is NetworkMode.NONE else lease.shown
            hosts = build_hosts(address, lease.shown_v6, launch.hostname, config.additional_host_entry)
            resolv_conf = build_resolv_conf(
                read_host_resolv_conf(),
                config.dns_server,
                "" if lease.plugin else str(self._network.host.gateway),
                config.additional_dns_server,
            )
        if lease.address is not None and lease.plugin is None:
            await self._network.serve_names(resolv_conf)
        id_map = launch.isolation.id_map(self._site.facts.highest_id)
        owner = id_map.host_id(0) if id_map else 0
        for name, content in (("hosts", hosts), ("resolv.conf", resolv_conf)):
            (launch.etc / name).write_text(content)
            (launch.etc / name).chmod(0o644)
            os.chown(launch.etc / name, owner, owner)

    def _names_by_plugin(self, hostname: str, facts: NetworkFacts, told: Connected) -> dict[str, str]:
        """Hosts and resolv.conf of a container whose addresses are known only now."""
        config = self._site.config
        return {
            "hosts": build_hosts(
                facts.container_ip, facts.container_ipv6, hostname, config.additional_host_entry
            ),
            "resolv.conf": build_resolv_conf(
                read_host_resolv_conf(),
                config.dns_server,
                facts.host_ip,
                config.additional_dns_server,
                of_plugin=told.dns_servers,
                search=told.search_domains,
            ),
        }
