"""From the journal to a running service: after a restart, a crash, or a reboot of the machine.

The server serves before everything is done: what a reboot or a crash has left is removed in the background, and an
agent that is slow to answer holds up only the calls about its own container.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from functools import partial

import structlog

from garden_py.model.codec import load_container_spec, load_process_spec
from garden_py.model.errors import ContainerBroken, GardenError, ProcessNotFound
from garden_py.model.lifecycle import USABLE, State
from garden_py.service.connections import Connections
from garden_py.service.containers import Containers
from garden_py.service.events import EventHub, EventKind
from garden_py.service.ports import Backend, BackendEvents, ContainerRow, OutOfMemory
from garden_py.service.processes import Processes
from garden_py.service.registry import Container, ProcessEntry, Registry

log = structlog.get_logger()
# How long all containers' agents may take together before the server serves without the last ones. Sound ones answer
# in milliseconds, and a call about a late one waits for it anyway.
_SERVE_AFTER_S = 0.1
# How much longer an answer about many containers waits for late ones.
_BULK_PATIENCE_S = 1.0
_DOOMED = (State.CREATING, State.DESTROYING, State.UNKILLABLE)
_HALF_MADE = "its create was cut short by the end of the server"
_REBOOTED = "the machine was rebooted"
_DISCARDED = "the server was started with --destroy-containers-on-startup"


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
        self._adoptions: dict[str, asyncio.Task[None]] = {}

    async def run(self, *, rebooted: bool = False, discard: bool = False) -> None:
        """Take over running containers; have half-made and half-destroyed ones removed in the background.

        Returns when every container is there, or a moment later without those whose agents have not answered yet;
        calls about these wait, see `wait_for`.

        Args:
            rebooted: nothing of what the journal knows can still run; all of it is removed in the background.
            discard: whatever still runs is destroyed; returns when all is gone that the kernel lets go.
        """
        rows = self._registry.records.containers()
        if rebooted or discard:
            rows = [self._outdate(row, _REBOOTED if rebooted else _DISCARDED) for row in rows]
        await self._backend.open(
            BackendEvents(
                self._processes.exited,
                self._out_of_memory,
                self._broken,
                Connections(self._registry, self._events).heard,
            ),
            rows,
        )
        destroys: list[asyncio.Future[None]] = []
        for row in rows:
            container = self._restore(row)
            if row.state in _DOOMED:
                reason = _HALF_MADE if row.state is State.CREATING else row.state_reason
                destroys.append(self._containers.resume_destroy(container, reason))
            else:
                container.recovering = True
                task = asyncio.ensure_future(self._adopt(container, row))
                self._adoptions[row.handle] = task
                task.add_done_callback(partial(self._adopted, container))
        removing = len(rows) - len(self._adoptions)
        if self._adoptions:
            _, late = await asyncio.wait(self._adoptions.values(), timeout=_SERVE_AFTER_S)
            if late:
                log.warning("server.serves_before_recovered", containers=len(late))
        if discard and destroys:
            await asyncio.wait(destroys)
        if rows:
            log.info("server.recovered", containers=len(rows), removing=removing, rebooted=rebooted)

    async def wait_for(self, handle: str) -> None:
        """Wait until a container is taken over, or known to be broken; any other name returns at once."""
        adoption = self._adoptions.get(handle)
        if adoption is not None:
            await asyncio.wait([adoption])

    async def wait_for_many(self, handles: Collection[str]) -> None:
        """Wait until these are taken over, all if none is named; not for long: a late agent is one error among many."""
        adoptions = [task for handle, task in self._adoptions.items() if not handles or handle in handles]
        if adoptions:
            await asyncio.wait(adoptions, timeout=_BULK_PATIENCE_S)

    async def close(self) -> None:
        """Stop taking over; what is not taken over yet is the next server's."""
        adoptions = list(self._adoptions.values())
        for task in adoptions:
            task.cancel()
        if adoptions:
            await asyncio.wait(adoptions)

    def _outdate(self, row: ContainerRow, reason: str) -> ContainerRow:
        """Write down that a container is to be removed, whatever it was: a second crash must not forget it."""
        row = replace(row, state=State.DESTROYING, state_reason=reason)
        self._registry.records.save_container(row)
        return row

    def _restore(self, row: ContainerRow) -> Container:
        container = Container(
            load_container_spec(row.spec),
            row.request_id,
            row.created_ns,
            state=row.state,
            state_reason=row.state_reason,
            facts=row.facts,
            notable=list(row.notable),
        )
        self._registry.put_back(container)
        return container

    async def _adopt(self, container: Container, row: ContainerRow) -> None:
        try:
            await self._backend.adopt(row)
            ports = self._backend.facts_of_network(row.handle).mapped_ports
            container.spec = replace(container.spec, port_mappings=ports)
        except ContainerBroken as error:
            self._broken(row.handle, error.reason)
        await self._restore_processes(container)
        try:
            await self._backend.adopted(row.handle)
        except ContainerBroken as error:
            self._broken(row.handle, error.reason)

    def _adopted(self, container: Container, task: asyncio.Task[None]) -> None:
        del self._adoptions[container.handle]
        if task.cancelled():
            return
        container.recovering = False
        if (error := task.exception()) is not None:  # a bug of ours shall cost this container, not the start
            log.error("container.recovery_failed", handle=container.handle, exc_info=error)
            self._broken(container.handle, f"it could not be taken over: {error}")
        self._containers.expiry.arm(container)  # anew; also a broken one goes when its grace time has passed

    async def _restore_processes(self, container: Container) -> None:
        """Bring a container's processes back: of a broken one, their exits and what is kept of their output."""
        # The ended ones first: an OOM kill that was the reason of their end is not that of another's.
        rows = self._registry.records.processes(container.handle)
        for row in sorted(rows, key=lambda row: row.exit is None):
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

    def _out_of_memory(self, handle: str, killed: OutOfMemory) -> None:
        container = self._registry.find(handle)
        if container is not None:
            if not _is_apart(container, killed.process_id):
                self._registry.note(container, "Out of memory")
            self._events.publish(
                EventKind.OUT_OF_MEMORY,
                handle,
                process_id=killed.process_id,
                limit_of=killed.limit_of,
                limit_bytes=str(killed.limit_bytes or ""),
                kills=str(killed.kills),
                victim=killed.victim,
            )

    def _broken(self, handle: str, reason: str) -> None:
        container = self._registry.find(handle)
        if container is not None and container.state in USABLE:
            self._registry.leave(container, State.BROKEN, reason)
            self._events.publish(EventKind.CONTAINER_BROKEN, handle, reason=reason)
            log.error("container.broken", handle=handle, reason=reason)


def _is_apart(container: Container, process_id: str) -> bool:
    """Whether a process is limited beside its container, which then has not run out of memory itself."""
    entry = container.processes.get(process_id)
    sidecar = entry.process.spec.sidecar if entry is not None else None
    return sidecar is not None and sidecar.own_limits
