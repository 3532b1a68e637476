"""The containers there are, in memory and in the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from garden_py.model.codec import dump_container_spec
from garden_py.model.errors import ContainerBroken, ContainerBusy, ContainerNotFound
from garden_py.model.lifecycle import USABLE, State, may_follow
from garden_py.model.spec import ContainerSpec
from garden_py.service.ports import ContainerRow, Records, RunningProcess

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
        changing: held by whoever changes its limits, egress, ports or properties.
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
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def handle(self) -> str:
        """Its name."""
        return self.spec.handle

    def note(self, text: str) -> None:
        """Add to its notable events."""
        self.notable.append(text)
        del self.notable[:-NOTABLE_MAX]

    def require_usable(self, wanted: str) -> None:
        """Refuse a call that needs a running container.

        Raises:
            ContainerBroken, ContainerBusy.
        """
        if self.state is State.BROKEN:
            raise ContainerBroken(self.handle, self.state_reason)
        if self.state not in USABLE:
            raise ContainerBusy(self.handle, self.state.value, wanted)


class Registry:
    """All containers by handle. Every change of state goes through here into the journal."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self._containers: dict[str, Container] = {}

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
        """
        container = self._containers.get(handle)
        if container is None or container.state is State.CREATING:
            raise ContainerNotFound(handle)
        return container

    def add(self, container: Container) -> None:
        """Make a container known; if it cannot be written down, it is not."""
        self._containers[container.handle] = container
        try:
            self.save(container)
        except BaseException:
            del self._containers[container.handle]
            raise

    def save(self, container: Container) -> None:
        """Write a container's row.

        Raises:
            ContainerNotFound: it has been removed meanwhile. Its row must not come back: it would name leases, perhaps
                even the handle, of a later container.
        """
        if self._containers.get(container.handle) is not container:
            raise ContainerNotFound(container.handle)
        self.records.save_container(
            ContainerRow(
                handle=container.handle,
                state=container.state,
                state_reason=container.state_reason,
                request_id=container.request_id,
                created_ns=container.created_ns,
                spec=dump_container_spec(container.spec),
                facts=container.facts,
            )
        )

    def move(self, container: Container, state: State, reason: str = "") -> None:
        """Change a container's state; a change that the state table does not know is a bug."""
        assert may_follow(container.state, state), f"{container.handle}: {container.state} -> {state}"
        container.state, container.state_reason = state, reason
        self.save(container)

    def remove(self, container: Container) -> None:
        """Forget a container and its processes."""
        self.records.forget_container(container.handle)
        self._containers.pop(container.handle, None)
