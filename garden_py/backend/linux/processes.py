"""Processes of all containers: started, adopted after a restart, measured, forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import structlog

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.stats import read_usage, without
from garden_py.backend.host.rlimits import set_limits
from garden_py.backend.images.images import Images
from garden_py.backend.linux.agent_owner import AgentOwner
from garden_py.backend.linux.container import LinuxContainer, may_be_gone
from garden_py.backend.linux.disk import ContainerDisk
from garden_py.backend.linux.launching import AgentStarter
from garden_py.backend.linux.plugin_roots import PluginRoots
from garden_py.backend.linux.process import LinuxProcess
from garden_py.backend.linux.sidecars import Sidecar, Sidecars, owner_of
from garden_py.backend.linux.site import Site
from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.streams.agent_link import AgentLink
from garden_py.backend.streams.agent_replies import Spawned
from garden_py.model.codec import load_exit
from garden_py.model.errors import (
    ContainerBroken,
    InvalidField,
    ProcessExited,
    ProcessNotCounted,
    ProcessNotFound,
    ProcessStartFailed,
)
from garden_py.model.image import ImageConfig
from garden_py.model.process import ProcessSpec
from garden_py.model.process import Sidecar as SidecarSpec
from garden_py.service.ports import BackendEvents, ProcessRow, Usage

log = structlog.get_logger()


class LinuxProcesses:
    """The verbs about processes at one site."""

    def __init__(
        self,
        site: Site,
        starter: AgentStarter,
        images: Images,
        disk: ContainerDisk,
        roots: PluginRoots,
        events: BackendEvents,
    ) -> None:
        self._site = site
        self._images = images
        self._events = events
        self.sidecars = Sidecars(site, starter, images, disk, roots, self._sidecar_lost)

    # --- start

    async def start(
        self, container: LinuxContainer, spec: ProcessSpec, env: tuple[str, ...], record: Callable[[], None]
    ) -> LinuxProcess:
        """Start a process; see service.ports."""
        container.spawning.add(spec.id)
        try:
            if spec.sidecar is None:
                return await self._spawn(container, container, spec, env, record)
            return await self._start_sidecar(container, spec, spec.sidecar, env, record)
        finally:
            container.spawning.discard(spec.id)

    async def _start_sidecar(
        self,
        container: LinuxContainer,
        spec: ProcessSpec,
        apart: SidecarSpec,
        env: tuple[str, ...],
        record: Callable[[], None],
    ) -> LinuxProcess:
        try:
            sidecar = await self.sidecars.launch(container, spec, apart)
            spec = replace(
                spec, sidecar=replace(apart, image_auth=None)
            )  # nobody needs the password any more
            try:
                return await self._spawn(container, sidecar, spec, env, record)
            except BaseException:
                self.sidecars.retire(container, spec.id)
                raise
        except ContainerBroken as error:
            if container.broken_because:
                raise
            raise ProcessStartFailed(f"its agent is gone: {error.reason}") from error

    async def _spawn(
        self,
        container: LinuxContainer,
        owner: AgentOwner,
        spec: ProcessSpec,
        env: tuple[str, ...],
        record: Callable[[], None],
    ) -> LinuxProcess:
        # A sidecar beside the container's limits is in a group of its own, which is empty.
        room = nullcontext() if spec.is_beside else container.task_room.take()
        async with container.starts.begin(), room:
            return await self._spawn_now(container, owner, spec, env, record)

    async def _spawn_now(
        self,
        container: LinuxContainer,
        owner: AgentOwner,
        spec: ProcessSpec,
        env: tuple[str, ...],
        record: Callable[[], None],
    ) -> LinuxProcess:
        image = self._config_of(container, spec)
        leaf, told = container.leaf_of(spec), run_from_image(spec, image) if spec.from_image else spec
        told = replace(told, rlimits=container.rlimits_for(spec))
        try:
            if spec.has_own_group:
                with may_be_gone(container.handle):
                    groups.add_process_group(container.cgroup, leaf, spec.limits)
                    container.watch_oom(spec.id, leaf)  # before it can run: what was before is not told
            made: list[LinuxProcess] = []

            def prepare() -> None:
                record()
                made.append(self._make(container, spec, owner.link, pid=0, started_ns=time.time_ns()))

            with container.group_fds(leaf) as cgroup_fds:
                spawned = await owner.link.spawn(
                    told,
                    (*image.env, *env),
                    cgroup_fds,
                    bounding=self._bounding(container, told),
                    before_exec=prepare,
                    raise_limits=_raise_limits(container, told),
                )
            (process,) = made
            try:
                self._connect(container, process, spawned)
            except BaseException:  # it runs already, and nobody would know of it
                process.let_go()
                with suppress(ContainerBroken):
                    await owner.link.cancel(spec.id)
                raise
            container.add_process(process)
        except BaseException:
            container.unwatch_oom(spec.id)
            if spec.has_own_group:
                container.drop_process_group(leaf)
            raise
        return process

    def _config_of(self, container: LinuxContainer, spec: ProcessSpec) -> ImageConfig:
        """What the image that a process is run in says; nothing if that is a directory."""
        owner = container.handle if spec.sidecar is None else owner_of(container.handle, spec.id)
        used = self._images.store.held_by(owner)
        return ImageConfig() if used is None else used.config

    def _make(
        self, container: LinuxContainer, spec: ProcessSpec, link: AgentLink | None, **facts: Any
    ) -> LinuxProcess:
        def drop_group() -> None:
            if spec.sidecar is None:
                container.drop_process_group(container.leaf_of(spec))
            else:
                self.sidecars.retire(container, spec.id)

        return container.make_process(
            spec,
            directory=self._site.depot.streams(container.handle, spec.id),
            retention_bytes=self._site.config.output_retention_bytes,
            link=link,
            drop_group=drop_group,
            **facts,
        )

    def _connect(self, container: LinuxContainer, process: LinuxProcess, spawned: Spawned) -> None:
        process.pid = spawned.pid
        process.connect(
            spawned, lambda reason: log.warning("stream.failed", handle=container.handle, reason=reason)
        )

    def _bounding(self, container: LinuxContainer, spec: ProcessSpec) -> int | None:
        """Non-root users of a privileged container get a smaller bounding set (Garden statement C2)."""
        if not container.facts.privileged or spec.user.partition(":")[0] in ("", "0", "root"):
            return None
        return (
            load_runc_config().capability_mask("privileged_non_root") & self._site.facts.bounding_capabilities
        )

    # --- after a restart

    async def adopt(self, container: LinuxContainer, row: ProcessRow, spec: ProcessSpec) -> LinuxProcess:
        """The process of a row: connected again if its agent still holds it.

        An agent holds a process until its exit is in the journal; so one that it does not hold and that has no exit
        there was never started.
        """
        owner = container if spec.sidecar is None else container.sidecars.get(spec.id)
        if isinstance(owner, Sidecar) and owner.broken_because:
            owner = None  # it has gone since it was greeted: only its own process with it
        held = owner is not None and spec.id in owner.held
        if not held and row.exit is None and owner is not None and not container.broken_because:
            raise ProcessNotFound(container.handle, spec.id)
        process = self._make(
            container,
            spec,
            owner.link if held and owner is not None else None,
            pid=row.pid,
            started_ns=row.started_ns,
            recover=True,
        )
        container.processes[spec.id] = process
        if row.exit is not None:
            process.finish(load_exit(row.exit))
            container.heed_exit(process)
        spawned: Spawned | None = None
        if held and owner is not None:
            try:
                spawned = await owner.link.attach(spec.id, is_tty=spec.tty is not None)
            except ContainerBroken:
                if owner is container:
                    raise
        if spawned is not None and owner is not None:
            self._connect(container, process, spawned)
            ended = owner.held[spec.id] or spawned.exit  # it may have ended since the agent was greeted
            if ended is not None and process.exit is None:
                process.ended_unseen(ended)
                container.remember_oom(process)
            elif process.exit is None and process.own_group:
                container.watch_oom(spec.id, container.leaf_of(spec))
        else:
            for output in process.logs.values():
                output.close()
            if process.exit is None:
                reason = container.broken_because or "the agent of this sidecar is gone"
                process.lost(
                    f"container broken: {reason}" if container.broken_because else reason, time.time_ns()
                )
        return process

    # --- later

    def _sidecar_lost(self, container: LinuxContainer, process_id: str, reason: str) -> None:
        """Its agent is gone, or of no use any more: its process goes with it, and nothing else."""
        process = container.processes.get(process_id)
        if container.broken_because or process is None or process.exit is not None:
            return
        self.sidecars.kill(container, process_id)  # so what is told is true: it has ended
        container.unwatch_oom(process_id)
        process.lost(f"the agent of this sidecar is gone: {reason}", time.time_ns())
        self._events.process_exited(container.handle, process)

    def forget(self, container: LinuxContainer, process_id: str) -> None:
        """Drop a finished process and its output."""
        process = container.processes.pop(process_id, None)
        if process is None:
            return
        process.let_go()
        for output in process.logs.values():
            output.delete()
        process.exit_recorded()


def run_from_image(spec: ProcessSpec, image: ImageConfig) -> ProcessSpec:
    """The process that an image's config describes, as far as spec does not say otherwise.

    Raises:
        InvalidField: the image names no program.

    Source: OCI image-spec config.md (Entrypoint, Cmd, User, WorkingDir).
    """
    command = (*image.entrypoint, *(spec.args or image.cmd))
    if not command or not command[0]:
        raise InvalidField("spec.path", "is empty, and the image states neither an entrypoint nor a command")
    return replace(
        spec,
        path=command[0],
        args=command[1:],
        user=spec.user or image.user,
        dir=spec.dir or image.working_dir,
    )


def _raise_limits(container: LinuxContainer, spec: ProcessSpec) -> Callable[[int], None] | None:
    """What sets the limits that a process wants, should it not be able to itself; None: it wants none."""
    if not spec.rlimits:
        return None
    return partial(set_limits, limits=spec.rlimits, beside=container.facts.pid)


def usage_of(container: LinuxContainer, process_id: str) -> Usage:
    """What one process and its children use.

    Raises:
        ProcessNotFound, ProcessExited.
        ProcessNotCounted: it is counted with its container.
    """
    process = container.processes.get(process_id)
    if process is None:
        raise ProcessNotFound(container.handle, process_id)
    if process.exit is not None:
        raise ProcessExited(process_id)
    if not process.own_group:
        raise ProcessNotCounted(container.handle, process_id)
    try:
        with may_be_gone(container.handle):
            return read_usage(container.cgroup, container.leaf_of(process.spec))
    except ContainerBroken as error:  # only its own group is gone: it has just ended
        raise ProcessExited(process_id) from error


def without_sidecars(container: LinuxContainer, total: Usage) -> Usage:
    """A container's usage without the sidecars that have limits of their own (Garden statement PE10)."""
    for process_id in container.sidecars:
        process = container.processes.get(process_id)
        if process is not None and process.spec.sidecar is not None and process.spec.sidecar.own_limits:
            with suppress(ContainerBroken), may_be_gone(container.handle):  # it has just ended
                total = without(total, read_usage(container.cgroup, container.leaf_of(process.spec)))
    return total
