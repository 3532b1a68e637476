"""Starts of processes at a container's limit of tasks."""

from __future__ import annotations

import asyncio

import pytest
from kit.virtual_clock import in_virtual_time

from garden_py.backend.linux.task_room import TaskRoom
from garden_py.model.errors import TaskLimitReached


class Group:
    """What the kernel counts: a task joins some time after its start has begun."""

    def __init__(self, limit: int) -> None:
        self.tasks, self.limit = 0, limit
        self.room = TaskRoom("box", lambda: (self.tasks, self.limit))

    async def start(self, *, fails: bool = False) -> None:
        async with self.room.take():
            await asyncio.sleep(1)
            self.tasks += not fails
            await asyncio.sleep(1)


@in_virtual_time
async def test_as_many_start_as_there_is_room_for() -> None:
    """Also at once, when the kernel counts none of them yet, or some twice with those under way."""
    group = Group(limit=5)
    done = await asyncio.gather(*(group.start() for _ in range(12)), return_exceptions=True)
    assert group.tasks == 5
    refused = [each for each in done if isinstance(each, TaskLimitReached)]
    assert len(refused) == 7
    assert (refused[0].tasks, refused[0].limit) == (5, 5)


@in_virtual_time
async def test_start_that_fails_leaves_its_room_to_one_that_waits() -> None:
    group = Group(limit=1)
    done = await asyncio.gather(group.start(fails=True), group.start(), return_exceptions=True)
    assert done == [None, None]
    assert group.tasks == 1


@in_virtual_time
async def test_limit_that_is_lowered_or_taken_away_counts_at_once() -> None:
    group = Group(limit=0)
    await asyncio.gather(*(group.start() for _ in range(3)))
    group.limit = 2
    with pytest.raises(TaskLimitReached, match="3 tasks of at most 2"):
        await group.start()
    group.limit = 0
    await group.start()
    assert group.tasks == 4
