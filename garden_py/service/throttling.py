"""Looking, every few seconds, at which containers have used more CPU time than they are entitled to."""

from __future__ import annotations

import asyncio

import structlog

from garden_py.model.cpu import Standing
from garden_py.model.errors import GardenError
from garden_py.model.lifecycle import USABLE
from garden_py.service.containers import Containers
from garden_py.service.ports import Backend
from garden_py.service.registry import Registry

log = structlog.get_logger()


class Throttling:
    """The look and what follows from it (Garden statements CT1, CT2).

    Args:
        interval_s: between two looks; 0: never look.
    """

    def __init__(
        self, backend: Backend, registry: Registry, containers: Containers, *, interval_s: float
    ) -> None:
        self._backend = backend
        self._registry = registry
        self._containers = containers
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        if self._interval_s:
            self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stop looking; containers stay as they are."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except (GardenError, OSError) as error:  # the next look may do better
                log.error("throttling.failed", error=str(error))

    async def look(self) -> None:
        """Look once."""
        await self._backend.balance_cpu(self._standings(), self._containers.entitlement)

    def _standings(self) -> dict[str, Standing]:
        found: dict[str, Standing] = {}
        for container in self._registry:
            if container.state not in USABLE or container.recovering:
                continue
            try:
                used_ns = self._backend.cpu_usage_ns(container.handle)
            except GardenError as error:  # it has just gone, or is broken
                log.debug("throttling.not_measured", handle=container.handle, error=str(error))
                continue
            found[container.handle] = self._containers.standing(container.handle, used_ns)
        return found
