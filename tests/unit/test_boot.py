"""Telling one boot of the machine from the next."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

from garden_py.backend.boot import read_boot_id, remember_boot, was_rebooted
from garden_py.backend.linux.container import ContainerFacts
from garden_py.backend.linux.network import NetworkLease


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


def test_pid_of_another_boot_names_nobody() -> None:
    """Whoever has that number now, even with the same start time, must not be killed in a container's place."""
    facts = ContainerFacts("id", False, NetworkLease(IPv4Address("10.0.0.2"), ()), 0, pid=1, pid_start=2)
    assert facts.boot == read_boot_id()
    assert ContainerFacts.from_json(facts.to_json()).identity is not None
    assert ContainerFacts.from_json({**facts.to_json(), "boot": "of another day"}).identity is None
