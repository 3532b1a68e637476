"""The whole service, as the doors see it."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.model.netrule import DefaultAction
from garden_py.observe.metrics import Metrics
from garden_py.service.containers import Containers
from garden_py.service.diagnosis import Diagnosis
from garden_py.service.events import EventHub
from garden_py.service.files import Files
from garden_py.service.guard import Guard
from garden_py.service.images import Images
from garden_py.service.janitor import Janitor
from garden_py.service.ports import Backend
from garden_py.service.processes import Processes
from garden_py.service.recovery import Recovery
from garden_py.service.registry import Registry
from garden_py.service.throttling import Throttling


@dataclass(frozen=True, slots=True)
class Core:
    """The verbs and what they share; put together in wiring.py.

    Attributes:
        default_egress: default action of policies that leave it open.
        version: of this server.
    """

    backend: Backend
    registry: Registry
    guard: Guard
    events: EventHub
    containers: Containers
    processes: Processes
    files: Files
    images: Images
    recovery: Recovery
    janitor: Janitor
    diagnosis: Diagnosis
    throttling: Throttling
    metrics: Metrics
    default_egress: DefaultAction
    version: str

    async def close(self) -> None:
        """Finish jobs under way, then let go of every container without touching it."""
        await self.recovery.close()
        await self.janitor.close()
        await self.throttling.close()
        self.containers.end_fetches()
        self.backend.end_fetches()
        await self.guard.close()
        await self.processes.close()
        await self.backend.close()
