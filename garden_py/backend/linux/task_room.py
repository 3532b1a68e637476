"""Which starts of processes there is room for under a container's limit of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from garden_py.model.errors import TaskLimitReached


class TaskRoom:
    """Refuses starts for which there is no room; the kernel does not.

    It checks the limit when a task of the group forks, not when one joins (cgroup-v1/pids.rst, "it is possible to have
    pids.current > pids.max"), and the agent forks beside the limit.

    Args:
        handle: of the container.
        read: tasks that the kernel counts now, and the limit; 0: there is none.
    """

    def __init__(self, handle: str, read: Callable[[], tuple[int, int]]) -> None:
        self._handle = handle
        self._read = read
        self._under_way = 0
        self._one_ends = asyncio.Event()

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """For the length of a start.

        Raises:
            TaskLimitReached: nothing was started.
        """
        await self._find_room()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._one_ends.set()
            self._one_ends = asyncio.Event()

    async def _find_room(self) -> None:
        while True:
            tasks, limit = self._read()
            if not limit or tasks + self._under_way < limit:
                return
            if not self._under_way:
                raise TaskLimitReached(self._handle, tasks, limit)
            # Whether the kernel counts those that are being started is not known; each of them has a deadline.
            await self._one_ends.wait()
