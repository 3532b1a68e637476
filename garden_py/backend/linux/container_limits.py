"""Limits of one container, read and changed while it runs: cgroups, disk space, bandwidth and rlimits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack, nullcontext
from dataclasses import replace

from garden_py.backend.cgroup.limits import change_limits, read_limits
from garden_py.backend.linux import resource_limits
from garden_py.backend.linux.container import LinuxContainer, may_be_gone
from garden_py.backend.linux.disk import ContainerDisk, layer_of
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.plugin_network import PluginNetwork
from garden_py.backend.linux.refusals import telling_memory_in_use
from garden_py.backend.linux.site import Site
from garden_py.backend.linux.undo import all_or_nothing
from garden_py.model.errors import InvalidField, NoLink
from garden_py.model.limits import NETWORK_LIMITS, Limits, Rlimits, rlimits_over
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point


class ContainerLimits:
    """What holds containers, wherever it is in force.

    Args:
        site: what the host offers.
        disk: limits on disk space.
        network: limits on bandwidth.
        plugged: refuses those for links that are a plugin's.
    """

    def __init__(
        self, site: Site, disk: ContainerDisk, network: LinuxNetwork, plugged: PluginNetwork
    ) -> None:
        self._site = site
        self._disk = disk
        self._network = network
        self._plugged = plugged

    async def read(self, container: LinuxContainer) -> Limits:
        """The limits in force.

        Raises:
            ContainerBroken, HostFault.
        """
        with may_be_gone(container.handle):
            found = read_limits(container.cgroup).over(self._site.block_io.read(container.cgroup))
        return await self._with_the_rest(container, found)

    async def change(
        self, container: LinuxContainer, limits: Limits, record: Callable[[Limits], None] | None = None
    ) -> Limits:
        """Change limits, all or none; those in force then.

        Args:
            container: whose.
            limits: what is not stated stays.
            record: as of service.ports.

        Raises:
            LimitRefused, NotSupported, InvalidField, HostFault, ContainerBroken: nothing has changed.
        """
        if limits.states_disk:
            self._disk.require_changeable(layer_of(container))
        if limits.states_network:
            self._require_link(container, limits)
        held_off = container.starts.hold_off() if limits.rlimits else nullcontext()
        async with held_off, all_or_nothing("limits", container.handle) as undo:
            if limits.states_disk:
                undo.push_async_callback(
                    self._set_disk, container, await self._disk.limits(layer_of(container))
                )
                await self._set_disk(container, limits)
            if limits.states_network:
                undo.push_async_callback(self._set_bandwidth, container, container.bandwidth)
                await self._set_bandwidth(container, limits.network_only().over(container.bandwidth))
            with may_be_gone(container.handle):
                now = self._change_cgroup(container, limits, undo)
            if limits.rlimits:
                await self._change_rlimits(container, limits.rlimits, undo)
            now = await self._with_the_rest(container, now)
            failpoints.reach(Point.LIMITS_CHANGE)
            if record is not None:
                record(now)
        return now

    async def _with_the_rest(self, container: LinuxContainer, found: Limits) -> Limits:
        """Limits of cgroups, and those in force elsewhere."""
        disk = await self._disk.limits(layer_of(container))
        found = found.over(disk).over(await self._read_bandwidth(container))
        return replace(found, rlimits=container.rlimits)

    def _change_cgroup(self, container: LinuxContainer, limits: Limits, undo: AsyncExitStack) -> Limits:
        block_io, cgroup = self._site.block_io, container.cgroup
        if limits.states_io:
            undo.callback(block_io.change, cgroup, block_io.read(cgroup))
        block_io.change(cgroup, limits)
        before = read_limits(cgroup)
        with telling_memory_in_use(cgroup):
            now = change_limits(cgroup, limits)
        undo.callback(change_limits, cgroup, limits.those_of(before))
        return now.over(block_io.read(cgroup))

    async def _change_rlimits(
        self, container: LinuxContainer, rlimits: Rlimits, undo: AsyncExitStack
    ) -> None:
        """Last of all: not every limit that is lowered can be raised again."""
        resource_limits.check(rlimits, self._site.facts.nofile_hard)
        undo.callback(await resource_limits.change_container(container, rlimits))
        undo.callback(setattr, container, "rlimits", container.rlimits)
        container.rlimits = rlimits_over(rlimits, container.rlimits)

    async def _set_disk(self, container: LinuxContainer, wanted: Limits) -> None:
        container.disk = await self._disk.update(layer_of(container), wanted)

    def _require_link(self, container: LinuxContainer, limits: Limits) -> None:
        """Refuse limits on bandwidth of a container that has no link of ours, before anything is changed.

        Raises:
            NotSupported: its link is a network plugin's.
            InvalidField: it has none.
        """
        lease = container.facts.lease
        if lease.plugin is not None:
            self._plugged.refuse_bandwidth(limits)
        if lease.address is None:
            (field, *_) = (name for name in NETWORK_LIMITS if getattr(limits, name) is not None)
            raise InvalidField(f"limits.{field}", str(NoLink(container.handle, lease.mode.value)))

    async def _set_bandwidth(self, container: LinuxContainer, wanted: Limits) -> None:
        facts = container.facts
        await self._network.set_bandwidth(
            container.handle, facts.pid, facts.lease, wanted, privileged=facts.privileged
        )
        container.bandwidth = wanted

    async def _read_bandwidth(self, container: LinuxContainer) -> Limits:
        """What the kernel says, where anything was stated; nobody else limits a link of ours."""
        if not container.bandwidth.states_network:
            return Limits()
        facts = container.facts
        return await self._network.bandwidth(
            container.handle, facts.pid, facts.lease, container.bandwidth, privileged=facts.privileged
        )
