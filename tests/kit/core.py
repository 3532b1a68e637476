"""The whole service over a fake backend, as wiring puts it together, and over a journal in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from garden_py.backend.journal import Journal
from garden_py.config import load_config
from garden_py.service.core import Core
from garden_py.service.events import Event
from garden_py.wiring import build_core
from kit.fake_backend import FakeBackend, FakeHost


@dataclass
class Server:
    """A service on a host that outlives it."""

    host: FakeHost = field(default_factory=FakeHost)
    journal: Journal = field(default_factory=lambda: Journal(":memory:"))
    backend: FakeBackend = field(init=False)
    core: Core = field(init=False)

    async def start(self, **settings: Any) -> Core:
        """Start, or start again without having closed: what a SIGKILL looks like to the next server."""
        containers = settings.pop("containers", 250)
        self.backend = FakeBackend(self.host, containers=containers)
        self.core = build_core(load_config(settings, environ={}), self.backend, self.journal)
        await self.core.recovery.run()
        return self.core

    def events(self) -> list[tuple[str, str]]:
        """(kind, handle) of everything that has been told."""
        return [(event.kind.value, event.handle) for event in self.kept()]

    def kept(self) -> list[Event]:
        """Every event told so far."""
        return list(self.core.events._kept)
