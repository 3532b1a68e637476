"""Whoever has an agent: a container its PID 1, a sidecar its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from garden_py.backend.streams.agent_link import AgentLink
from garden_py.backend.streams.agent_replies import AgentExit
from garden_py.backend.streams.agent_talk import AgentTalk
from garden_py.model.errors import ContainerBroken


class AgentOwner:
    """The connection to one agent, and what is known of it.

    Attributes:
        handle: of the container.
        held: processes that the agent had when it was greeted, with the exits of those that had ended.
        broken_because: why the agent is of no use any more; empty while it is.
        agent_problem: why the agent could not be upgraded; empty if it is not to be.
        talk: the latest exchanges with the agent; stays when the connection goes.
    """

    def __init__(self, handle: str) -> None:
        self.handle = handle
        self.held: dict[str, AgentExit | None] = {}
        self.broken_because = ""
        self.agent_problem = ""
        self.talk = AgentTalk()
        self._link: AgentLink | None = None

    def _connect(
        self,
        socket_path: Path,
        *,
        patience_s: float,
        on_exit: Callable[[AgentExit], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Connect to the agent's socket; arguments as AgentLink's. The answer to `greet` tells whether it lives."""
        self._link = AgentLink.connect(
            self.handle, socket_path, patience_s=patience_s, on_exit=on_exit, on_lost=on_lost, talk=self.talk
        )

    async def greet(self, *, timeout_s: float) -> None:
        """Wait until the agent answers; `held` are the processes it has then."""
        self.held = (await self.link.hello(server="garden-py", timeout_s=timeout_s)).processes

    @property
    def link(self) -> AgentLink:
        """The connection to the agent.

        Raises:
            ContainerBroken: there is none any more.
        """
        if self._link is None or self.broken_because:
            raise ContainerBroken(self.handle, self.broken_because or "its agent is not connected")
        return self._link

    @property
    def silent_since(self) -> float:
        """When the agent has last said something, in the event loop's time; infinite when it is not to be asked."""
        if self._link is None or self.broken_because:
            return math.inf
        return self._link.heard_at

    def describe_agent(self) -> dict[str, Any]:
        """What is known of the agent, and its latest exchanges, as JSON values."""
        link = self._link
        return {
            "connected": link is not None and link.is_open,
            "silent_for_s": None
            if link is None
            else round(asyncio.get_running_loop().time() - link.heard_at, 3),
            "build": "" if link is None else link.build,
            "wire": None if link is None else link.wire,
            "upgrade_problem": self.agent_problem,
            "broken_because": self.broken_because,
            "exchanges": self.talk.lines(),
        }

    def disconnect(self) -> None:
        """Close the connection; the agent does not notice."""
        if self._link is not None:
            self._link.close()
