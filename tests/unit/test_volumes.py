"""A file system that makes its callers wait keeps nobody but those who asked for it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from garden_py.backend.disk.driver import DiskLimits, DiskUse
from garden_py.backend.disk.volumes import Volumes


class SlowDriver:
    """Makes a directory, or limits it, when it is let."""

    name = "slow"
    counts_inodes = True

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def make(self, volume: Path) -> None:
        assert self.may_go_on.wait(10)
        volume.mkdir()

    def limit(self, volume: Path, limits: DiskLimits) -> None:
        assert self.may_go_on.wait(10)

    def limits(self, volume: Path) -> DiskLimits:
        return DiskLimits()

    def use(self, volume: Path) -> DiskUse:
        return DiskUse(0)

    def remove(self, volume: Path) -> bool:
        return False


@pytest.fixture
def driver() -> SlowDriver:
    return SlowDriver()


@pytest.fixture
def volumes(tmp_path: Path, driver: SlowDriver) -> Volumes:
    return Volumes(tmp_path, driver, lambda path: shutil.rmtree(path, ignore_errors=True))


async def test_a_volume_that_takes_time_does_not_hold_the_event_loop(
    volumes: Volumes, driver: SlowDriver
) -> None:
    making = asyncio.ensure_future(volumes.make("a", DiskLimits()))
    await asyncio.sleep(0.05)
    assert not making.done()
    driver.may_go_on.set()
    assert await making == volumes.place / "a"
    driver.may_go_on.clear()
    limiting = asyncio.ensure_future(volumes.limit("a", DiskLimits(bytes=1 << 20)))
    await asyncio.sleep(0.05)
    assert not limiting.done()
    driver.may_go_on.set()
    await limiting


async def test_whoever_cancels_a_make_finds_what_it_made(volumes: Volumes, driver: SlowDriver) -> None:
    """Else the thread would make it after somebody had removed what was there, and it would stay."""
    making = asyncio.ensure_future(volumes.make("a", DiskLimits()))
    await asyncio.sleep(0.05)
    making.cancel()
    await asyncio.sleep(0.05)
    assert not making.done(), "the thread is still at it"
    driver.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert volumes.ids() == ["a"]
    await volumes.remove("a")
    assert volumes.ids() == []


async def test_what_a_failed_start_has_left_is_made_anew(volumes: Volumes, driver: SlowDriver) -> None:
    driver.may_go_on.set()
    (volumes.place / "a").mkdir(parents=True)
    (volumes.place / "a" / "rest").touch()
    await volumes.make("a", DiskLimits())
    assert list((volumes.place / "a").iterdir()) == []
