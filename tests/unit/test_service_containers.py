"""The rules about containers, on a backend in memory: who wins, who waits, what is undone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.model import errors
from garden_py.model.lifecycle import State
from garden_py.model.limits import Limits
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import ContainerSpec, PortMapping
from garden_py.service.containers import egress_etag

SLEEP = ProcessSpec(path="sleep", args=("1000",))


@pytest.fixture
def server() -> Server:
    return Server()


def spec(handle: str = "box", **fields: Any) -> ContainerSpec:
    return ContainerSpec(handle=handle, **fields)


# --- create


@in_virtual_time
async def test_defaults_are_filled_in(server: Server) -> None:
    """What the caller left open is in the answer: a handle, a hostname, the server's egress policy."""
    core = await server.start(default_egress="deny")
    container = await core.containers.create(ContainerSpec())
    assert len(container.handle) == 36
    assert container.spec.hostname == container.handle
    assert container.spec.egress == EgressPolicy(DefaultAction.DENY)
    assert container.state is State.ACTIVE


@in_virtual_time
async def test_second_create_of_a_handle_is_refused(server: Server) -> None:
    """The handle is taken from the moment the first create begins."""
    core = await server.start()
    server.backend.create_gate.clear()
    first = asyncio.ensure_future(core.containers.create(spec()))
    await settle()
    with pytest.raises(errors.HandleInUse):
        await core.containers.create(spec())
    server.backend.create_gate.set()
    assert (await first).state is State.ACTIVE
    with pytest.raises(errors.HandleInUse):
        await core.containers.create(spec())


@in_virtual_time
async def test_loser_of_a_race_does_not_touch_the_winner(server: Server) -> None:
    """Nothing is undone for a create that never began."""
    core = await server.start()
    await core.containers.create(spec())
    with pytest.raises(errors.HandleInUse):
        await core.containers.create(spec())
    assert server.backend.calls == [("create", "box")]
    assert core.containers.get("box").state is State.ACTIVE


@in_virtual_time
async def test_same_request_gets_the_same_container(server: Server) -> None:
    """A client that lost the answer asks again, while the create runs or later, and gets that container."""
    core = await server.start()
    server.backend.create_gate.clear()
    first = asyncio.ensure_future(core.containers.create(spec(), "request-1"))
    await settle()
    second = asyncio.ensure_future(core.containers.create(spec(), "request-1"))
    await settle()
    server.backend.create_gate.set()
    assert await first is await second
    assert await core.containers.create(spec(), "request-1") is await first
    assert server.backend.calls == [("create", "box")]
    with pytest.raises(errors.HandleInUse):
        await core.containers.create(spec(), "request-2")


@in_virtual_time
async def test_request_id_finds_a_container_without_a_handle(server: Server) -> None:
    """Who lets the server choose the handle can still repeat the request."""
    core = await server.start()
    first = await core.containers.create(ContainerSpec(), "request-1")
    assert await core.containers.create(ContainerSpec(), "request-1") is first
    assert await core.containers.create(ContainerSpec(), "request-2") is not first


@in_virtual_time
async def test_failed_create_frees_the_handle(server: Server) -> None:
    """Neither memory nor journal know anything of it, and the next create succeeds."""
    core = await server.start()
    server.backend.create_failure = errors.HostFault("mount", "no space")
    with pytest.raises(errors.HostFault):
        await core.containers.create(spec())
    assert core.registry.find("box") is None
    assert server.journal.containers() == []
    assert server.host.addresses == set()
    await core.containers.create(spec())


@in_virtual_time
async def test_create_that_cannot_be_undone_is_not_forgotten(server: Server) -> None:
    """What the host still holds stays on record and is removed later."""
    core = await server.start()
    server.backend.create_failure = errors.Unkillable("box", "PID 1 does not end")
    with pytest.raises(errors.Unkillable):
        await core.containers.create(spec())
    container = core.registry.find("box")
    assert container is not None
    assert container.state is State.UNKILLABLE
    assert [row.state for row in server.journal.containers()] == [State.UNKILLABLE]
    await asyncio.sleep(2)
    assert core.registry.find("box") is None


