"""A server that was killed at any moment, and the next one on the same journal and host."""

from __future__ import annotations

import asyncio

import pytest
from kit.core import Server
from kit.fake_backend import FakeBackend, open_gate
from kit.virtual_clock import in_virtual_time, settle

from garden_py.model import errors
from garden_py.model.files import BindMount, MountMode
from garden_py.model.lifecycle import State
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import ContainerSpec, PortMapping
from garden_py.service.events import EventKind
from garden_py.service.ports import ContainerRow

SLEEP = ProcessSpec(path="sleep", id="p", args=("1000",))


@in_virtual_time
async def test_running_container_is_taken_over_as_it_was() -> None:
    """Every field of the spec as in force, the request id, and the running process."""
    server = Server()
    core = await server.start()
    spec = ContainerSpec(
        handle="box",
        env=("A=b",),
        properties=(("k", "v"),),
        bind_mounts=(BindMount("/etc", "/mnt", MountMode.READ_WRITE),),
        egress=EgressPolicy(DefaultAction.DENY, (parse_egress_rule("tcp:10.0.0.1-10.0.0.9:80,443-445"),)),
        grace_time_s=100,
        port_mappings=(PortMapping(0, 80),),
    )
    before = await core.containers.create(spec, "request")
    started = await core.processes.start("box", SLEEP, "start-request")
    core = await server.start()
    after = core.containers.get("box")
    assert (after.spec, after.request_id, after.created_ns) == (before.spec, "request", before.created_ns)
    assert after.state is State.ACTIVE
    assert await core.containers.create(spec, "request") is after
    again = await core.processes.start("box", SLEEP, "start-request")
    assert again.pid == started.pid
    assert again.exit is None


@in_virtual_time
async def test_exit_after_the_crash_reaches_the_new_server() -> None:
    """The old server's promise to know the exit status is kept by the new one."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    await core.processes.start("box", SLEEP)
    await core.backend.close()
    core = await server.start()
    server.host.containers["box"].processes["p"].finish(code=3)
    status = await core.processes.wait("box", "p", None)
    assert status is not None
    assert status.code == 3
    assert server.journal.processes("box")[0].exit is not None


@in_virtual_time
async def test_exit_between_two_servers_is_found() -> None:
    """Nobody was there when it happened; the journal has it after the start."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    await core.processes.start("box", SLEEP)
    await core.backend.close()
    server.host.containers["box"].processes["p"].finish(code=4)
    core = await server.start()
    assert server.journal.processes("box")[0].exit is not None
    assert ("PROCESS_EXITED", "box") in server.events()
    status = core.processes.get("box", "p").exit
    assert status is not None
    assert status.code == 4


@in_virtual_time
async def test_half_made_container_is_removed() -> None:
    """Its caller has no answer and never will; its leases are free again."""
    server = Server()
    core = await server.start()
    server.backend.create_gate.clear()
    lost_call = asyncio.ensure_future(core.containers.create(ContainerSpec(handle="half")))
    await settle()
    assert server.host.addresses == {2}
    core = await server.start()
    await settle()
    await core.guard.close()
    assert server.journal.containers() == []
    assert server.host.addresses == set()
    lost_call.cancel()


@in_virtual_time
async def test_begun_destroy_is_finished() -> None:
    """A persisted job: the next server completes it without being asked."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    server.backend.destroy_gate.clear()
    lost_call = asyncio.ensure_future(core.containers.destroy("box"))
    await settle()
    assert server.journal.containers()[0].state is State.DESTROYING
    server.destroy_gate = open_gate()
    core = await server.start()
    assert core.containers.list_containers({}, all_states=False, after="", limit=9) == []
    await settle()
    await core.guard.close()
    assert server.journal.containers() == []
    assert server.host.containers == {}
    lost_call.cancel()


@in_virtual_time
async def test_container_that_is_gone_is_broken_and_says_why() -> None:
    """After a reboot of the host there is nothing to take over, but callers get an answer and can destroy it."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    server.host.containers.clear()
    core = await server.start()
    container = core.containers.get("box")
    assert (container.state, container.state_reason) == (State.BROKEN, "its PID 1 is gone")
    assert ("CONTAINER_BROKEN", "box") in server.events()
    await core.containers.destroy("box")
    assert server.host.addresses == set()


