"""From the journal to a running service: after a restart, a crash, or a reboot of the machine."""

from __future__ import annotations

import structlog

from garden_py.model.codec import load_container_spec, load_process_spec
from garden_py.model.errors import ContainerBroken, GardenError, ProcessNotFound
from garden_py.model.lifecycle import USABLE, State
from garden_py.service.containers import Containers
from garden_py.service.events import EventHub, EventKind
from garden_py.service.ports import Backend, BackendEvents, ContainerRow
from garden_py.service.processes import Processes
from garden_py.service.registry import Container, ProcessEntry, Registry

log = structlog.get_logger()


class Recovery:
    """Starts the backend and puts back what the journal knows."""

    def __init__(
        self,
        backend: Backend,
        registry: Registry,
        containers: Containers,
        processes: Processes,
        events: EventHub,
    ) -> None:
        self._backend = backend
        self._registry = registry
        self._containers = containers
        self._processes = processes
        self._events = events

    async def run(self) -> None:
        """Take over running containers; have half-made and half-destroyed ones removed in the background."""
        rows = self._registry.records.containers()
        lost = await self._backend.open(
            BackendEvents(self._processes.exited, self._out_of_memory, self._broken), rows
        )
        doomed: list[Container] = []
        for row in rows:
            container = self._restore(row)
            if row.state is State.CREATING or row.state in (State.DESTROYING, State.UNKILLABLE):
                doomed.append(container)
                continue
            await self._restore_processes(container)
            if row.handle in lost:
                self._broken(row.handle, lost[row.handle])
            self._containers.expiry.arm(container)  # also a broken one goes when its grace time has passed
        for container in doomed:
            self._containers.resume_destroy(container)
        if rows:
            log.info("server.recovered", containers=len(rows), lost=len(lost), removing=len(doomed))

    def _restore(self, row: ContainerRow) -> Container:
        container = Container(
            load_container_spec(row.spec),
            row.request_id,
            row.created_ns,
            state=row.state,
            state_reason=row.state_reason,
            facts=row.facts,
        )
        self._registry.add(container)
        return container

    async def _restore_processes(self, container: Container) -> None:
        """Bring a container's processes back: of a broken one, their exits and what is kept of their output."""
        for row in self._registry.records.processes(container.handle):
            spec = load_process_spec(row.spec)
            try:
                process = await self._backend.adopt_process(container.handle, row, spec)
            except ProcessNotFound:
                self._registry.records.forget_process(container.handle, row.id)
                continue
            except ContainerBroken as error:
                self._broken(
                    container.handle, error.reason
                )  # the next one would wait for the same agent in vain
                return
            except GardenError as error:
                log.error("process.lost", handle=container.handle, process_id=row.id, error=str(error))
                continue
            container.processes[row.id] = ProcessEntry(process, row.request_id)
            if row.exit is not None:
                process.exit_recorded()
            elif process.exit is not None:
                self._processes.record_exit(container, process)

    # --- what the backend reports

    def _out_of_memory(self, handle: str, process_id: str) -> None:
        container = self._registry.find(handle)
        if container is not None:
            container.note("Out of memory")
            self._events.publish(EventKind.OUT_OF_MEMORY, handle, process_id=process_id)

    def _broken(self, handle: str, reason: str) -> None:
        container = self._registry.find(handle)
        if container is not None and container.state in USABLE:
            self._registry.move(container, State.BROKEN, reason)
            self._events.publish(EventKind.CONTAINER_BROKEN, handle, reason=reason)
            log.error("container.broken", handle=handle, reason=reason)
