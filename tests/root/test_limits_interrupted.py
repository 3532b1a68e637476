"""A change of limits that the server is killed in: in force already, and not in the journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kit.garden import sh
from kit.server import ServerProcess, running_server

from garden_py.client import ContainerSpec, GardenClient, Limits
from garden_py.client.errors import ServerFault, Unavailable
from garden_py.observe.failpoints import Action, Point

pytestmark = pytest.mark.root
MIB = 1 << 20
BEFORE = Limits(memory_bytes=200 * MIB, pids=100, rlimits={"nofile": 200})
CHANGE = Limits(
    memory_bytes=100 * MIB, cpu_quota_us=50_000, network_rx_bytes_per_s=MIB, rlimits={"nofile": 100}
)


@contextmanager
def armed_server(action: Action) -> Iterator[tuple[ServerProcess, GardenClient]]:
    """A server in which the first change of limits is cut off."""
    flags = ("--fail-points", f"{Point.LIMITS_CHANGE}:{action}")
    with running_server(*flags) as server, GardenClient(server.address) as garden:
        yield server, garden


def restart(server: ServerProcess) -> None:
    server.kill()
    index = server.flags.index("--fail-points")
    del server.flags[index : index + 2]
    server.start()


@pytest.mark.parametrize("privileged", [False, True])
def test_change_of_a_container_that_the_server_is_killed_in_is_taken_back(
    no_trace: None, privileged: bool
) -> None:
    """What is in force is what is told, before and after another restart; a new change is a change as any."""
    with armed_server(Action.KILL_SERVER) as (server, garden):
        box = garden.create(ContainerSpec(handle="box", limits=BEFORE, privileged=privileged))
        before = box.limits()
        with pytest.raises(Unavailable):
            box.update_limits(CHANGE)
        restart(server)
        assert box.limits() == before
        assert box.info().spec.limits == BEFORE
        assert box.update_limits(CHANGE).memory_bytes == 100 * MIB
        server.kill()
        server.start()
        assert box.limits().network_rx_bytes_per_s == MIB
        assert box.info().spec.limits.cpu_quota_us == 50_000


def test_change_of_a_process_that_the_server_is_killed_in_is_taken_back(no_trace: None) -> None:
    """As of containers; of one that has ended meanwhile nothing is left to be taken back."""
    with armed_server(Action.KILL_SERVER) as (server, garden):
        box = garden.create(ContainerSpec(handle="box"))
        process = box.start(sh("exec sleep 1000"), limits=Limits(memory_bytes=64 * MIB))
        before = box.limits(process.id)
        with pytest.raises(Unavailable):
            box.update_limits(Limits(memory_bytes=32 * MIB, pids=7), process.id)
        restart(server)
        assert box.limits(process.id) == before
        assert box.update_limits(Limits(pids=9), process.id).pids == 9


def test_change_that_fails_at_its_end_is_taken_back_at_once(no_trace: None) -> None:
    with armed_server(Action.ERROR) as (_, garden):
        box = garden.create(ContainerSpec(handle="box", limits=BEFORE))
        before = box.limits()
        with pytest.raises(ServerFault):
            box.update_limits(CHANGE)
        assert box.limits() == before
        assert box.info().spec.limits == BEFORE