@in_virtual_time
async def test_bad_specs_reach_no_backend(server: Server) -> None:
    """Every bad field is named at once, and nothing was begun."""
    core = await server.start()
    bad = spec("no/slash", limits=Limits(memory_bytes=1, pids=-1), hostname="-x-")
    with pytest.raises(errors.InvalidRequest) as refused:
        await core.containers.create(bad)
    fields = {violation.field for violation in refused.value.violations}
    assert fields == {"spec.handle", "spec.hostname", "spec.limits.memory_bytes", "spec.limits.pids"}
    with pytest.raises(errors.InvalidField) as too_long:
        await core.containers.create(spec(), "r" * 129)
    assert too_long.value.field == "request_id"
    assert server.backend.calls == []


@in_virtual_time
async def test_a_nameless_create_whose_caller_left_is_not_kept(server: Server) -> None:
    """Nobody knows its handle, so nobody could ever destroy it; one with a name is kept."""
    core = await server.start()
    server.backend.create_gate.clear()
    for wanted in (ContainerSpec(), spec("named")):
        call = asyncio.ensure_future(core.containers.create(wanted))
        await settle()
        call.cancel()
    server.backend.create_gate.set()
    await asyncio.sleep(1)
    assert [container.handle for container in core.registry] == ["named"]


@in_virtual_time
async def test_a_nameless_create_cut_off_by_the_end_of_the_server_is_not_kept(server: Server) -> None:
    """The same when its caller has left because the server stops: if not this server, the next one destroys it."""
    core = await server.start()
    server.backend.create_gate.clear()
    calls = [asyncio.ensure_future(core.containers.create(wanted)) for wanted in (ContainerSpec(), spec())]
    await settle()
    closing = asyncio.ensure_future(core.close())
    await settle()
    for call in calls:
        call.cancel()
    await settle()
    server.backend.create_gate.set()
    await closing
    core = await server.start()
    await asyncio.sleep(1)
    assert [container.handle for container in core.registry] == ["box"]
    assert list(server.host.containers) == ["box"]


@pytest.mark.parametrize(
    ("settings", "flag", "size"),
    [({"max_containers": 2}, "--max-containers", 2), ({"containers": 1}, "--network-pool", 1)],
)
@in_virtual_time
async def test_full_server_names_what_is_full(
    server: Server, settings: dict[str, int], flag: str, size: int
) -> None:
    """The operator learns which flag to change; a container being made counts."""
    core = await server.start(**settings)
    server.backend.create_gate.clear()
    making = [asyncio.ensure_future(core.containers.create(spec(f"c{n}"))) for n in range(size)]
    await settle()
    with pytest.raises(errors.PoolExhausted) as refused:
        await core.containers.create(spec("one-too-many"))
    assert (refused.value.pool, refused.value.flag, refused.value.size) == ("containers", flag, size)
    server.backend.create_gate.set()
    await asyncio.gather(*making)
    await core.containers.destroy("c0")
    await core.containers.create(spec("one-too-many"))


@in_virtual_time
async def test_privileged_containers_can_be_forbidden(server: Server) -> None:
    """Before anything else is looked at; unprivileged ones are made as ever."""
    core = await server.start(disable_privileged_containers=True)
    with pytest.raises(errors.PrivilegedDisabled, match="privileged container creation is disabled"):
        await core.containers.create(spec(privileged=True))
    await core.containers.create(spec())
    with pytest.raises(errors.PrivilegedDisabled):
        await core.containers.create(spec(privileged=True))


