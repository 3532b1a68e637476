"""Containers that somebody on the host has frozen by hand: stop and destroy thaw them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.garden import wait_until

from garden_py.client import Container, ContainerState, GardenClient

pytestmark = [pytest.mark.root, pytest.mark.cgroup2]


def freeze(container: Container) -> None:
    """As an operator does, by the container's own group."""
    for directory in cgroups_of(container.handle):
        if (directory / "freezer.state").exists():
            _write(directory / "freezer.state", "FROZEN", directory / "freezer.state", "FROZEN")
        elif (directory / "cgroup.freeze").exists() and (directory / "work").exists():
            _write(directory / "cgroup.freeze", "1", directory / "cgroup.events", "frozen 1")


def _write(file: Path, text: str, told: Path, frozen: str) -> None:
    file.write_text(text)
    wait_until(lambda: frozen in told.read_text(), "the freeze")


def test_frozen_container_is_destroyed(garden: GardenClient) -> None:
    """At once: what is frozen with cgroup v1 does not end by SIGKILL alone."""
    box = garden.create()
    box.start(["sleep", "1000"])
    freeze(box)
    began = time.monotonic()
    box.destroy()
    assert time.monotonic() - began < 5
    assert cgroups_of(box.handle) == []


@pytest.mark.parametrize("kill", [False, True])
def test_frozen_container_is_stopped_and_goes_on(garden: GardenClient, kill: bool) -> None:
    """Its agent too was frozen, which passes signals on."""
    with garden.create() as box:
        process = box.start(["sleep", "1000"])
        freeze(box)
        box.stop(kill=kill)
        assert box.wait(process.id).signal == (9 if kill else 15)
        assert box.info().state is ContainerState.STOPPED
        assert box.run(["echo", "alive"]).output().stdout == b"alive\n"
