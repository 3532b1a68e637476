"""Moments in which two things happen in one turn of the event loop, and things that pile up over many."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc.servicer import GardenServicer
from garden_py.model import errors
from garden_py.model.limits import Limits
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import ContainerSpec
from garden_py.service.events import EventHub


@in_virtual_time
async def test_create_in_the_turn_in_which_another_of_that_handle_fails() -> None:
    """The handle is free as soon as the failed one is forgotten, not one turn of the loop later."""
    server = Server()
    core = await server.start()
    server.backend.create_gate.clear()
    server.backend.create_failure = errors.HostFault("test", "no")
    failing = asyncio.ensure_future(core.containers.create(ContainerSpec(handle="box")))
    await settle()
    server.backend.create_gate.set()
    following = asyncio.ensure_future(core.containers.create(ContainerSpec(handle="box")))
    results = await asyncio.gather(failing, following, return_exceptions=True)
    assert isinstance(results[0], errors.HostFault)
    assert not isinstance(results[1], AssertionError)


async def test_watchers_that_leave_a_quiet_server_leave_nothing() -> None:
    """A client that watches for a second at a time would fill a server that nothing happens on."""
    hub = EventHub()
    for _ in range(10):
        watching = asyncio.ensure_future(anext(hub.watch(0)))
        await asyncio.sleep(0)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
    assert not hub._waiters


@in_virtual_time
async def test_server_that_stops_knows_what_it_has_just_started() -> None:
    """A start cut off by the stop would be forgotten in the journal, while the process runs on."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    server.backend.start_gate.clear()
    starting = asyncio.ensure_future(
        core.processes.start("box", ProcessSpec(path="sleep", id="p", args=("1000",)))
    )
    await settle()
    closing = asyncio.ensure_future(core.close())
    await settle()
    assert not closing.done()
    server.backend.start_gate.set()
    await closing
    assert (await starting).id == "p"
    core = await server.start()
    assert core.processes.get("box", "p").exit is None


@in_virtual_time
async def test_metrics_of_many_are_had_at_the_same_time_and_survive_one_that_goes() -> None:
    """A plugin that counts may take seconds; the whole call would fail for a container destroyed meanwhile."""
    server = Server()
    core = await server.start()
    gates = server.backend.usage_gates = {"slow": asyncio.Event()}
    for handle in ("slow", "swift"):
        await core.containers.create(ContainerSpec(handle=handle))
    context: Any = None
    asking = asyncio.ensure_future(
        GardenServicer(core).GetMetrics(pb.GetMetricsRequest(handles=["swift", "slow"]), context)
    )
    await settle()
    await core.containers.destroy("swift")
    gates["slow"].set()
    swift, slow = (await asking).metrics
    assert (slow.handle, slow.error, slow.pids) == ("slow", "", 1)
    assert (swift.handle, swift.error) == ("swift", "unknown handle: swift")


@in_virtual_time
async def test_metrics_outlive_a_clock_that_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers were created in what is now the future; an unsigned field takes no negative entitlement."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box", limits=Limits(cpu_weight=100)))
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr("garden_py.model.age.time.time_ns", lambda: an_hour_ago)
    context: Any = None
    (box,) = (await GardenServicer(core).GetMetrics(pb.GetMetricsRequest(handles=["box"]), context)).metrics
    assert (box.error, box.cpu_entitlement_ns, box.age.ToNanoseconds()) == ("", 0, 0)
