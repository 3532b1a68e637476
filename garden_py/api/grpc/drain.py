"""The calls under way, so that a server that stops ends each of them with a typed status instead of a broken stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from garden_py.model.errors import ShuttingDown

# They last as long as a process or a watcher does; a stop does not wait for them.
_LASTING = frozenset({"RunProcess", "AttachProcess", "ReadOutput", "WaitProcess", "WatchEvents"})


class Drain:
    """Knows the task of every call, and ends them when asked."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any], str] = {}
        self._ended: set[asyncio.Task[Any]] = set()
        self._refusing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """The length of one call.

        Args:
            method: full name, `/garden.v1.Garden/Ping`.

        Raises:
            ShuttingDown: the call was ended, or came too late.
        """
        if self._refusing:
            raise ShuttingDown
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = method.rpartition("/")[2]
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            raise ShuttingDown from None
        finally:
            del self._calls[task]
            self._ended.discard(task)
            if not self._calls:
                self._idle.set()

    def refuse(self) -> None:
        """Take no more calls."""
        self._refusing = True

    async def wait_until_idle(self, *, and_then_s: float) -> None:
        """Wait until no call is under way, and then some seconds more for refusing what callers ask next."""
        await self._idle.wait()
        await asyncio.sleep(and_then_s)

    def end_lasting(self) -> None:
        """End the calls that do not end by themselves: clients resume them by offset at the next server."""
        self._end([task for task, method in self._calls.items() if method in _LASTING])

    def end_all(self) -> None:
        """End every call."""
        self._end(list(self._calls))

    def _end(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            if task not in self._ended:
                self._ended.add(task)
                task.cancel()