@in_virtual_time
async def test_half_made_container_is_not_seen(server: Server) -> None:
    """Callers see it in lists only when they ask for all states."""
    core = await server.start()
    server.backend.create_gate.clear()
    making = asyncio.ensure_future(core.containers.create(spec()))
    await settle()
    with pytest.raises(errors.ContainerNotFound):
        core.containers.get("box")
    assert core.containers.list_containers({}, all_states=False, after="", limit=10) == []
    (shown,) = core.containers.list_containers({}, all_states=True, after="", limit=10)
    assert shown.state is State.CREATING
    server.backend.create_gate.set()
    await making


# --- destroy


@in_virtual_time
async def test_destroys_join(server: Server) -> None:
    """Any number of callers, one demolition; who comes later finds nothing."""
    core = await server.start()
    await core.containers.create(spec())
    server.backend.destroy_gate.clear()
    calls = [asyncio.ensure_future(core.containers.destroy("box")) for _ in range(3)]
    await settle()
    server.backend.destroy_gate.set()
    await asyncio.gather(*calls)
    assert server.backend.calls.count(("destroy", "box")) == 1
    with pytest.raises(errors.ContainerNotFound):
        await core.containers.destroy("box")
    assert server.journal.containers() == []


@in_virtual_time
async def test_destroy_goes_on_when_its_caller_leaves(server: Server) -> None:
    """The job belongs to the server."""
    core = await server.start()
    await core.containers.create(spec())
    server.backend.destroy_gate.clear()
    call = asyncio.ensure_future(core.containers.destroy("box"))
    await settle()
    call.cancel()
    await settle()
    server.backend.destroy_gate.set()
    await settle()
    assert core.registry.find("box") is None


@in_virtual_time
async def test_destroy_waits_for_the_create(server: Server) -> None:
    """A destroy during a create removes the container when it is complete."""
    core = await server.start()
    server.backend.create_gate.clear()
    making = asyncio.ensure_future(core.containers.create(spec()))
    await settle()
    destroying = asyncio.ensure_future(core.containers.destroy("box"))
    await settle()
    assert server.backend.calls == [("create", "box")]
    server.backend.create_gate.set()
    await making
    await destroying
    assert server.backend.calls == [("create", "box"), ("destroy", "box")]
    assert core.registry.find("box") is None


@in_virtual_time
async def test_destroy_during_a_failing_create_finds_nothing(server: Server) -> None:
    """The create has undone itself; there is nothing to destroy."""
    core = await server.start()
    server.backend.create_gate.clear()
    server.backend.create_failure = errors.HostFault("mount", "no")
    making = asyncio.ensure_future(core.containers.create(spec()))
    await settle()
    destroying = asyncio.ensure_future(core.containers.destroy("box"))
    await settle()
    server.backend.create_gate.set()
    with pytest.raises(errors.HostFault):
        await making
    with pytest.raises(errors.ContainerNotFound):
        await destroying


@in_virtual_time
async def test_unkillable_container_is_tried_again_ever_more_rarely(server: Server) -> None:
    """After 1, 2, 5, 10 and then every 30 seconds, until the kernel lets go."""
    core = await server.start()
    await core.containers.create(spec())
    stuck = [errors.Unkillable("box", "task 7 in D state") for _ in range(6)]
    server.backend.destroy_failures = list(stuck)
    with pytest.raises(errors.Unkillable):
        await core.containers.destroy("box")
    container = core.registry.find("box")
    assert container is not None
    assert (container.state, container.state_reason) == (State.UNKILLABLE, str(stuck[0]))
    listed = core.containers.list_containers({}, all_states=False, after="", limit=9)
    assert listed == [container], "somebody has to see it"
    tries: list[int] = []
    for second in range(1, 100):
        await asyncio.sleep(1)
        if server.backend.calls.count(("destroy", "box")) > 1 + len(tries):
            tries.append(second)
    assert tries == [1, 3, 8, 18, 48, 78]
    assert core.registry.find("box") is None
    assert server.events().count(("CONTAINER_UNKILLABLE", "box")) == 6
    assert server.events()[-1] == ("CONTAINER_DESTROYED", "box")