@in_virtual_time
async def test_server_serves_before_a_slow_agent_has_answered() -> None:
    """One stopped agent among 250 must not keep all others from being reached; calls about its container wait."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    server.adopt_gate.clear()
    core = await server.start()
    assert [c.handle for c in core.containers.list_containers({}, all_states=False, after="", limit=9)] == [
        "box"
    ]
    with pytest.raises(errors.ContainerRecovering):
        core.containers.get("box")
    with pytest.raises(errors.ContainerRecovering):
        await core.containers.destroy("box")
    waiting = asyncio.ensure_future(core.recovery.wait_for("box"))
    await settle()
    assert not waiting.done()
    server.adopt_gate.set()
    await waiting
    assert core.containers.get("box").state is State.ACTIVE
    await core.recovery.wait_for("box")
    await core.recovery.wait_for("nobody")


@in_virtual_time
async def test_answer_about_many_waits_a_moment_for_late_agents() -> None:
    """A server that opens its door early must not tell errors of containers that are there a moment later."""
    server = Server()
    core = await server.start()
    for handle in ("box", "bag"):
        await core.containers.create(ContainerSpec(handle=handle))
    server.adopt_gate.clear()
    core = await server.start()
    for named in (["box"], []):
        waiting = asyncio.ensure_future(core.recovery.wait_for_many(named))
        await settle()
        assert not waiting.done()
        await waiting  # in vain, but it ends
    await core.recovery.wait_for_many(["nobody"])
    waiting = asyncio.ensure_future(core.recovery.wait_for_many([]))
    await settle()
    server.adopt_gate.set()
    await waiting
    assert core.containers.get("box").state is State.ACTIVE


@in_virtual_time
async def test_server_can_stop_before_it_has_taken_everything_over() -> None:
    """The next one does it."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    server.adopt_gate.clear()
    core = await server.start()
    await core.close()
    server.adopt_gate.set()
    core = await server.start()
    assert core.containers.get("box").state is State.ACTIVE


@in_virtual_time
async def test_bug_in_taking_one_over_costs_only_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can still be destroyed, and the others are there."""
    server = Server()
    core = await server.start()
    for handle in ("bad", "good"):
        await core.containers.create(ContainerSpec(handle=handle))
    adopt = FakeBackend.adopt

    async def stumble(backend: FakeBackend, row: ContainerRow) -> None:
        if row.handle == "bad":
            raise ZeroDivisionError
        await adopt(backend, row)

    monkeypatch.setattr(FakeBackend, "adopt", stumble)
    core = await server.start()
    assert core.containers.get("good").state is State.ACTIVE
    assert core.containers.get("bad").state is State.BROKEN
    await core.containers.destroy("bad")


@in_virtual_time
async def test_server_can_begin_with_nothing() -> None:
    """It serves when what an earlier one has left is gone: handles and addresses are free, events say why."""
    server = Server()
    core = await server.start()
    for handle in ("a", "b"):
        await core.containers.create(ContainerSpec(handle=handle))
    await core.processes.start("a", SLEEP)
    server.destroy_gate.clear()
    starting = asyncio.ensure_future(server.start(destroy_containers_on_startup=True))
    await asyncio.sleep(5)
    assert not starting.done()
    server.destroy_gate.set()
    core = await starting
    assert core.containers.list_containers({}, all_states=True, after="", limit=9) == []
    assert (server.host.containers, server.host.addresses, server.journal.containers()) == ({}, set(), [])
    gone = [event for event in server.kept() if event.kind is EventKind.CONTAINER_DESTROYED]
    assert {event.details["reason"] for event in gone} == {
        "the server was started with --destroy-containers-on-startup"
    }
    await core.containers.create(ContainerSpec(handle="a"))


@in_virtual_time
async def test_after_a_reboot_everything_is_cleared_while_the_server_serves() -> None:
    """Many at a time but not all at once; a handle is free when its container has been cleared; events say why."""
    server = Server()
    core = await server.start()
    for number in range(120):
        await core.containers.create(ContainerSpec(handle=f"c{number}"))
    await core.processes.start("c0", SLEEP)
    server.host.containers.clear()
    server.destroy_gate.clear()
    core = await server.start(rebooted=True)
    assert core.containers.list_containers({}, all_states=False, after="", limit=999) == []
    stale = core.containers.list_containers({}, all_states=True, after="", limit=999)
    assert {(c.state, c.state_reason) for c in stale} == {(State.DESTROYING, "the machine was rebooted")}
    assert (await core.containers.create(ContainerSpec(handle="new"))).state is State.ACTIVE
    assert 4 < len(server.backend.calls) < 60
    server.destroy_gate.set()
    await asyncio.sleep(1)
    assert [row.handle for row in server.journal.containers()] == ["new"]
    assert server.journal.processes("c0") == []
    assert len(server.host.addresses) == 1
    cleared = [event for event in server.kept() if event.kind is EventKind.CONTAINER_DESTROYED]
    assert len(cleared) == 120
    assert {event.details["reason"] for event in cleared} == {"the machine was rebooted"}


@in_virtual_time
async def test_server_killed_while_it_clears_what_a_reboot_left_goes_on_with_it() -> None:
    """The second server finds the same boot; it must not take the rest for containers that run."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    server.destroy_gate.clear()
    await server.start(rebooted=True)
    server.destroy_gate = open_gate()
    core = await server.start()
    await settle()
    assert core.registry.find("box") is None


@in_virtual_time
async def test_grace_time_starts_anew_with_the_server() -> None:
    """Nobody could use the container while no server ran."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box", grace_time_s=10))
    core = await server.start()
    await asyncio.sleep(9)
    assert core.registry.find("box") is not None
    await asyncio.sleep(2)
    assert core.registry.find("box") is None
