"""Telling one boot of the machine from the next."""

from __future__ import annotations

import errno
import os
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from garden_py.backend import boot
from garden_py.backend.boot import read_boot_id, remember_boot, was_rebooted
from garden_py.backend.linux.container import ContainerFacts
from garden_py.backend.linux.lease import NetworkLease


def test_another_boot_is_noticed_once(tmp_path: Path) -> None:
    """A new state directory is of this boot; one of another boot is so until that has been dealt with."""
    assert not was_rebooted(tmp_path)
    remember_boot(tmp_path)
    assert not was_rebooted(tmp_path)
    (tmp_path / "boot_id").write_text("of another day\n")
    assert was_rebooted(tmp_path)
    assert was_rebooted(tmp_path)
    remember_boot(tmp_path)
    assert not was_rebooted(tmp_path)


def test_boot_that_is_recorded_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is started again on a full disk serves."""
    remember_boot(tmp_path)
    monkeypatch.setattr(boot, "_replace", fail_for_want_of_room)
    monkeypatch.setattr(boot, "_overwrite", fail_for_want_of_room)
    remember_boot(tmp_path)


def test_another_boot_is_recorded_in_place_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next server would destroy what was made since."""
    remember_boot(tmp_path)
    of_before = read_boot_id()[::-1]
    (tmp_path / "boot_id").write_text(f"{of_before}\n")
    monkeypatch.setattr(boot, "_replace", fail_for_want_of_room)
    remember_boot(tmp_path)
    assert not was_rebooted(tmp_path)
    assert (tmp_path / "boot_id").read_text() == f"{read_boot_id()}\n"


def test_boot_that_cannot_be_recorded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new state directory there is nothing to overwrite."""
    monkeypatch.setattr(boot, "_replace", fail_for_want_of_room)
    with pytest.raises(OSError, match="No space"):
        remember_boot(tmp_path)


def fail_for_want_of_room(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_pid_of_another_boot_names_nobody() -> None:
    """Whoever has that number now, even with the same start time, must not be killed in a container's place."""
    facts = ContainerFacts("id", False, NetworkLease(IPv4Address("10.0.0.2"), ()), 0, pid=1, pid_start=2)
    assert facts.boot == read_boot_id()
    assert ContainerFacts.from_json(facts.to_json()).identity is not None
    assert ContainerFacts.from_json({**facts.to_json(), "boot": "of another day"}).identity is None
