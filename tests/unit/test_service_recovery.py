"""A server that was killed at any moment, and the next one on the same journal and host."""

from __future__ import annotations

import asyncio

from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.model.lifecycle import State
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import BindMount, ContainerSpec, MountMode, PortMapping

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
    core = await server.start()
    assert core.containers.list_containers({}, all_states=False, after="", limit=9) == []
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
