"""What is written down of a change of limits while it lasts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from garden_py.backend.linux.interrupted import (
    LimitChange,
    find_interrupted,
    forget_interrupted,
    written_down,
)
from garden_py.model.limits import DiskScope, Limits

IN_FORCE = Limits(
    memory_bytes=100, swap_bytes=0, pids=0, cpu_weight=100, rlimits=(("nofile", 10), ("core", 0))
)


def test_what_was_in_force_is_kept_of_what_is_changed() -> None:
    """What had no limit is to have none again; nothing is said of the rest."""
    wanted = Limits(
        memory_bytes=50, network_rx_bytes_per_s=7, cpu_weight=1, rlimits=(("nofile", 5), ("cpu", 1))
    )
    assert LimitChange.of(wanted, IN_FORCE).former == Limits(
        memory_bytes=100, swap_bytes=0, network_rx_bytes_per_s=0, cpu_weight=100, rlimits=(("nofile", 10),)
    )


@pytest.mark.parametrize(
    ("wanted", "stated", "is_recorded"),
    [
        (Limits(memory_bytes=50), Limits(memory_bytes=50, pids=3), True),
        (Limits(memory_bytes=50), Limits(memory_bytes=100, pids=3), False),
        (Limits(memory_bytes=50), Limits(), False),
        (Limits(disk_bytes=0, disk_scope=DiskScope.TOTAL), Limits(), True),  # one that was taken away
        (Limits(rlimits=(("nofile", 5),)), Limits(rlimits=(("core", 0), ("nofile", 5))), True),
        (Limits(rlimits=(("nofile", 5),)), Limits(), False),
    ],
)
def test_a_change_is_recorded_if_the_journal_states_it(
    wanted: Limits, stated: Limits, is_recorded: bool
) -> None:
    """A server that was killed after that has nothing to take back."""
    assert LimitChange.of(wanted, IN_FORCE).is_recorded(stated) is is_recorded


def test_it_is_found_until_it_has_ended(tmp_path: Path) -> None:
    """However it ends; a note that was cut short is none."""
    change = LimitChange.of(Limits(pids=5, disk_bytes=9, disk_scope=DiskScope.EXCLUSIVE), IN_FORCE, "p")
    with suppress(ZeroDivisionError), written_down(tmp_path, change):
        assert find_interrupted(tmp_path) == change
        raise ZeroDivisionError
    assert find_interrupted(tmp_path) is None
    with written_down(tmp_path, change):
        (note,) = tmp_path.iterdir()
        note.write_bytes(note.read_bytes()[:-3])
        assert find_interrupted(tmp_path) is None
        forget_interrupted(tmp_path)
    with written_down(tmp_path / "gone", change):
        pass
