"""Finding agents that have stopped answering while nobody asks them anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice

from garden_py.backend.linux.agent_owner import AgentOwner
from garden_py.model.errors import ContainerBroken

_TICKS = 60


class Heartbeat:
    """Asks every agent that has said nothing for a period whether it is there.

    Each tick is a sixtieth of the period and asks a thirtieth of the agents at most, those silent for longest: a
    thousand containers that fell silent in the same moment do not make a thousand questions in one.

    Args:
        agents: gives the agents there are.
        period_s: an agent that answered is left alone for so long.
    """

    def __init__(self, agents: Callable[[], Iterable[AgentOwner]], *, period_s: float) -> None:
        self._agents = agents
        self._period_s = period_s
        self._questions: dict[AgentOwner, asyncio.Task[None]] = {}
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
        agents = list(self._agents())
        silent = [each for each in agents if each.silent_since < due and each not in self._questions]
        silent.sort(key=lambda each: each.silent_since)
        for agent in islice(silent, 1 + 2 * len(agents) // _TICKS):
            task = asyncio.ensure_future(_ask(agent))
            self._questions[agent] = task
            task.add_done_callback(partial(self._answered, agent))

    def _answered(self, agent: AgentOwner, task: asyncio.Task[None]) -> None:
        del self._questions[agent]


async def _ask(agent: AgentOwner) -> None:
    try:
        await agent.link.ping()
    except ContainerBroken:  # which has been told where it was found out
        return
