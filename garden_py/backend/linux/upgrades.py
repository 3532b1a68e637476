"""Giving running containers the agent of this server, in the background.

The bundle is in the container already: what is mounted there is the directory of all bundles, so the one this server
has built appears beside the one that the running agent was started from (docs/decisions/0007-agent-upgrade.md).
"""

from __future__ import annotations

import asyncio
import time

import structlog

from garden_py.backend.linux.agent_owner import AgentOwner
from garden_py.backend.linux.site import AGENT_TARGET
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle
from garden_py.backend.streams.agent_link import NoUpgrade
from garden_py.model.errors import ContainerBroken

log = structlog.get_logger()
_AT_A_TIME = 2
# A server that has just started has more urgent things to do than two starts of an interpreter for each container.
_DELAY_S = 2.0


class Upgrades:
    """Upgrades under way and to come.

    Args:
        bundle: of this server.
    """

    def __init__(self, bundle: RuntimeBundle) -> None:
        self._bundle = bundle
        self._slots = asyncio.Semaphore(_AT_A_TIME)
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, owner: AgentOwner) -> None:
        """Upgrade the agent of a container or sidecar soon, unless it is ours."""
        if owner.broken_because or owner.link.build == self._bundle.version:
            return
        task = asyncio.ensure_future(self._upgrade(owner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop; an agent that was asked already upgrades itself all the same."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _upgrade(self, owner: AgentOwner) -> None:
        await asyncio.sleep(_DELAY_S)
        async with self._slots:
            if owner.broken_because:
                return
            link, started = owner.link, time.monotonic()
            before = link.build
            try:
                await link.upgrade(self._bundle.version, self._bundle.argv(AGENT_TARGET), self._bundle.env)
            except NoUpgrade as error:
                owner.agent_problem = str(error)
                log.warning("agent.not_upgraded", handle=owner.handle, build=before, reason=str(error))
            except ContainerBroken:  # which has been told where it was found out
                return
            else:
                took_ms = round((time.monotonic() - started) * 1000, 1)
                log.info(
                    "agent.upgraded",
                    handle=owner.handle,
                    before=before,
                    build=link.build,
                    took_ms=took_ms,
                )
