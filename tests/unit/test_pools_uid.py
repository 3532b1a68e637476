"""Uid ranges and directories: what one container has, no other gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from garden_py.backend.depot import Depot
from garden_py.backend.linux.site import UidPool
from garden_py.model.errors import PoolExhausted


def test_uid_ranges_do_not_overlap() -> None:
    """Two containers' root users are different users of the host."""
    pool = UidPool(0x7000_0000, 3)
    slots = [pool.allocate() for _ in range(3)]
    assert [pool.base(slot) for slot in slots] == [0x7000_0000, 0x7001_0000, 0x7002_0000]
    with pytest.raises(PoolExhausted) as refused:
        pool.allocate()
    assert (refused.value.pool, refused.value.flag) == ("uid ranges", "--uid-pool-size")


def test_lowest_free_range_goes_first() -> None:
    """Released ranges are used again; releasing twice, or no range, is fine."""
    pool = UidPool(65_536, 4)
    slots = [pool.allocate() for _ in range(4)]
    for slot in (slots[2], slots[1], slots[1], -1):
        pool.release(slot)
    assert [pool.allocate(), pool.allocate()] == [slots[1], slots[2]]


def test_range_of_the_journal_is_not_given_away() -> None:
    """A container from before the restart keeps its ids."""
    pool = UidPool(65_536, 3)
    pool.reserve(0)
    pool.reserve(-1)
    assert [pool.allocate(), pool.allocate()] == [1, 2]


async def test_directory_is_claimed_once_and_goes_in_the_background(tmp_path: Path) -> None:
    """A discarded directory's name is free at once; its contents are deleted before close returns."""
    depot = Depot(tmp_path / "state", tmp_path / "run")
    depot.open()
    directory = depot.claim("box")
    assert directory.stat().st_mode & 0o777 == 0o700
    (directory / "upper").mkdir()
    (directory / "upper" / "file").write_text("x")
    depot.discard("box")
    assert not directory.exists()
    assert depot.claim("box") == directory
    assert list(directory.iterdir()) == []
    depot.discard("box")
    depot.discard("box")
    await depot.settle()
    assert list((tmp_path / "state" / "trash").iterdir()) == []


async def test_leftovers_of_a_crash_are_deleted_at_the_next_start(tmp_path: Path) -> None:
    """What an earlier server had no time to delete goes now; a claimed directory without a record is replaced."""
    first = Depot(tmp_path / "state", tmp_path / "run")
    first.open()
    (first.claim("box") / "config.json").touch()
    (tmp_path / "state" / "trash" / ("0" * 32)).mkdir()
    await first.settle()
    second = Depot(tmp_path / "state", tmp_path / "run")
    second.open()
    assert second.handles() == ["box"]
    assert list(second.claim("box").iterdir()) == []
    await second.settle()
    assert list((tmp_path / "state" / "trash").iterdir()) == []


def test_socket_names_fit_whatever_the_handle(tmp_path: Path) -> None:
    """sun_path holds 108 bytes; the run directory may have 70 of them."""
    depot = Depot(tmp_path, Path("/" + "r" * 69))
    names = {str(depot.socket(handle)) for handle in ("a", "x" * 128)}
    assert len(names) == 2
    assert max(map(len, names)) < 108
