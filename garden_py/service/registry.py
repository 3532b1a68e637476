"""The containers there are, in memory and in the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from garden_py.model.codec import dump_container_spec, dump_exit, dump_process_spec
from garden_py.model.errors import (
    ContainerBroken,
    ContainerBusy,
    ContainerNotFound,
    ContainerRecovering,
    HostFault,
)
from garden_py.model.lifecycle import USABLE, State, may_follow
from garden_py.model.netrule import EgressPolicy
from garden_py.model.spec import ContainerSpec
from garden_py.service.ports import Claim, ContainerRow, ProcessRow, Records, RunningProcess

log = structlog.get_logger()
NOTABLE_MAX = 1000


@dataclass(slots=True)
class ProcessEntry:
    """A process and the request that started it."""

    process: RunningProcess
    request_id: str


@dataclass(slots=True, eq=False)
class Container:
    """One container as the service sees it.

    Attributes:
        spec: as in force now: limits, properties, ports and egress follow their changes.
        facts: the backend's, for the journal.
        notable: things of its life for people, e.g. "Out of memory", the latest thousand.
        uses: calls and streams that name it right now; while there are any it does not expire.
        gone: nothing of it is left on the host; only its row is still to be removed.
        egress_etag: of the policy in force; empty until somebody asks for it.
        egress_unsettled: policies that may have decided, besides the one in force, on what is heard of connections now.
        changing: held by whoever changes its limits, egress, ports or properties.
        recovering: from an earlier server, and not taken over yet.
        fetching: how the fetch of its image gets on, while that is all that has been done of it.
        unwanted: it was destroyed while its image was being fetched.
    """

    spec: ContainerSpec
    request_id: str
    created_ns: int
    state: State = State.CREATING
    state_reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    processes: dict[str, ProcessEntry] = field(default_factory=dict)
    starting: dict[str, asyncio.Future[ProcessEntry]] = field(default_factory=dict)
    notable: list[str] = field(default_factory=list)
    uses: int = 0
    expiry: asyncio.TimerHandle | None = None
    destroy_retry: asyncio.TimerHandle | None = None
    destroy_tries: int = 0
    gone: bool = False
    egress_etag: str = ""
    egress_unsettled: list[EgressPolicy] = field(default_factory=list)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    recovering: bool = False
    fetching: str = ""
    unwanted: bool = False

    @property
    def handle(self) -> str:
        """Its name."""
        return self.spec.handle

    def require_usable(self, wanted: str) -> None:
        """Refuse a call that needs a running container.

        Raises:
            ContainerBroken, ContainerBusy.
        """
        if self.state is State.BROKEN:
            raise ContainerBroken(self.handle, self.state_reason)
        if self.state not in USABLE:
            raise ContainerBusy(self.handle, self.state.value, wanted)


class RegistryWitness:
    """Sees every row that is written or removed while somebody looks at the host; see service.ports.Witness."""

    def __init__(self, containers: list[Container]) -> None:
        self._still = {c.handle: c for c in containers if _is_settled(c)}
        self._claims = [claim_of(container) for container in containers]

    def notice(self, claim: Claim) -> None:
        """A container's row changes, or goes."""
        self._still.pop(claim.handle, None)
        self._claims.append(claim)

    def claims(self) -> list[Claim]:
        """See service.ports."""
        return self._claims

    def settled(self) -> list[Claim]:
        """See service.ports. A change that is under way has recorded what is not there yet."""
        return [claim_of(container) for container in self._still.values() if _is_settled(container)]


def _is_settled(container: Container) -> bool:
    return container.state in USABLE and not container.recovering and not container.changing.locked()


def claim_of(container: Container) -> Claim:
    """What a container claims now."""
    return Claim(container.handle, container.facts)


