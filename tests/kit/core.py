"""The whole service over a fake backend, as wiring puts it together, and over a journal in memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from garden_py.backend.journal import Journal
from garden_py.config import load_config
from garden_py.service.core import Core
from garden_py.service.events import Event
from garden_py.wiring import build_core
from kit.fake_backend import FakeBackend, FakeHost, open_gate


@dataclass
class Server:
    """A service on a host that outlives it.

    Attributes:
        adopt_gate, destroy_gate: of every backend there will be; see FakeBackend.
    """

    host: FakeHost = field(default_factory=FakeHost)
    journal: Journal = field(default_factory=lambda: Journal(":memory:"))
    adopt_gate: asyncio.Event = field(default_factory=open_gate)
    destroy_gate: asyncio.Event = field(default_factory=open_gate)
    backend: FakeBackend = field(init=False)
    core: Core = field(init=False)

    async def start(self, **settings: Any) -> Core:
        """Start, or start again without having closed: what a SIGKILL looks like to the next server."""
        containers, rebooted = settings.pop("containers", 250), settings.pop("rebooted", False)
        discard = settings.get("destroy_containers_on_startup", False)
        self.backend = FakeBackend(self.host, containers=containers)
        self.backend.adopt_gate, self.backend.destroy_gate = self.adopt_gate, self.destroy_gate
        self.core = build_core(load_config(settings, environ={}), self.backend, self.journal)
        await self.core.recovery.run(rebooted=rebooted, discard=discard)
        return self.core

    def events(self) -> list[tuple[str, str]]:
        """(kind, handle) of everything that has been told."""
        return [(event.kind.value, event.handle) for event in self.kept()]

    def kept(self) -> list[Event]:
        """Every event told so far."""
        return list(self.core.events._kept)
