"""One directory per container below the state directory; mkdir(2) is the claim.

<state>/containers/<handle>/   config.json, runtime log, agent log, etc/, upper/, work/, streams/<process>/
<state>/trash/                 directories of destroyed containers, deleted in the background
<run>/agents/<hash>.sock       the agents' sockets; short names, since sun_path holds 108 bytes (unix(7))
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import uuid
from pathlib import Path


class Depot:
    """The directories of one server. All are 0700: what is in them belongs to containers, not to host users."""

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self._containers = state_dir / "containers"
        self._trash = state_dir / "trash"
        self._agents = run_dir / "agents"
        self._sweeping: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Make the directories, and start deleting what an earlier server had no time for."""
        for directory in (self._containers, self._trash, self._agents):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()

    def directory(self, handle: str) -> Path:
        """A container's directory, whether it exists or not."""
        return self._containers / handle

    def streams(self, handle: str, process_id: str) -> Path:
        """Where a process's output is kept."""
        return self._containers / handle / "streams" / process_id

    def socket(self, handle: str) -> Path:
        """The socket of a container's agent."""
        return self._agents / f"{hashlib.sha256(handle.encode()).hexdigest()[:24]}.sock"

    def claim(self, handle: str) -> Path:
        """Make a container's directory. One that a crash left without a journal entry is thrown away first."""
        directory = self.directory(handle)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            self.discard(handle)
            directory.mkdir(mode=0o700)
        return directory

    def discard(self, handle: str) -> None:
        """Take a container's directory and socket away at once; its contents are deleted in the background."""
        self.socket(handle).unlink(missing_ok=True)
        try:
            os.rename(self.directory(handle), self._trash / uuid.uuid4().hex)
        except FileNotFoundError:
            return
        self._sweep()

    def handles(self) -> list[str]:
        """Every container directory there is."""
        return sorted(os.listdir(self._containers))

    def _sweep(self) -> None:
        if not self._sweeping:
            task = asyncio.ensure_future(asyncio.to_thread(self._empty_trash))
            self._sweeping.add(task)
            task.add_done_callback(self._swept)

    def _swept(self, task: asyncio.Task[None]) -> None:
        self._sweeping.discard(task)
        if not task.cancelled() and task.exception() is None and os.listdir(self._trash):
            self._sweep()

    def _empty_trash(self) -> None:
        for name in os.listdir(self._trash):
            shutil.rmtree(self._trash / name)

    async def close(self) -> None:
        """Wait for deletions under way."""
        while self._sweeping:
            await asyncio.gather(*self._sweeping)
