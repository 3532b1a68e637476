"""Processes with a root file system of their own inside a container: started, taken over, removed.

Each has an agent of its own, started by the OCI runtime in a new mount namespace and in the container's other
namespaces (docs/decisions/0015-sidecars.md). All that one has on the host is named after container and process:

    <container's directory>/sidecars/<process>/    bundle, layer, logs, the agent's socket; mkdir(2) is the claim
    <runtime>/<container's runtime id>-<hash>      the runtime's record
    <container's cgroup>/agent-<process>           the agent
    <container's cgroup>/[work/]p-<process>        the process and its children

so what an earlier server left half done is found by looking, and a container's destruction takes all of it along.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.cgroup import groups
from garden_py.backend.images.images import Images, Rootfs
from garden_py.backend.linux.agent_owner import AgentOwner
from garden_py.backend.linux.container import LinuxContainer
from garden_py.backend.linux.disk import ContainerDisk, WritableLayer
from garden_py.backend.linux.launching import AgentStarter, Launch, check_bind_sources, listen
from garden_py.backend.linux.plugin_roots import PluginRoots
from garden_py.backend.linux.site import Site
from garden_py.backend.streams.agent_replies import AgentExit
from garden_py.model.errors import (
    ContainerBroken,
    HostFault,
    ProcessIdInUse,
    ProcessStartFailed,
    ShuttingDown,
    Unkillable,
)
from garden_py.model.image import PullProgress
from garden_py.model.process import ProcessSpec
from garden_py.model.process import Sidecar as SidecarSpec

log = structlog.get_logger()
DIRECTORY = "sidecars"
_SOCKET = "agent.sock"
_REATTACH_TIMEOUT_S = 5.0
_RETRY_S, _RETRY_MAX_S = 0.005, 1.0
_DRAIN_S = 5.0
# OCI name of a namespace to its file in /proc/PID/ns; mount and cgroup are the sidecar's own.
_SHARED = {"user": "user", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts"}


def runtime_id_of(container_runtime_id: str, process_id: str) -> str:
    """The runtime's id of a sidecar; the part before the dash tells whose it is (ledger/files.py)."""
    return f"{container_runtime_id}-{hashlib.sha256(process_id.encode()).hexdigest()[:12]}"


def sidecar_directories(container_directory: Path) -> list[tuple[str, Path]]:
    """The process and the directory of each sidecar that a container has."""
    place = container_directory / DIRECTORY
    try:
        return [(name, place / name) for name in os.listdir(place)]
    except FileNotFoundError:
        return []


def owner_of(handle: str, process_id: str) -> str:
    """Under which name the store of images knows a sidecar; a container's is its handle."""
    return f"{handle}/{process_id}"


def sidecar_layer(container: LinuxContainer, process_id: str) -> WritableLayer | None:
    """What a process writes to, if that is not its container's."""
    process = container.processes.get(process_id)
    if process is None or process.spec.sidecar is None:
        return None
    return WritableLayer(
        runtime_id_of(container.facts.runtime_id, process_id),
        owner_of(container.handle, process_id),
        process.spec.sidecar.image,
        process.spec.limits.disk_only(),
    )


