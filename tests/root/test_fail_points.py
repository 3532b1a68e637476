"""Every numbered step of create and destroy fails once, in every way: nothing is left, and a second try succeeds.

The steps are the registry's own list, so one without this test cannot be added. The fixtures see to it that a point has
really fired, and compare the host at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.garden import text_of, wait_until
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import Container, ContainerSpec, GardenClient, PortMapping
from garden_py.client.errors import NotFound, ServerFault, Unavailable
from garden_py.observe.failpoints import Action, Point

pytestmark = pytest.mark.root

HANDLE = "victim"
SPEC = ContainerSpec(handle=HANDLE, port_mappings=(PortMapping(container_port=80),))
Armed = Callable[[Point, Action], ServerProcess]


@pytest.fixture
def armed(no_trace: None) -> Iterator[Armed]:
    """Starts a server in which one point fires."""
    before = snapshot()
    with ExitStack() as servers:

        def start(point: Point, action: Action) -> ServerProcess:
            server = servers.enter_context(running_server("--fail-points", f"{point}:{action}"))
            servers.callback(revive, server)
            return server

        yield start
    assert_no_trace(before)


def revive(server: ServerProcess) -> None:
    """Have a server at the end, also of a test that failed while it was dead: it removes what there is."""
    if server.process is not None and server.process.poll() is not None:
        server.kill()
    if server.process is None:
        disarm(server)
        server.start()


def disarm(server: ServerProcess) -> None:
    """The next start of this server is one without fail points."""
    if "--fail-points" in server.flags:
        index = server.flags.index("--fail-points")
        del server.flags[index : index + 2]


def left_of(server: ServerProcess) -> list[str]:
    """What there still is of the victim, whoever should have removed it."""
    state, run = server.place / "state", server.place / "run"
    found = [str(path) for path in cgroups_of(HANDLE)]
    for directory in (state / "containers", state / "trash", run / "agents", run / "runc"):
        found += [str(path) for path in directory.glob("*")]
    for link in Path("/sys/class/net").glob("gdn*"):
        if (link / "ifalias").read_text().strip() == HANDLE:
            found.append(str(link))
    for pid in Path("/proc").glob("[0-9]*"):
        try:
            if str(run / "mnt") + "/" in (pid / "mounts").read_text():
                found.append(f"a mount in the namespace of {(pid / 'cmdline').read_bytes()!r}")
        except OSError:
            continue  # it has ended meanwhile
    return found


def assert_gone(server: ServerProcess, garden: GardenClient) -> None:
    """No list, no pool and no part of the host knows the victim any more; what is deleted in the background is."""
    wait_until(lambda: not list(garden.list(all_states=True)), "the removal of the victim")
    wait_until(lambda: not left_of(server), f"the removal of {left_of(server)}")
    capacity = garden.capacity()
    assert (capacity.containers, capacity.ports_in_use) == (0, 0)


def assert_fired(server: ServerProcess, point: Point) -> None:
    assert f"fail point {point}: " in server.log(), f"{point} was never reached"


def assert_succeeds(server: ServerProcess, garden: GardenClient) -> None:
    """The same handle, now without trouble."""
    with garden.create(SPEC) as container:
        assert text_of(container, "echo works") == "works\n"
    assert_gone(server, garden)


def destroy(container: Container) -> None:
    """Destroy; gone already is as good."""
    try:
        container.destroy()
    except NotFound:
        return


@contextmanager
def whole_or_host_fault() -> Iterator[None]:
    """What may happen to a call whose launcher was killed, and nothing else."""
    try:
        yield
    except ServerFault as error:
        if error.code != "HOST_FAULT":
            raise


CREATE = [point for point in Point if point.startswith("create.")]
DESTROY = [point for point in Point if point.startswith("destroy.")]


def test_every_point_belongs_to_create_or_destroy() -> None:
    """So that none is left out below."""
    assert {*CREATE, *DESTROY, Point.LIMITS_CHANGE} == set(Point)  # the last: test_limits_interrupted.py


@pytest.mark.parametrize("point", CREATE)
def test_create_that_fails_at_a_step_leaves_nothing(armed: Armed, point: Point) -> None:
    """The caller gets a typed error, the host is clean at once, the handle is free."""
    server = armed(point, Action.ERROR)
    with GardenClient(server.address) as garden:
        with pytest.raises(ServerFault, match="fail point") as failed:
            garden.create(SPEC)
        assert failed.value.code == "HOST_FAULT"
        assert_fired(server, point)
        assert_gone(server, garden)
        assert_succeeds(server, garden)


@pytest.mark.parametrize("point", CREATE)
def test_server_killed_at_a_step_of_create_leaves_nothing(armed: Armed, point: Point) -> None:
    """The next server removes what is half made."""
    server = armed(point, Action.KILL_SERVER)
    with GardenClient(server.address) as garden:
        with pytest.raises(Unavailable):
            garden.create(SPEC)
        assert_fired(server, point)
        server.kill()
        disarm(server)
        server.start()
        assert_gone(server, garden)
        assert_succeeds(server, garden)


@pytest.mark.parametrize("point", CREATE)
def test_launcher_killed_at_a_step_of_create_leaves_nothing(armed: Armed, point: Point) -> None:
    """The create may succeed with the next launcher or fail; the one as the other is whole."""
    server = armed(point, Action.KILL_LAUNCHER)
    with GardenClient(server.address) as garden:
        with whole_or_host_fault():
            garden.create(SPEC).destroy()
        assert_fired(server, point)
        assert_gone(server, garden)
        assert_succeeds(server, garden)


@pytest.mark.parametrize("point", DESTROY)
def test_destroy_that_fails_at_a_step_can_be_repeated(armed: Armed, point: Point) -> None:
    """The server also repeats it by itself."""
    server = armed(point, Action.ERROR)
    with GardenClient(server.address) as garden:
        container = garden.create(SPEC)
        with pytest.raises(ServerFault, match="fail point") as failed:
            container.destroy()
        assert failed.value.code == "HOST_FAULT"
        assert_fired(server, point)
        destroy(container)
        assert_gone(server, garden)
        assert_succeeds(server, garden)


@pytest.mark.parametrize("point", DESTROY)
def test_server_killed_at_a_step_of_destroy_finishes_it(armed: Armed, point: Point) -> None:
    """The next server goes on where it ended."""
    server = armed(point, Action.KILL_SERVER)
    with GardenClient(server.address) as garden:
        container = garden.create(SPEC)
        with pytest.raises(Unavailable):
            container.destroy()
        assert_fired(server, point)
        server.kill()
        disarm(server)
        server.start()
        assert_gone(server, garden)
        assert_succeeds(server, garden)


@pytest.mark.parametrize("point", DESTROY)
def test_launcher_killed_at_a_step_of_destroy_delays_it_at_most(armed: Armed, point: Point) -> None:
    """Another launcher is started for what is left to do."""
    server = armed(point, Action.KILL_LAUNCHER)
    with GardenClient(server.address) as garden:
        container = garden.create(SPEC)
        with whole_or_host_fault():
            container.destroy()
        destroy(container)
        assert_fired(server, point)
        assert_gone(server, garden)
        assert_succeeds(server, garden)
