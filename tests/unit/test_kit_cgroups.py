"""The tests' own look at cgroups does not fail on what is removed while it looks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit.cgroups import groups_in, matching, pids_in


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group with two below it; one, which is listed, goes before it is looked into."""
    for name in ("stays", "goes"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "stays/inner/cgroup.procs").write_text("12\n13\n")
    scandir: Callable[[Any], Any] = os.scandir

    def vanishing(path: Any) -> Any:
        if str(path).endswith("/goes"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    return tmp_path


def test_groups_are_found_inner_ones_first(top: Path) -> None:
    """As rmdir wants them."""
    found = groups_in(top)
    assert found[-1] == top
    assert found.index(top / "stays/inner") < found.index(top / "stays")


def test_patterns_match_what_is_there(top: Path) -> None:
    """What has gone is not there; that is all."""
    assert matching(top, "*/i*") == [top / "stays/inner"]
    assert matching(top, "**/cgroup.procs") == [top / "stays/inner/cgroup.procs"]
    assert matching(top / "never", "*") == []


def test_processes_are_those_of_groups_that_are_there(top: Path) -> None:
    """Groups without a file of processes have none."""
    assert pids_in(top) == [12, 13]
    assert pids_in(top / "never") == []