@in_virtual_time
async def test_looking_at_an_unkillable_container_does_not_stop_the_retry(server: Server) -> None:
    """A call that names it touches its grace time, and that timer only."""
    core = await server.start()
    await core.containers.create(spec())
    server.backend.destroy_failures = [errors.Unkillable("box", "stuck")]
    with pytest.raises(errors.Unkillable):
        await core.containers.destroy("box")
    core.containers.get("box")
    core.containers.set_grace_time("box", 3600)
    await asyncio.sleep(2)
    assert core.registry.find("box") is None


@in_virtual_time
async def test_asking_again_retries_an_unkillable_container_at_once(server: Server) -> None:
    """A caller need not wait for the timer, and the timer then finds nothing to do."""
    core = await server.start()
    await core.containers.create(spec())
    server.backend.destroy_failures = [errors.Unkillable("box", "stuck")]
    with pytest.raises(errors.Unkillable):
        await core.containers.destroy("box")
    await core.containers.destroy("box")
    await core.containers.create(spec())
    await asyncio.sleep(60)
    assert core.containers.get("box").state is State.ACTIVE


@in_virtual_time
async def test_closing_server_starts_no_new_work(server: Server) -> None:
    """Jobs under way are finished, new ones refused, timers that fire too late are ignored."""
    core = await server.start()
    await core.containers.create(spec(grace_time_s=5))
    server.backend.create_gate.clear()
    making = asyncio.ensure_future(core.containers.create(spec("slow")))
    await settle()
    closing = asyncio.ensure_future(core.guard.close())
    await settle()
    with pytest.raises(errors.ShuttingDown):
        await core.containers.create(spec("late"))
    assert core.registry.find("late") is None
    await asyncio.sleep(10)
    assert core.containers.get("box").state is State.ACTIVE
    server.backend.create_gate.set()
    await closing
    assert (await making).state is State.ACTIVE


# --- grace time


@in_virtual_time
async def test_unused_container_goes_after_its_grace_time(server: Server) -> None:
    """Not before, and not later."""
    core = await server.start()
    await core.containers.create(spec(grace_time_s=10))
    await asyncio.sleep(9)
    assert core.registry.find("box") is not None
    await asyncio.sleep(2)
    assert core.registry.find("box") is None
    assert ("CONTAINER_DESTROYED", "box") in server.events()


USES: dict[str, Callable[[Server], Any]] = {
    "get": lambda server: server.core.containers.get("box"),
    "limits": lambda server: server.core.containers.limits("box"),
    "properties": lambda server: server.core.containers.update_properties("box", {"a": "b"}, []),
    "egress": lambda server: server.core.containers.egress("box"),
    "usage": lambda server: server.core.containers.usage(["box"]),
    "start": lambda server: server.core.processes.start("box", ProcessSpec(path="true")),
    "processes": lambda server: server.core.processes.list_processes("box"),
}


@pytest.mark.parametrize("use", sorted(USES))
@in_virtual_time
async def test_every_call_that_names_it_starts_the_grace_time_anew(server: Server, use: str) -> None:
    """A container that somebody asks for every nine seconds lives on with ten seconds of grace."""
    core = await server.start()
    await core.containers.create(spec(grace_time_s=10))
    for _ in range(4):
        await asyncio.sleep(9)
        found = USES[use](server)
        if asyncio.iscoroutine(found):
            await found
    assert core.registry.find("box") is not None
    await asyncio.sleep(11)
    assert core.registry.find("box") is None


@in_virtual_time
async def test_container_in_use_does_not_expire(server: Server) -> None:
    """An open stream holds it, however long; the time starts when the last one ends."""
    core = await server.start()
    await core.containers.create(spec(grace_time_s=1))
    with core.processes.use("box"):
        with core.processes.use("box"):
            await asyncio.sleep(100)
        await asyncio.sleep(100)
        assert core.registry.find("box") is not None
    await asyncio.sleep(2)
    assert core.registry.find("box") is None


