"""What everybody in a chaos run knows: which containers there are, what was done to whom and when, what went wrong."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from garden_py.client import ContainerSpec, ExitStatus

# How long after an attack its effects may still be met: a launcher is replaced at the next job, a disk is full until
# the journal has written again.
LINGER_S = 3.0


class Failure(Exception):
    """A promise was broken; the message says which."""


class Hurt(Exception):
    """The container was deliberately broken: all that is left to check is that it can be destroyed."""


class InputLost(Exception):
    """The server was restarted and does not know how much input it had fed: OFFSET_UNKNOWN, as it promises."""


@dataclass(eq=False, slots=True)
class Subject:
    """One container as its client knows it.

    Attributes:
        pid: its PID 1, 0 until the create was answered.
        hurt: attacks that broke it on purpose.
        ran: ids of the processes that must have run exactly once.
        exits: how those ended whose end was told.
        doing: what its client waits for right now.
    """

    spec: ContainerSpec
    pid: int = 0
    hurt: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    exits: dict[str, ExitStatus] = field(default_factory=dict)
    doing: str = "create"
    ending: bool = False

    @property
    def handle(self) -> str:
        """Its name."""
        return self.spec.handle


@dataclass(slots=True)
class Window:
    """The time of one attack; open until it is over."""

    kind: str
    begin: float
    end: float = math.inf


class Board:
    """Shared by clients, attackers and the report; everything happens in one event loop.

    Args:
        image: a root file system for sidecars.
        images: references that containers may be made of.
        notes: a directory in which processes write their names, into a file of their container's name.
    """

    def __init__(self, image: Path, images: list[str], notes: Path) -> None:
        self.image = image
        self.images = images
        self.notes = notes
        self.subjects: dict[str, Subject] = {}
        self.windows: list[Window] = []
        self.failures: list[str] = []
        self.attacks: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.server_pid = 0
        self.lives = 0
        self.lives_hurt = 0
        self.processes = 0
        self.bytes_checked = 0
        self.restarts_s: list[float] = []
        self.stopping = asyncio.Event()
        self.started = time.monotonic()

    def dump(self) -> None:
        """Have the server write what it waits for into its log."""
        if self.server_pid:
            with suppress(ProcessLookupError):
                os.kill(self.server_pid, signal.SIGUSR1)

    def fail(self, who: str, what: str) -> None:
        """Take down a broken promise."""
        line = f"[{time.monotonic() - self.started:.1f} s] {who}: {what}"
        self.failures.append(line)
        print(f"FAILED {line}", flush=True)

    @contextmanager
    def attack(self, kind: str) -> Iterator[None]:
        """The time in which errors of this attack are expected."""
        window = Window(kind, time.monotonic())
        self.windows.append(window)
        self.attacks[kind] += 1
        try:
            yield
        finally:
            window.end = time.monotonic()

    def overlapped(self, kinds: frozenset[str], since: float) -> bool:
        """Whether an attack of these kinds may have been felt since then."""
        return any(w.kind in kinds and w.end + LINGER_S >= since for w in self.windows[-200:])

    def victims(self) -> list[Subject]:
        """Containers that can be broken: answered, not on their way out, not broken before."""
        return [s for s in self.subjects.values() if s.pid and not s.hurt and not s.ending]
