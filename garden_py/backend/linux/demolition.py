"""Removing a container, from its facts alone: every step may find its work done already, half done, or not begun."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time

import structlog

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import ContainerCgroup
from garden_py.backend.host.pids import describe_stuck, kill_and_wait, read_stuck
from garden_py.backend.launcher.client import Launcher
from garden_py.backend.linux.container import ContainerFacts
from garden_py.backend.linux.disk import ContainerDisk
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.plugin_network import PluginNetwork
from garden_py.backend.linux.plugin_roots import PluginRoots, seconds_until
from garden_py.backend.linux.sidecars import owner_of, sidecar_directories
from garden_py.backend.linux.site import Site
from garden_py.model.errors import Unkillable
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point
from garden_py.observe.steps import Step, step

log = structlog.get_logger()
_RETRY_S = 0.005


class Demolition:
    """How containers are removed at one site."""

    def __init__(
        self,
        site: Site,
        launcher: Launcher,
        network: LinuxNetwork,
        disk: ContainerDisk,
        roots: PluginRoots,
        plugged: PluginNetwork,
    ) -> None:
        self._site = site
        self._disk = disk
        self._roots = roots
        self._plugged = plugged
        self._launcher = launcher
        self._network = network

    async def demolish(self, handle: str, facts: ContainerFacts) -> None:
        """Remove everything and give the leases back.

        Raises:
            Unkillable: not done within the configured deadline; call again later. The leases are still held.
        """
        deadline = time.monotonic() + self._site.config.destroy_timeout_s
        cgroup = self._site.cgroup(handle, facts)
        with step(Step.KILL):
            await self._kill(handle, facts, cgroup, deadline)
        failpoints.reach(Point.DESTROY_KILL)
        async with asyncio.TaskGroup() as steps:
            steps.create_task(self._detach(handle, facts, deadline))
            steps.create_task(self._remove_cgroups(handle, cgroup, deadline))
        # The runtime's record of a container whose processes, cgroups and mounts are gone is this directory and
        # nothing else; `runc delete` would do the same, 20 ms later (docs/decisions/0004-no-runc-delete.md).
        with step(Step.RECORD):
            self._remove_records(facts.runtime_id)
        failpoints.reach(Point.DESTROY_RUNTIME)
        with step(Step.DISK):
            await self._disk.remove(facts.runtime_id)
            await self._remove_roots(handle, facts, deadline)
        with step(Step.DIRECTORY):
            self._site.depot.discard(handle)
        failpoints.reach(Point.DESTROY_DIRECTORY)
        with step(Step.RELEASE):
            self._network.release(facts.lease)
            self._site.uids.release(facts.uid_slot)

    def _remove_records(self, runtime_id: str) -> None:
        """The container's own and its sidecars'."""
        root = self._site.runtime_root
        for name in os.listdir(root) if root.exists() else ():
            if name.startswith(runtime_id):
                shutil.rmtree(root / name, ignore_errors=False, onerror=_missing_is_fine)

    async def _kill(
        self, handle: str, facts: ContainerFacts, cgroup: ContainerCgroup, deadline: float
    ) -> None:
        """End PID 1, and with it everything in its pid namespace (pid_namespaces(7)); then whatever is not in it."""
        groups.thaw(cgroup)
        identity = facts.identity
        if identity is not None and not await kill_and_wait(identity, timeout_s=deadline - time.monotonic()):
            # With a pid namespace to empty, PID 1 waits for those that are left in it.
            left = filter(None, map(read_stuck, sorted({identity.pid, *groups.pids_in(cgroup)})))
            raise Unkillable(handle, describe_stuck(list(left), identity.pid))
        while pids := groups.pids_in(cgroup):
            if time.monotonic() > deadline:
                raise Unkillable(handle, describe_stuck(list(filter(None, map(read_stuck, pids)))))
            groups.kill_all(cgroup)
            await asyncio.sleep(_RETRY_S)

    async def _remove_roots(self, handle: str, facts: ContainerFacts, deadline: float) -> None:
        """What image plugins have made, of the container and of sidecars that are left in it."""
        directories = sidecar_directories(self._site.depot.directory(handle))
        sidecars = [owner_of(handle, process_id) for process_id, _ in directories]
        await self._roots.remove_all(handle, facts, sidecars, deadline=deadline)

    async def _detach(self, handle: str, facts: ContainerFacts, deadline: float) -> None:
        with step(Step.NETWORK):
            if facts.lease.plugin is not None:
                timeout_s = seconds_until(deadline)
                await self._plugged.detach(handle, facts.lease.plugin, timeout_s=timeout_s)
            await self._network.detach(handle, facts.lease, privileged=facts.privileged)
        failpoints.reach(Point.DESTROY_DETACH)

    async def _remove_cgroups(self, handle: str, cgroup: ContainerCgroup, deadline: float) -> None:
        with step(Step.CGROUP):
            await self._remove_cgroup(handle, cgroup, deadline)
        failpoints.reach(Point.DESTROY_CGROUP)

    async def _remove_cgroup(self, handle: str, cgroup: ContainerCgroup, deadline: float) -> None:
        # rmdir answers EBUSY until the last task has really left (cgroups(7)).
        while True:
            try:
                groups.remove(cgroup)
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline:
                    raise Unkillable(handle, f"its cgroup stays busy: {error.filename}") from error
                await asyncio.sleep(_RETRY_S)


def _missing_is_fine(
    function: object, path: str, info: tuple[type[BaseException], BaseException, object]
) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
