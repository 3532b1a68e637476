"""What happens, told to whoever watches: numbered, kept for a while, never waiting for a slow watcher."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from garden_py.model.errors import OffsetOutOfRange
from garden_py.model.process import ExitStatus

KEPT_EVENTS = 10_000
KEPT_CONNECTIONS = 10_000


class EventKind(Enum):
    """What happened. Values are the names in the proto."""

    CONTAINER_CREATED = "CONTAINER_CREATED"
    CONTAINER_STOPPED = "CONTAINER_STOPPED"
    CONTAINER_DESTROYED = "CONTAINER_DESTROYED"
    CONTAINER_BROKEN = "CONTAINER_BROKEN"
    CONTAINER_UNKILLABLE = "CONTAINER_UNKILLABLE"
    PROCESS_STARTED = "PROCESS_STARTED"
    PROCESS_EXITED = "PROCESS_EXITED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    LIMITS_CHANGED = "LIMITS_CHANGED"
    EGRESS_CHANGED = "EGRESS_CHANGED"
    PORT_MAPPED = "PORT_MAPPED"
    PROPERTIES_CHANGED = "PROPERTIES_CHANGED"
    LEAK_FOUND = "LEAK_FOUND"
    CONNECTION_DENIED = "CONNECTION_DENIED"
    CONNECTION_ALLOWED = "CONNECTION_ALLOWED"


# A container can cause any number of these: they push out each other, never what else has happened.
CONNECTIONS = (EventKind.CONNECTION_DENIED, EventKind.CONNECTION_ALLOWED)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        cursor: grows by one with each event.
        at_ns: CLOCK_REALTIME.
    """

    cursor: int
    at_ns: int
    kind: EventKind
    handle: str
    process_id: str = ""
    exit: ExitStatus | None = None
    details: dict[str, str] = field(default_factory=dict)


class EventHub:
    """The latest events, and the watchers that follow them: 10,000, and beside them 10,000 of connections.

    Args:
        first_cursor: of the moment before the first event; above all of an earlier server's.
        write: takes down each event before anybody sees it.
    """

    def __init__(self, first_cursor: int = 0, write: Callable[[Event], None] = lambda event: None) -> None:
        self._kept: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._connections: deque[Event] = deque(maxlen=KEPT_CONNECTIONS)
        self._write = write
        self._oldest = first_cursor
        self._waiters: set[asyncio.Future[None]] = set()
        self.cursor = first_cursor

    def publish(
        self,
        kind: EventKind,
        handle: str,
        *,
        process_id: str = "",
        exit: ExitStatus | None = None,
        **details: str,
    ) -> None:
        """Tell of something that has happened; empty details are left out."""
        self.cursor += 1
        details = {name: text for name, text in details.items() if text}
        event = Event(self.cursor, time.time_ns(), kind, handle, process_id, exit, details)
        self._write(event)
        if kind in CONNECTIONS:
            self._connections.append(event)
        else:
            self._keep(event)
        waiters, self._waiters = self._waiters, set()
        for future in waiters:
            if not future.done():
                future.set_result(None)

    def restore(self, after: int, events: Iterable[Event], connections: Iterable[Event] = ()) -> None:
        """Keep events of an earlier server too: all there were after a cursor. Before anything is published."""
        self._oldest = after
        for event in events:
            self._keep(event)
        self._connections.extend(connections)

    def _keep(self, event: Event) -> None:
        if len(self._kept) == KEPT_EVENTS:
            self._oldest = self._kept[0].cursor
        self._kept.append(event)

    def kept_about(self, handle: str) -> list[Event]:
        """The kept events of a container, the oldest first."""
        return [event for event in self._kept if event.handle == handle]

    def check_cursor(self, after: int) -> None:
        """Refuse a cursor whose following events are not kept any more, or that is of the future.

        Raises:
            OffsetOutOfRange: with the oldest cursor that can be continued from.
        """
        if self._oldest <= after <= self.cursor:
            return
        problem = f"not all events after cursor {after} are kept: those after {self._oldest} are"
        if after > self.cursor:
            problem = f"no event has had the cursor {after} yet: the latest is {self.cursor}"
        raise OffsetOutOfRange(after, self._oldest, self.cursor, problem)

    async def watch(self, after: int) -> AsyncIterator[Event]:
        """Every event after a cursor, and then those to come.

        Raises:
            OffsetOutOfRange: the watcher fell so far behind that events were dropped.
        """
        while True:
            self.check_cursor(after)
            seen = after
            for event in heapq.merge(
                _after(self._kept, after), _after(self._connections, after), key=lambda event: event.cursor
            ):
                yield event
                after = event.cursor
            if after == seen:  # not by the hub's cursor: after a restart that is beyond the last event
                future = asyncio.get_running_loop().create_future()
                self._waiters.add(future)
                try:
                    await future
                finally:
                    self._waiters.discard(future)


def _after(events: deque[Event], cursor: int) -> list[Event]:
    """Those after a cursor, oldest first; looked for from the newest, where a watcher that keeps up finds its place."""
    found: list[Event] = []
    for event in reversed(events):
        if event.cursor <= cursor:
            break
        found.append(event)
    found.reverse()
    return found
