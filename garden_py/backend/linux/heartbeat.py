"""Finding agents that have stopped answering while nobody asks them anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from itertools import islice

from garden_py.backend.linux.container import LinuxContainer
from garden_py.model.errors import ContainerBroken

_TICKS = 60


class Heartbeat:
    """Asks every agent that has said nothing for a period whether it is there.

    Each tick is a sixtieth of the period and asks a thirtieth of the agents at most, those silent for longest: a
    thousand containers that fell silent in the same moment do not make a thousand questions in one.

    Args:
        containers: by handle; looked at anew each time.
        period_s: an agent that answered is left alone for so long.
    """

    def __init__(self, containers: Mapping[str, LinuxContainer], *, period_s: float) -> None:
        self._containers = containers
        self._period_s = period_s
        self._questions: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, or go on."""
        self._timer = asyncio.get_running_loop().call_later(self._period_s / _TICKS, self._tick)

    def stop(self) -> None:
        """End, with the questions under way."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._questions.values():
            task.cancel()

    def _tick(self) -> None:
        self.start()
        due = asyncio.get_running_loop().time() - self._period_s
        silent = [
            container
            for container in self._containers.values()
            if container.silent_since < due and container.handle not in self._questions
        ]
        silent.sort(key=lambda container: container.silent_since)
        for container in islice(silent, 1 + 2 * len(self._containers) // _TICKS):
            task = asyncio.ensure_future(_ask(container))
            self._questions[container.handle] = task
            task.add_done_callback(partial(self._answered, container.handle))

    def _answered(self, handle: str, task: asyncio.Task[None]) -> None:
        del self._questions[handle]


async def _ask(container: LinuxContainer) -> None:
    try:
        await container.link.ping()
    except ContainerBroken:  # which has been told where it was found out
        return
