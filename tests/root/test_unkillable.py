"""What the kernel does not let go, on a real container: cgroup v1's freezer, in which SIGKILL waits for the thaw."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import events_of, wait_until
from kit.server import ServerProcess, running_server

from garden_py.client import ContainerState, GardenClient
from garden_py.client.errors import Unavailable

FREEZER = Path("/sys/fs/cgroup/freezer")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not FREEZER.exists(), reason="cgroup v2 kills what is frozen; nothing else is stuck at will"
    ),
]
METRICS = "127.0.0.1:29117"


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    with running_server("--destroy-timeout-s", "1", "--metrics", METRICS) as server:
        yield server


def freezer_of(handle: str) -> Path:
    (directory,) = FREEZER.glob(f"garden-*/{handle}")
    return directory / "freezer.state"


def count_of(state: str) -> float:
    with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return float(
        next(line for line in lines if line.startswith(f'garden_containers{{state="{state}"}}')).split()[1]
    )


def test_stuck_container_is_told_kept_in_the_accounts_and_retried(server: ServerProcess) -> None:
    """An answer within the deadline; everybody else goes on; it goes as soon as the kernel lets it."""
    with GardenClient(server.address) as garden:
        stuck = garden.create()
        stuck.start(["sleep", "1000"])
        pid, address = stuck.info().pid, stuck.info().container_ip
        events = events_of(garden, stuck.handle)
        freezer = freezer_of(stuck.handle)
        freezer.write_text("FROZEN")
        wait_until(lambda: freezer.read_text().strip() == "FROZEN", "the freeze")
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable, match=f"{pid}") as caught:
                stuck.destroy()
            assert caught.value.code == "UNKILLABLE"
            assert time.monotonic() - began < 10
            (info,) = [each for each in garden.list(all_states=True) if each.handle == stuck.handle]
            assert info.state is ContainerState.UNKILLABLE
            assert (
                "refrigerator" in info.state_reason
                or "frozen" in info.state_reason
                or "freeze" in info.state_reason
            )
            assert count_of("unkillable") == 1
            assert garden.capacity().containers == 1
            with garden.create() as other:
                assert other.info().container_ip != address
                assert other.run(["echo", "alive"]).output().stdout == b"alive\n"
        finally:
            freezer.write_text("THAWED")
        wait_until(lambda: not list(garden.list(all_states=True)), "the destroy", timeout_s=40)
        told = []
        for event in events:
            told.append(event.kind.name)
            if told[-1] == "CONTAINER_DESTROYED":
                break
        assert "CONTAINER_UNKILLABLE" in told
        assert count_of("unkillable") == 0


def test_stuck_container_is_retried_by_the_next_server(server: ServerProcess) -> None:
    """The job is written down: it survives the server."""
    with GardenClient(server.address) as garden:
        stuck = garden.create()
        freezer = freezer_of(stuck.handle)
        freezer.write_text("FROZEN")
        try:
            with pytest.raises(Unavailable):
                stuck.destroy()
            server.kill()
            server.start()
        finally:
            freezer.write_text("THAWED")
        wait_until(lambda: not list(garden.list(all_states=True)), "the destroy", timeout_s=40)
