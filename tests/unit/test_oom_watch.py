"""What is told of the kernel's signals that a group runs out of memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.virtual_clock import in_virtual_time

from garden_py.backend.cgroup.events import OomWatch


class Group:
    """A group of cgroup v1 made of ordinary files, with two kills from before it is watched."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "memory.oom_control"
        self.kill(2)
        self.told: list[int] = []
        self.watch = OomWatch(directory, 1, self.told.append)

    def kill(self, count: int) -> None:
        """Have killed so many tasks in all."""
        self.file.write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {count}\n")

    def signal(self) -> None:
        """What the kernel does for each charge that fails."""
        os.eventfd_write(self.watch.fileno(), 1)
        self.watch.acknowledge()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path)
    yield group
    group.watch.close()
    group.watch.close()


@in_virtual_time
async def test_kills_are_told_and_not_signals(group: Group) -> None:
    """Of cgroup v1 there are hundreds for one kill."""
    for _ in range(200):
        group.signal()
    assert group.told == []
    group.kill(3)
    for _ in range(200):
        group.signal()
    assert group.told == [1]
    group.kill(6)
    group.signal()
    await asyncio.sleep(10)
    assert group.told == [1, 3]


@in_virtual_time
async def test_kill_behind_its_signal_is_told(group: Group) -> None:
    """The kernel signals before it has chosen whom to kill, and need not signal again."""
    group.signal()
    await asyncio.sleep(1)
    group.kill(3)
    await asyncio.sleep(3)
    assert group.told == [1]


@in_virtual_time
async def test_kill_is_told_to_whoever_asks_before_a_signal_is_heard(group: Group) -> None:
    """The victim's end may be heard of first."""
    group.kill(3)
    group.watch.acknowledge()
    assert group.told == [1]
