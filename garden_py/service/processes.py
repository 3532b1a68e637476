"""Processes: start, find, signal, wait. Output is read from the process's logs (service/ports.py)."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import structlog

from garden_py.model import errors
from garden_py.model.codec import dump_exit, dump_process_spec
from garden_py.model.cpu import with_quota
from garden_py.model.handle import make_name
from garden_py.model.process import ExitStatus, ProcessSpec, check_process
from garden_py.model.spec import REQUEST_ID_MAX
from garden_py.service.events import EventHub, EventKind
from garden_py.service.expiry import Expiry
from garden_py.service.ports import Backend, ProcessRow, RunningProcess
from garden_py.service.registry import Container, ProcessEntry, Registry

log = structlog.get_logger()
_SAVE_AGAIN_S = 1.0


class Processes:
    """The verbs about processes."""

    def __init__(
        self,
        backend: Backend,
        registry: Registry,
        events: EventHub,
        expiry: Expiry,
        *,
        cpu_quota_us_per_share: int = 0,
    ) -> None:
        self._cpu_quota_us_per_share = cpu_quota_us_per_share
        self._backend = backend
        self._registry = registry
        self._events = events
        self._expiry = expiry

    def use(self, handle: str) -> AbstractContextManager[Container]:
        """Hold a container in use, for the length of a stream."""
        return self._expiry.use(self._registry.get(handle))

    async def start(self, handle: str, spec: ProcessSpec, request_id: str = "") -> RunningProcess:
        """Start a process; with the id and request id of an earlier start, return that one's.

        Raises:
            InvalidRequest, ContainerNotFound, ContainerBusy, ContainerBroken, ProcessIdInUse, ExecutableNotFound,
            NotExecutable, UserNotFound, ProcessStartFailed, TaskLimitReached.
        """
        check_process(spec)
        if len(request_id) > REQUEST_ID_MAX:
            raise errors.InvalidField("request_id", f"is longer than {REQUEST_ID_MAX} characters")
        container = self._registry.get(handle)
        container.require_usable("given a process")
        spec = spec if spec.id else replace(spec, id=make_name())
        if spec.is_beside:  # all others are within what their container's shares stand for
            spec = replace(spec, limits=with_quota(spec.limits, self._cpu_quota_us_per_share))
        with self._expiry.use(container):
            if (starting := container.starting.get(spec.id)) is not None:
                return self._repeated(container, await asyncio.shield(starting), request_id).process
            if (known := container.processes.get(spec.id)) is not None:
                return self._repeated(container, known, request_id).process
            job = asyncio.ensure_future(self._start(container, spec, request_id))
            container.starting[spec.id] = job
            job.add_done_callback(lambda done: _finished(container, spec.id, done))
            return (await asyncio.shield(job)).process

    def _repeated(self, container: Container, known: ProcessEntry, request_id: str) -> ProcessEntry:
        if not request_id or known.request_id != request_id:
            raise errors.ProcessIdInUse(container.handle, known.process.id)
        return known

    async def _start(self, container: Container, spec: ProcessSpec, request_id: str) -> ProcessEntry:
        started_ns = time.time_ns()

        def record() -> None:
            # The pid comes with the exit; after a restart the agent tells it.
            row = ProcessRow(
                container.handle, spec.id, request_id, started_ns, 0, dump_process_spec(spec), exit=None
            )
            self._registry.records.save_process(row)

        # The container's entries are for programs of its own image (Garden statement PE4).
        env = spec.env if spec.sidecar is not None else (*container.spec.env, *spec.env)
        try:
            process = await self._backend.start_process(container.handle, spec, env, record)
        except BaseException:
            self._registry.records.forget_process(container.handle, spec.id)
            raise
        entry = ProcessEntry(process, request_id)
        container.processes[spec.id] = entry
        self._events.publish(EventKind.PROCESS_STARTED, container.handle, process_id=spec.id)
        if process.exit is not None:
            self.record_exit(container, process)
        return entry

    def get(self, handle: str, process_id: str) -> RunningProcess:
        """A process, running or finished.

        Raises:
            ContainerNotFound, ProcessNotFound.
        """
        container = self._registry.get(handle)
        entry = container.processes.get(process_id)
        if entry is None:
            raise errors.ProcessNotFound(handle, process_id)
        return entry.process

    def find_sidecar(self, process_id: str) -> tuple[str, RunningProcess] | None:
        """The sidecar of that id, in whichever container it is, and that container's handle."""
        for container in self._registry:
            entry = container.processes.get(process_id)
            if entry is not None and entry.process.spec.sidecar is not None:
                return container.handle, entry.process
        return None

    def list_processes(self, handle: str) -> list[RunningProcess]:
        """A container's processes, oldest first."""
        with self.use(handle) as container:
            found = [entry.process for entry in container.processes.values()]
        return sorted(found, key=lambda process: process.started_ns)

    async def signal(self, handle: str, process_id: str, number: int, *, group: bool) -> bool:
        """Send a signal; False if the process had exited."""
        with self.use(handle):
            return await self.get(handle, process_id).signal(number, group=group)

    async def wait(self, handle: str, process_id: str, timeout_s: float | None) -> ExitStatus | None:
        """The exit status; None when timeout_s seconds have passed before."""
        with self.use(handle):
            process = self.get(handle, process_id)
            try:
                async with asyncio.timeout(timeout_s):
                    return await process.wait()
            except TimeoutError:
                return None

    async def close(self) -> None:
        """Wait for starts under way: one given up now would be forgotten here, and run in its container."""
        starting = [job for container in self._registry for job in container.starting.values()]
        if starting:
            await asyncio.wait(starting)

    # --- what the backend reports

    def exited(self, handle: str, process: RunningProcess) -> None:
        """A process has ended. Before its start was answered, the start records it."""
        container = self._registry.find(handle)
        if container is not None and process.id in container.processes:
            self.record_exit(container, process)

    def record_exit(self, container: Container, process: RunningProcess) -> None:
        """Write an exit into the journal, then tell of it."""
        status = process.exit
        assert status is not None
        self._save_exit(container, process, status)
        self._events.publish(EventKind.PROCESS_EXITED, container.handle, process_id=process.id, exit=status)
        # Whoever waits for the exit is called first.
        code, handle = status.shell_code(), container.handle
        loop = asyncio.get_running_loop()
        loop.call_soon(partial(log.info, "process.exited", handle=handle, process_id=process.id, status=code))

    def _save_exit(self, container: Container, process: RunningProcess, status: ExitStatus) -> None:
        """On a full disk, later: until it is written, the agent keeps the exit for the next server to ask for."""
        if self._registry.find(container.handle) is not container:
            return
        try:
            self._registry.records.save_exit(container.handle, process.id, process.pid, dump_exit(status))
        except errors.HostFault as error:
            log.error("process.exit_not_recorded", handle=container.handle, error=str(error))
            loop = asyncio.get_running_loop()
            loop.call_later(_SAVE_AGAIN_S, self._save_exit, container, process, status)
            return
        process.exit_recorded()


def _finished(container: Container, process_id: str, job: asyncio.Future[ProcessEntry]) -> None:
    container.starting.pop(process_id, None)
    if not job.cancelled():
        job.exception()  # seen, also when the caller has left