@in_virtual_time
async def test_grace_time_can_be_changed(server: Server) -> None:
    """Zero means never, also against the server's default; the default serves who states nothing."""
    core = await server.start(default_grace_time_s=10)
    await core.containers.create(spec("default"))
    await core.containers.create(spec("for-ever", grace_time_s=0))
    await core.containers.create(spec("changed"))
    core.containers.set_grace_time("changed", 100)
    await asyncio.sleep(50)
    assert [c.handle for c in core.registry] == ["changed", "for-ever"]
    await asyncio.sleep(60)
    assert [c.handle for c in core.registry] == ["for-ever"]
    with pytest.raises(errors.InvalidField):
        core.containers.set_grace_time("for-ever", -1)


# --- broken


@in_virtual_time
async def test_broken_container_can_only_be_destroyed(server: Server) -> None:
    """Its reason is told to whoever asks for more."""
    core = await server.start()
    await core.containers.create(spec(properties=(("a", "b"),)))
    process = await core.processes.start("box", SLEEP)
    server.backend.break_container("box", "its PID 1 has ended")
    assert (await process.wait()).signal == 9
    container = core.containers.get("box")
    assert (container.state, container.state_reason) == (State.BROKEN, "its PID 1 has ended")
    assert ("CONTAINER_BROKEN", "box") in server.events()
    with pytest.raises(errors.ContainerBroken):
        await core.processes.start("box", SLEEP)
    with pytest.raises(errors.ContainerBroken):
        await core.containers.limits("box")
    assert isinstance((await core.containers.usage(["box"]))["box"], errors.ContainerBroken)
    assert core.processes.get("box", process.id) is process
    await core.containers.destroy("box")


# --- lists, properties, limits, egress, ports, stop


@in_virtual_time
async def test_list_filters_by_properties_and_pages_by_handle(server: Server) -> None:
    """Pages neither repeat nor skip, whatever the filter."""
    core = await server.start()
    for n in range(7):
        await core.containers.create(spec(f"c{n}", properties=(("parity", "odd" if n % 2 else "even"),)))
    found = [c.handle for c in core.containers.list_containers({}, all_states=False, after="", limit=100)]
    assert found == [f"c{n}" for n in range(7)]
    pages, after = [], ""
    while page := core.containers.list_containers({"parity": "even"}, all_states=False, after=after, limit=2):
        pages.append([c.handle for c in page])
        after = page[-1].handle
    assert pages == [["c0", "c2"], ["c4", "c6"]]
    assert core.containers.list_containers({"nope": "x"}, all_states=False, after="", limit=9) == []


@in_virtual_time
async def test_properties_change_in_one_step(server: Server) -> None:
    """Removal wins over setting, absent keys are no error, and a bad key changes nothing."""
    core = await server.start()
    await core.containers.create(spec(properties=(("a", "1"), ("b", "2"))))
    now = core.containers.update_properties("box", {"b": "3", "c": "4"}, ["a", "absent"])
    assert now == {"b": "3", "c": "4"}
    with pytest.raises(errors.InvalidRequest):
        core.containers.update_properties("box", {"": "x", "d": "5"}, [])
    assert dict(core.containers.get("box").spec.properties) == now
    assert server.journal.containers()[0].spec["properties"] == [["b", "3"], ["c", "4"]]


@in_virtual_time
async def test_limits_in_force_follow_their_changes(server: Server) -> None:
    """An update keeps what it does not state, and the spec shows the result."""
    core = await server.start()
    await core.containers.create(spec(limits=Limits(memory_bytes=64 << 20, pids=10)))
    now = await core.containers.update_limits("box", Limits(pids=20))
    assert (now.memory_bytes, now.pids) == (64 << 20, 20)
    assert core.containers.get("box").spec.limits == Limits(memory_bytes=64 << 20, pids=20)
    with pytest.raises(errors.InvalidRequest) as refused:
        await core.containers.update_limits("box", Limits(cpu_weight=0))
    assert refused.value.violations[0].field == "limits.cpu_weight"


