"""What the kernel does not let go, on a real container: held by cgroup v1's freezer, SIGKILL waits for the thaw."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta

import pytest
from kit.cgroups import cgroups_of, pids_in
from kit.garden import events_of, wait_until
from kit.server import ServerProcess, running_server
from kit.stuck import FREEZER, held

from garden_py.client import ContainerState, GardenClient
from garden_py.client.errors import Unavailable

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


def pids_of(handle: str) -> list[int]:
    """By the host's numbers; PID 1 is the first."""
    (directory,) = (path for path in cgroups_of(handle) if path.match("pids/*/*"))
    return sorted(pids_in(directory))


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
        process = stuck.start(["sleep", "1000"])
        address = stuck.info().container_ip
        _, sleeper = pids_of(stuck.handle)
        events = events_of(garden, stuck.handle)
        with held(*pids_of(stuck.handle)):
            began = time.monotonic()
            with pytest.raises(Unavailable, match=f"process {sleeper} ") as caught:
                stuck.destroy()
            assert caught.value.code == "UNKILLABLE"
            assert time.monotonic() - began < 10
            (info,) = [each for each in garden.list(all_states=True) if each.handle == stuck.handle]
            assert info.state is ContainerState.UNKILLABLE
            assert f"process {sleeper} (state D, wait channel " in info.state_reason
            assert stuck.wait(process.id, timeout=timedelta(seconds=0.1)) is None, "it still runs"
            assert count_of("unkillable") == 1
            assert garden.capacity().containers == 1
            with garden.create() as other:
                assert other.info().container_ip != address
                assert other.run(["echo", "alive"]).output().stdout == b"alive\n"
        wait_until(lambda: not list(garden.list(all_states=True)), "the destroy", timeout_s=40)
        told = []
        for event in events:
            told.append(event.kind.name)
            if told[-1] == "CONTAINER_DESTROYED":
                break
        assert told.index("CONTAINER_UNKILLABLE") < told.index("PROCESS_EXITED"), "it ran until then"
        assert told.count("PROCESS_EXITED") == 1
        assert count_of("unkillable") == 0


def test_process_that_is_stuck_is_named_and_not_pid_1_which_waits_for_it(server: ServerProcess) -> None:
    """Who looks for the device or file system that hangs needs the process that sleeps in it."""
    with GardenClient(server.address) as garden:
        stuck = garden.create()
        stuck.start(["sleep", "1000"])
        stuck.start(["sleep", "1000"])
        pid_1, first, second = pids_of(stuck.handle)
        with held(first), pytest.raises(Unavailable) as caught:
            stuck.destroy()
        assert f"process {first} (state D, wait channel " in str(caught.value)
        assert str(second) not in str(caught.value)
        assert f"{pid_1} " not in str(caught.value)
        wait_until(lambda: not list(garden.list(all_states=True)), "the destroy", timeout_s=40)


def test_stop_that_leaves_a_stuck_process_fails(server: ServerProcess) -> None:
    """It names the process, the container stays as it was, and the next stop finds nothing left."""
    with GardenClient(server.address) as garden, garden.create() as box:
        box.start(["sleep", "1000"])
        box.start(["sleep", "1000"])
        _, stuck, other = pids_of(box.handle)
        with held(stuck):
            with pytest.raises(Unavailable, match=rf"process {stuck} \(state D, wait channel ") as caught:
                box.stop(kill=True)
            assert caught.value.code == "UNKILLABLE"
            assert box.info().state is ContainerState.ACTIVE
            assert other not in pids_of(box.handle)
        box.stop(kill=True)
        assert box.info().state is ContainerState.STOPPED


def test_stuck_container_is_retried_by_the_next_server(server: ServerProcess) -> None:
    """The job is written down: it survives the server."""
    with GardenClient(server.address) as garden:
        stuck = garden.create()
        with held(*pids_of(stuck.handle)):
            with pytest.raises(Unavailable):
                stuck.destroy()
            server.kill()
            server.start()
        wait_until(lambda: not list(garden.list(all_states=True)), "the destroy", timeout_s=40)