class Sidecar(AgentOwner):
    """One sidecar's agent."""

    def __init__(self, handle: str, process_id: str) -> None:
        super().__init__(handle)
        self.process_id = process_id

    def connect(
        self,
        socket_path: Path,
        *,
        patience_s: float,
        on_exit: Callable[[AgentExit], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Connect to the agent; arguments as AgentLink's, but only its own process's exit is listened to."""

        def exited(told: AgentExit) -> None:
            if told.process_id == self.process_id:
                on_exit(told)

        def lost(reason: str) -> None:
            self.broken_because = self.broken_because or reason
            on_lost(reason)

        self._connect(socket_path, patience_s=patience_s, on_exit=exited, on_lost=lost)


class Sidecars:
    """How sidecars are made and removed at one site.

    Args:
        on_lost: called with container, process id and reason when the agent of a running one is gone.
    """

    def __init__(
        self,
        site: Site,
        starter: AgentStarter,
        images: Images,
        disk: ContainerDisk,
        roots: PluginRoots,
        on_lost: Callable[[LinuxContainer, str, str], None],
    ) -> None:
        self._site = site
        self._starter = starter
        self._images = images
        self._disk = disk
        self._roots = roots
        self._on_lost = on_lost
        self._fetching: set[asyncio.Task[Any]] = set()
        self._ending = False

    # --- start

    async def launch(self, container: LinuxContainer, spec: ProcessSpec, sidecar: SidecarSpec) -> Sidecar:
        """Start the agent of a sidecar; on failure nothing of it is left.

        Raises:
            InvalidRequest, and the errors of Images.prepared: nothing was begun.
            HostFault, ContainerBroken, ShuttingDown.
            ProcessIdInUse: by it an image plugin knows the root of another container or sidecar.
        """
        check_bind_sources(sidecar.bind_mounts, "spec.sidecar.bind_mounts")
        if self._roots.commands_for(sidecar.image, "spec.sidecar.image"):
            self._disk.check_for_plugin(spec.limits)
        else:
            self._disk.check(spec.limits)
        try:
            return await container.until_it_goes(self._prepare_and_launch(container, spec, sidecar))
        except ContainerBroken:
            if self._ending and not container.broken_because:
                raise ShuttingDown from None
            raise

    async def _prepare_and_launch(
        self, container: LinuxContainer, spec: ProcessSpec, apart: SidecarSpec
    ) -> Sidecar:
        def report(progress: PullProgress) -> None:
            log.debug("sidecar.image", handle=container.handle, process_id=spec.id, progress=str(progress))

        if self._roots.commands_for(apart.image, "spec.sidecar.image"):
            return await self._launch(container, spec, apart, None)
        async with AsyncExitStack() as held:
            with self._fetch():
                rootfs = await held.enter_async_context(
                    self._images.prepared(apart.image, apart.image_auth, "spec.sidecar.image", report)
                )
            return await self._launch(container, spec, apart, rootfs)

    @contextmanager
    def _fetch(self) -> Iterator[None]:
        """While an image is fetched, or a plugin makes a root of it: nothing runs yet, and it may take minutes."""
        task = asyncio.current_task()
        assert task is not None
        self._fetching.add(task)
        try:
            yield
        finally:
            self._fetching.discard(task)

    def end_fetches(self) -> None:
        """For a server that stops: give up starts of which nothing but the fetch of an image has been done."""
        self._ending = True
        for task in self._fetching:
            task.cancel()

    async def _launch(
        self, container: LinuxContainer, spec: ProcessSpec, apart: SidecarSpec, rootfs: Rootfs | None
    ) -> Sidecar:
        """Args as of `_make`; rootfs: None: an image plugin makes it."""
        timeout_s, process_id = self._site.config.create_timeout_s, spec.id
        try:
            async with asyncio.timeout(timeout_s):
                directory = await self._claim(container, process_id)
            if rootfs is None:
                with self._fetch():
                    rootfs = await self._make_root(container, spec, apart, directory)
            async with asyncio.timeout(timeout_s):
                sidecar = await self._make(container, spec, apart, rootfs, directory)
                await sidecar.greet(timeout_s=timeout_s)
        except BaseException as failure:
            await asyncio.shield(self._remove(container, process_id))
            if isinstance(failure, TimeoutError):
                raise ProcessStartFailed(f"its agent did not start in {timeout_s:g} s") from failure
            if isinstance(failure, OSError):
                raise HostFault("start sidecar", str(failure)) from failure
            raise
        container.sidecars[process_id] = sidecar
        return sidecar

    async def _claim(self, container: LinuxContainer, process_id: str) -> Path:
        directory = self._directory(container, process_id)
        if (removal := container.retiring.get(process_id)) is not None:
            await asyncio.wait(
                [removal]
            )  # an earlier start has failed; two removals would not know of each other
        if directory.exists():
            await self._remove(container, process_id)
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        directory.mkdir(mode=0o700)
        return directory

    async def _make_root(
        self, container: LinuxContainer, spec: ProcessSpec, apart: SidecarSpec, directory: Path
    ) -> Rootfs:
        owner = owner_of(container.handle, spec.id)
        if not self._roots.is_free(owner):
            raise ProcessIdInUse(container.handle, spec.id)
        return await self._roots.make(
            owner,
            directory,
            apart.image,
            apart.image_auth,
            spec.limits,
            privileged=container.facts.privileged,
        )

    async def _make(
        self,
        container: LinuxContainer,
        spec: ProcessSpec,
        apart: SidecarSpec,
        rootfs: Rootfs,
        directory: Path,
    ) -> Sidecar:
        facts, process_id = container.facts, spec.id
        runtime_id, layer = runtime_id_of(facts.runtime_id, process_id), directory
        if rootfs.ready is None:
            if rootfs.used is not None:
                self._images.store.hold(owner_of(container.handle, process_id), directory, rootfs.used)
            layer = await self._disk.make(runtime_id, spec.limits, rootfs, "spec.limits") or directory
        with _namespaces(container) as joins, _short_path(directory) as place:
            launch = Launch(
                handle=container.handle,
                runtime_id=runtime_id,
                directory=directory,
                layer=layer,
                etc=container.directory / "etc",
                layers=rootfs.directories,
                image=rootfs.name,
                isolation=facts.isolation
                or self._site.isolation(privileged=facts.privileged, slot=facts.uid_slot),
                hostname="",
                cgroup_path=container.cgroup.sidecar(process_id).runtime_path,
                bind_mounts=apart.bind_mounts,
                joins=joins,
                field="spec.sidecar.",
                ready=rootfs.ready,
                first_mounts=rootfs.mounts,
            )
            self._starter.prepare(launch)
            with listen(place / _SOCKET) as listener:
                pid = await self._starter.start(launch, listener)
        if not apart.own_limits:
            self._site.block_io.admit(container.cgroup, pid)
        return self._connect(container, process_id)

    def _connect(self, container: LinuxContainer, process_id: str) -> Sidecar:
        sidecar = Sidecar(container.handle, process_id)
        with _short_path(self._directory(container, process_id)) as place:
            sidecar.connect(
                place / _SOCKET,
                patience_s=self._site.config.agent_patience_s,
                on_exit=container.exited,
                on_lost=lambda reason: self._on_lost(container, process_id, reason),
            )
        return sidecar

    def _directory(self, container: LinuxContainer, process_id: str) -> Path:
        return container.directory / DIRECTORY / process_id

    # --- after a restart

    async def adopt(self, container: LinuxContainer) -> None:
        """Connect to the agents that an earlier server has left in a container, but those that do not answer."""
        found = await asyncio.gather(*(self._reconnect(container, each) for each in self._names(container)))
        container.sidecars.update({each.process_id: each for each in found if each is not None})

    async def _reconnect(self, container: LinuxContainer, process_id: str) -> Sidecar | None:
        try:
            sidecar = self._connect(container, process_id)
            await sidecar.greet(timeout_s=_REATTACH_TIMEOUT_S)
        except (OSError, ContainerBroken) as error:
            log.warning("sidecar.lost", handle=container.handle, process_id=process_id, error=str(error))
            return None
        return sidecar

    def _names(self, container: LinuxContainer) -> list[str]:
        return [name for name, _ in sidecar_directories(container.directory)]

    def tidy(self, container: LinuxContainer) -> None:
        """Begin to remove what belongs to no running process."""
        for process_id in self._names(container):
            process = container.processes.get(process_id)
            if process is None or process.exit is not None:
                self.retire(container, process_id)

    # --- end

    def kill(self, container: LinuxContainer, process_id: str) -> None:
        """Kill its agent and processes, now."""
        for leaf in (_agent_leaf(container, process_id), *_leaves(container, process_id)):
            groups.kill_leaf(container.cgroup, leaf)

    def retire(self, container: LinuxContainer, process_id: str) -> None:
        """Begin to end and remove a sidecar, as its process has ended; twice is fine."""
        if process_id in container.retiring or container.broken_because:
            return  # what is broken is removed as a whole
        task = asyncio.ensure_future(self._remove(container, process_id))
        container.retiring[process_id] = task
        task.add_done_callback(partial(_retired, container, process_id))
        container.track(task)

    async def _remove(self, container: LinuxContainer, process_id: str) -> None:
        """Remove all of a sidecar. What the kernel holds on to is tried again until the container goes.

        The agent goes last: a terminal's output passes through it, and ends when nobody has the terminal open any more.
        """
        sidecar = container.sidecars.pop(process_id, None)
        if sidecar is not None:
            sidecar.broken_because = "it has ended"
            sidecar.disconnect()
        delay_s, process = _RETRY_S, container.processes.get(process_id)
        drain_until = asyncio.get_running_loop().time() + _DRAIN_S
        while not self._try_to_remove(container, process_id):
            drained = process is None or process.is_drained
            if drained or asyncio.get_running_loop().time() > drain_until:
                groups.kill_leaf(container.cgroup, _agent_leaf(container, process_id))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RETRY_MAX_S)
        runtime_id = runtime_id_of(container.facts.runtime_id, process_id)
        with suppress(FileNotFoundError):
            shutil.rmtree(self._site.runtime_root / runtime_id)
        await self._disk.remove(runtime_id)
        owner = owner_of(container.handle, process_id)
        await self._roots.remove(owner, timeout_s=self._site.config.destroy_timeout_s)
        self._site.depot.throw_away(self._directory(container, process_id))
        self._images.store.let_go(owner)

    def _try_to_remove(self, container: LinuxContainer, process_id: str) -> bool:
        try:
            for leaf in _leaves(container, process_id):
                groups.kill_leaf(container.cgroup, leaf)
                groups.remove_leaf(container.cgroup, leaf)
            groups.remove(container.cgroup.sidecar(process_id))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    async def abandon(self, container: LinuxContainer) -> None:
        """Stop starting and removing a container's sidecars; it is being destroyed.

        Raises:
            Unkillable: a start does not come to an end.
        """
        for job in container.jobs:
            job.cancel()
        if container.jobs:
            _, pending = await asyncio.wait(container.jobs, timeout=self._site.config.destroy_timeout_s)
            if pending:
                raise Unkillable(container.handle, "a sidecar is still being started or removed")


def _retired(container: LinuxContainer, process_id: str, task: asyncio.Future[None]) -> None:
    container.retiring.pop(process_id, None)
    if not task.cancelled() and (error := task.exception()) is not None:
        # Its container's destruction takes what is left.
        log.error("sidecar.not_removed", handle=container.handle, process_id=process_id, error=str(error))


def _agent_leaf(container: LinuxContainer, process_id: str) -> tuple[str, ...]:
    return (os.path.basename(container.cgroup.sidecar(process_id).path),)


def _leaves(container: LinuxContainer, process_id: str) -> list[tuple[str, ...]]:
    """Where its processes can be: within or beside the container's limits."""
    return [container.cgroup.leaf(process_id), container.cgroup.leaf(process_id, beside=True)]


@contextmanager
def _namespaces(container: LinuxContainer) -> Iterator[tuple[tuple[str, str], ...]]:
    """The namespaces that a sidecar shares: OCI name, and a path that stands for exactly this one.

    A path with PID 1's number could lead to somebody else's when PID 1 has ended; one to a descriptor of ours cannot.

    Raises:
        ContainerBroken: PID 1 has ended.
    """
    identity, privileged = container.facts.identity, container.facts.privileged
    pidfd = identity.open() if identity is not None else None
    if identity is None or pidfd is None:
        raise ContainerBroken(container.handle, "its PID 1 has ended")
    fds: dict[str, int] = {}
    try:
        try:
            for name, file in _SHARED.items():
                if name != "user" or not privileged:
                    fds[name] = os.open(f"/proc/{identity.pid}/ns/{file}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ContainerBroken(container.handle, "its PID 1 has ended") from error
        still = identity.open()  # so what was opened in between was its own
        if still is None:
            raise ContainerBroken(container.handle, "its PID 1 has ended")
        os.close(still)
        yield tuple((name, f"/proc/{os.getpid()}/fd/{fd}") for name, fd in fds.items())
    finally:
        for fd in (pidfd, *fds.values()):
            os.close(fd)


@contextmanager
def _short_path(directory: Path) -> Iterator[Path]:
    """A path to a directory that leaves room for a socket's name: sun_path holds 108 bytes (unix(7))."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