@in_virtual_time
async def test_egress_is_replaced_only_by_who_knows_the_current_one(server: Server) -> None:
    """An etag protects from lost updates; without one the last writer wins; None is the default policy."""
    core = await server.start()
    await core.containers.create(spec())
    old = egress_etag(EgressPolicy())
    closed = EgressPolicy(DefaultAction.DENY, (parse_egress_rule("tcp:10.0.0.1:80"),))
    assert await core.containers.set_egress("box", closed, old) == closed
    with pytest.raises(errors.EtagMismatch) as refused:
        await core.containers.set_egress("box", EgressPolicy(), old)
    assert refused.value.actual == egress_etag(closed)
    policy, counts = await core.containers.egress("box")
    assert policy == closed
    assert len(counts.rules) == 1
    assert await core.containers.set_egress("box", None, "") == EgressPolicy()


@in_virtual_time
async def test_mapped_ports_are_shown_and_kept(server: Server) -> None:
    """The facts in the journal name the port before the caller does."""
    core = await server.start()
    container = await core.containers.create(spec(port_mappings=(PortMapping(0, 80),)))
    assert container.spec.port_mappings == (PortMapping(61_001, 80),)
    mapped = await core.containers.map_port("box", PortMapping(0, 0))
    assert mapped == PortMapping(61_002, 61_002)
    assert server.journal.containers()[0].facts["ports"] == [61_001, 61_002]
    with pytest.raises(errors.InvalidRequest) as refused:
        await core.containers.map_port("box", PortMapping(0, 70_000))
    assert refused.value.violations[0].field == "mapping.container_port"


@in_virtual_time
async def test_stop_ends_processes_and_the_container_goes_on(server: Server) -> None:
    """A stopped container runs new processes, and can be stopped again."""
    core = await server.start()
    await core.containers.create(spec())
    process = await core.processes.start("box", SLEEP)
    await core.containers.stop("box", kill=False)
    assert (await process.wait()).signal == 15
    assert core.containers.get("box").state is State.STOPPED
    assert (await (await core.processes.start("box", ProcessSpec(path="true"))).wait()).code == 0
    await core.containers.stop("box", kill=True)
    assert server.events().count(("CONTAINER_STOPPED", "box")) == 2


@in_virtual_time
async def test_stop_that_leaves_a_process_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What still runs is told with the error, and the container is not called stopped."""
    core = await server.start()
    await core.containers.create(spec())
    process = await core.processes.start("box", SLEEP)
    sent: list[int] = []

    async def hold(handle: str, number: int) -> None:
        sent.append(number)

    with monkeypatch.context() as kernel:
        kernel.setattr(server.backend, "signal_all", hold)
        with pytest.raises(errors.Unkillable, match=f"box cannot be stopped yet: {process.id} ") as caught:
            await core.containers.stop("box", kill=False, grace_s=1)
    assert caught.value.code == "unkillable"
    assert set(sent) == {15, 9}
    assert core.containers.get("box").state is State.ACTIVE
    assert ("CONTAINER_STOPPED", "box") not in server.events()
    await core.containers.stop("box", kill=False)
    assert core.containers.get("box").state is State.STOPPED


@in_virtual_time
async def test_usage_of_many_never_fails_as_a_whole(server: Server) -> None:
    """One bad handle is an entry, not an error."""
    core = await server.start()
    await core.containers.create(spec())
    found = await core.containers.usage(["box", "unknown"])
    assert isinstance(found["unknown"], errors.ContainerNotFound)
    assert not isinstance(found["box"], errors.GardenError)
    assert set(await core.containers.usage([])) == {"box"}


@in_virtual_time
async def test_notable_events_are_bounded_and_the_latest_stay(server: Server) -> None:
    """A container that runs out of memory all day does not fill the server's memory."""
    core = await server.start()
    container = await core.containers.create(spec())
    for number in range(1500):
        core.registry.note(container, str(number))
    assert len(container.notable) == 1000
    assert container.notable[-1] == "1499"
