"""Starts of processes in one container, and what must not happen in the middle of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Starts:
    """Any number of starts at a time, or something that holds them off.

    A process in the making is in its cgroup already while it sets its own limits. Whoever changed them from outside
    just then would be overruled, or would have taken away from it what it needs for that.
    """

    def __init__(self) -> None:
        self._entrance = asyncio.Lock()
        self._under_way = 0
        self._none = asyncio.Event()
        self._none.set()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        """For the length of a start."""
        async with self._entrance:
            self._under_way += 1
            self._none.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none.set()

    @asynccontextmanager
    async def hold_off(self) -> AsyncIterator[None]:
        """Wait for starts under way, each of which has a deadline, and let none begin meanwhile."""
        async with self._entrance:
            await self._none.wait()
            yield