class Registry:
    """All containers by handle. Every change of state goes through here into the journal."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self._containers: dict[str, Container] = {}
        self._witnesses: list[RegistryWitness] = []

    def __len__(self) -> int:
        return len(self._containers)

    def __iter__(self) -> Iterator[Container]:
        return iter([self._containers[handle] for handle in sorted(self._containers)])

    def find(self, handle: str) -> Container | None:
        """A container in any state."""
        return self._containers.get(handle)

    def get(self, handle: str) -> Container:
        """A container that callers may see.

        Raises:
            ContainerNotFound: there is none, or it is still being made.
            ContainerRecovering: wait for it first, see recovery.py.
        """
        container = self._containers.get(handle)
        if container is None or container.state is State.CREATING:
            raise ContainerNotFound(handle)
        if container.recovering:
            raise ContainerRecovering(handle)
        return container

    def add(self, container: Container) -> None:
        """Make a container known; if it cannot be written down, it is not."""
        self._containers[container.handle] = container
        try:
            self.save(container)
        except BaseException:
            del self._containers[container.handle]
            raise

    def put_back(self, container: Container) -> None:
        """Make a container known whose row is there already."""
        self._containers[container.handle] = container

    def save(self, container: Container, **changes: Any) -> None:
        """Write a container's row, with `changes` to its fields; they are made only once they are written.

        So what callers are told is what the next server knows, also when the disk is full.

        Args:
            container: whose row.
            changes: new values of its spec, state, state_reason or facts.

        Raises:
            ContainerNotFound: it has been removed meanwhile. Its row must not come back: it would name leases, perhaps
                even the handle, of a later container.
            HostFault: it cannot be written; nothing has changed.
        """
        if self._containers.get(container.handle) is not container:
            raise ContainerNotFound(container.handle)
        self._notice(Claim(container.handle, changes.get("facts", container.facts)))
        self.records.save_container(
            ContainerRow(
                handle=container.handle,
                state=changes.get("state", container.state),
                state_reason=changes.get("state_reason", container.state_reason),
                request_id=container.request_id,
                created_ns=container.created_ns,
                spec=dump_container_spec(changes.get("spec", container.spec)),
                facts=changes.get("facts", container.facts),
                notable=tuple(container.notable),
            )
        )
        for name, value in changes.items():
            setattr(container, name, value)

    def note(self, container: Container, text: str) -> None:
        """Add to a container's notable events; one that cannot be written down is known to this server alone."""
        container.notable.append(text)
        del container.notable[:-NOTABLE_MAX]
        try:
            self.save(container)
        except HostFault as error:
            log.warning("event.not_recorded", handle=container.handle, text=text, error=str(error))

    def save_process(self, container: Container, process_id: str) -> None:
        """Write a process's row anew, with its spec as it is now.

        Raises:
            HostFault: it cannot be written; nothing has changed.
        """
        entry = container.processes.get(process_id)
        if entry is None or self._containers.get(container.handle) is not container:
            return  # it is gone, and its row with it
        process = entry.process
        self.records.save_process(
            ProcessRow(
                handle=container.handle,
                id=process_id,
                request_id=entry.request_id,
                started_ns=process.started_ns,
                pid=process.pid if process.exit is not None else 0,  # comes with the exit; the agent tells it
                spec=dump_process_spec(process.spec),
                exit=None if process.exit is None else dump_exit(process.exit),
            )
        )

    def move(self, container: Container, state: State, reason: str = "") -> None:
        """Change a container's state; a change that the state table does not know is a bug.

        Raises:
            ContainerNotFound, HostFault: as `save`; it is in its former state.
        """
        _check_move(container, state)
        self.save(container, state=state, state_reason=reason)

    def leave(self, container: Container, state: State, reason: str = "") -> None:
        """Change a container's state, written down or not: what has happened has, and a full disk stops no destroy."""
        _check_move(container, state)
        try:
            self.save(container, state=state, state_reason=reason)
        except HostFault as error:
            container.state, container.state_reason = state, reason
            log.error("container.state_not_recorded", handle=container.handle, error=str(error))

    def remove(self, container: Container) -> None:
        """Forget a container and its processes."""
        self._notice(claim_of(container))
        self.records.forget_container(container.handle)
        self._containers.pop(container.handle, None)

    # --- for who compares it with the host

    def _notice(self, claim: Claim) -> None:
        for witness in self._witnesses:
            witness.notice(claim)

    @contextmanager
    def witness(self) -> Iterator[RegistryWitness]:
        """See every claim there is or comes while the context is open."""
        witness = RegistryWitness(list(self))
        self._witnesses.append(witness)
        try:
            yield witness
        finally:
            self._witnesses.remove(witness)

    def claims(self) -> list[Claim]:
        """What all containers claim at this moment."""
        return [claim_of(container) for container in self]


def _check_move(container: Container, state: State) -> None:
    assert may_follow(container.state, state), f"{container.handle}: {container.state} -> {state}"
