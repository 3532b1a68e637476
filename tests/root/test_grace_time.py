"""Grace time: a container that nobody refers to goes; one that somebody does stays.

Whether a container "stays" is seen by one of the same grace time that was left alone later, and has gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from kit.garden import events_of, wait_until
from kit.patience import FACTOR
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import Container, ContainerSpec, EventKind, GardenClient

pytestmark = pytest.mark.root
GRACE = timedelta(milliseconds=400) * FACTOR


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    """A server of the test's own."""
    before = snapshot()
    with running_server() as server:
        yield server
    assert_no_trace(before)


def handles(garden: GardenClient) -> set[str]:
    """Listing names no container, so it is no use of any."""
    return {info.handle for info in garden.list(all_states=True)}


def wait_until_gone(garden: GardenClient, container: Container) -> None:
    wait_until(lambda: container.handle not in handles(garden), "the end of an idle container")


def outlive_an_idle_one(garden: GardenClient) -> None:
    """Let as much time pass as an idle container has."""
    wait_until_gone(garden, garden.create(ContainerSpec(grace_time=GRACE)))


def test_the_servers_default_is_told(no_trace: None) -> None:
    """Who states nothing has it; never is never."""
    with (
        running_server("--default-grace-time-s", "300") as server,
        GardenClient(server.address) as garden,
        garden.create() as one,
        garden.create(ContainerSpec(grace_time=timedelta(0))) as other,
    ):
        assert one.info().spec.grace_time == timedelta(seconds=300)
        assert not other.info().spec.grace_time
        listed = {info.handle: info.spec.grace_time for info in garden.list()}
        assert listed[one.handle] == timedelta(seconds=300)


def test_attached_client_holds_a_container_and_a_detached_process_does_not(garden: GardenClient) -> None:
    """Its output could be asked for by somebody who comes back; but nobody has said that he would."""
    held, left = garden.create(), garden.create()
    with held.run(["sleep", "1000"]):
        left.start(["sleep", "1000"])
        for box in (held, left):  # from here on: what comes before may take longer
            box.set_grace_time(GRACE)
        wait_until_gone(garden, left)
        outlive_an_idle_one(garden)
        assert held.handle in handles(garden)
    wait_until_gone(garden, held)


def test_client_that_waits_or_reads_holds_a_container(garden: GardenClient) -> None:
    """Every stream and every waiting call that names it counts, until the last of them has ended."""
    container = garden.create()
    process = container.start(["sh", "-c", "echo hello; sleep 1000"])
    with container.attach(process.id), container.attach(process.id):
        container.set_grace_time(GRACE)
        outlive_an_idle_one(garden)
        assert container.handle in handles(garden)
    reading = container.read_output(process.id, follow=True)
    assert next(reading).data == b"hello\n"
    outlive_an_idle_one(garden)
    assert container.handle in handles(garden)
    reading.close()
    wait_until_gone(garden, container)


def test_change_of_grace_time_counts_at_once(garden: GardenClient) -> None:
    """Both ways: what was to live for ever goes, what was to go stays."""
    shortened, prolonged = garden.create(), garden.create(ContainerSpec(grace_time=GRACE))
    prolonged.set_grace_time(timedelta(0))
    shortened.set_grace_time(GRACE)
    wait_until_gone(garden, shortened)
    assert prolonged.handle in handles(garden)
    prolonged.destroy()


@pytest.mark.parametrize("ending", [ServerProcess.stop, ServerProcess.kill])
def test_grace_time_goes_on_after_a_restart(server: ServerProcess, ending: object) -> None:
    """It begins anew with the next server, for nobody could use the container meanwhile; and events say why it went."""
    with GardenClient(server.address) as garden:
        idle, busy = (garden.create(ContainerSpec(grace_time=timedelta(seconds=1))) for _ in range(2))
        process = busy.start(["sleep", "1000"])
        assert callable(ending)
        ending(server)
        server.start()
        events = events_of(garden, idle.handle)
        with busy.attach(process.id):
            wait_until_gone(garden, idle)
            event = next(event for event in events if event.kind is EventKind.CONTAINER_DESTROYED)
            assert event.details["reason"] == "its grace time has passed"
            outlive_an_idle_one(garden)
            assert busy.info().handle == busy.handle
        wait_until_gone(garden, busy)
