"""What is thawed of a container that somebody has frozen; its groups are directories of ordinary files."""

from __future__ import annotations

from pathlib import Path

import pytest

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import ContainerCgroup, Hierarchies


@pytest.mark.parametrize(
    ("asked", "change", "thawed"),
    [("freezer.self_freezing", "freezer.state", "THAWED"), ("cgroup.freeze", "cgroup.freeze", "0")],
)
def test_groups_that_are_frozen_are_thawed(tmp_path: Path, asked: str, change: str, thawed: str) -> None:
    """The container's and those below it, and no group above it."""
    for below, frozen in (
        ("garden-1", True),
        ("garden-1/c", True),
        ("garden-1/c/a", False),
        ("garden-1/c/b", True),
    ):
        directory = tmp_path / below
        directory.mkdir()
        (directory / change).write_text("untouched")
        (directory / asked).write_text(f"{int(frozen)}\n")
    groups.thaw(ContainerCgroup(Hierarchies(1, {"memory": tmp_path}), "garden-1/c"))
    changed = [path.parent.name for path in tmp_path.rglob(change) if path.read_text() == thawed]
    assert sorted(changed) == ["b", "c"]


def test_container_without_groups_is_nothing_to_thaw(tmp_path: Path) -> None:
    groups.thaw(ContainerCgroup(Hierarchies(1, {"memory": tmp_path}), "garden-1/c"))
