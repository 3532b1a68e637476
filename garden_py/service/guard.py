"""One claim per handle: two creates of one handle, and any number of destroys, never do the same work twice."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from garden_py.model.errors import ShuttingDown

T = TypeVar("T")


class Guard:
    """Jobs by handle. A job belongs to the server, not to its caller: it goes on when the caller leaves."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._closing = False
        self._works = 0

    @property
    def closing(self) -> bool:
        """Whether no new job can be started."""
        return self._closing

    def running(self, kind: str, handle: str) -> asyncio.Task[Any] | None:
        """The job of a kind for a handle, if one is under way."""
        job = self._jobs.get((kind, handle))
        return (
            None if job is None or job.done() else job
        )  # one that is done is forgotten a turn of the loop later

    async def run(self, kind: str, handle: str, work: Coroutine[Any, Any, T]) -> T:
        """Start a job and wait for it; leaving does not stop it."""
        return await asyncio.shield(self.start(kind, handle, work))

    def start(self, kind: str, handle: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a job in the background.

        Raises:
            ShuttingDown: the server takes no new work.
        """
        if self._closing:
            work.close()
            raise ShuttingDown
        assert self.running(kind, handle) is None
        task = asyncio.ensure_future(work)
        self._jobs[kind, handle] = task
        task.add_done_callback(lambda done: self._finished(kind, handle, done))
        return task

    async def complete(self, kind: str, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work that must not be cut off in its middle; there may be any number of it.

        Raises:
            ShuttingDown: as `start`.
        """
        self._works += 1
        return await self.run(kind, f"#{self._works}", work)  # no handle begins with '#'

    def _finished(self, kind: str, handle: str, task: asyncio.Task[Any]) -> None:
        if self._jobs.get((kind, handle)) is task:
            del self._jobs[kind, handle]
        if not task.cancelled():
            task.exception()  # seen, also when every caller has left

    async def close(self) -> None:
        """Take no more jobs and wait for those under way."""
        self._closing = True
        while self._jobs:
            await asyncio.wait(self._jobs.values())
            await asyncio.sleep(0)  # what follows from the end of one, e.g. of a create whose caller has left
