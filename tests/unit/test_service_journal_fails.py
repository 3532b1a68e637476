"""A journal that cannot be written to, e.g. on a full disk: nobody is told of a state that the next server forgets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.model import errors
from garden_py.model.lifecycle import State
from garden_py.model.limits import Limits
from garden_py.model.netrule import DefaultAction, EgressPolicy
from garden_py.model.spec import ContainerSpec, PortMapping
from garden_py.service.core import Core

DENY = EgressPolicy(default_action=DefaultAction.DENY)


async def set_grace_time(core: Core) -> None:
    core.containers.set_grace_time("box", 7)


async def update_properties(core: Core) -> None:
    core.containers.update_properties("box", {"k": "new"}, [])


CHANGES: dict[str, Callable[[Core], Awaitable[Any]]] = {
    "properties": update_properties,
    "grace time": set_grace_time,
    "limits": lambda core: core.containers.update_limits("box", Limits(memory_bytes=64 << 20)),
    "egress": lambda core: core.containers.set_egress("box", DENY, ""),
    "port": lambda core: core.containers.map_port("box", PortMapping(0, 80)),
    "stop": lambda core: core.containers.stop("box", kill=True),
}


def fail(_: object) -> None:
    raise errors.HostFault("journal", "database or disk is full")


async def start_with_box(server: Server) -> Core:
    core = await server.start()
    await core.containers.create(
        ContainerSpec(handle="box", properties=(("k", "old"),), limits=Limits(memory_bytes=32 << 20))
    )
    return core


@pytest.mark.parametrize("change", CHANGES)
@in_virtual_time
async def test_change_that_cannot_be_written_down_is_not_made(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in memory, not on the host, and so not in what the next server says either."""
    server = Server()
    core = await start_with_box(server)
    container = core.containers.get("box")
    before = (container.spec, container.state, container.facts, core.containers.egress_etag("box"))
    limits, policy = await core.containers.limits("box"), server.host.containers["box"].policy
    monkeypatch.setattr(server.journal, "save_container", fail)
    with pytest.raises(errors.HostFault, match="full"):
        await CHANGES[change](core)
    assert (container.spec, container.state, container.facts, core.containers.egress_etag("box")) == before
    assert await core.containers.limits("box") == limits
    assert server.host.containers["box"].policy == policy
    monkeypatch.undo()
    await CHANGES[change](core)
    after = container.spec
    core = await server.start()
    assert core.containers.get("box").spec == after


@in_virtual_time
async def test_broken_container_is_broken_although_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has happened has happened."""
    server = Server()
    core = await start_with_box(server)
    monkeypatch.setattr(server.journal, "save_container", fail)
    server.backend.break_container("box", "killed")
    assert core.containers.get("box").state is State.BROKEN


@in_virtual_time
async def test_change_whose_caller_leaves_is_made_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the host would follow the new policy while everybody is told of the old one."""
    server = Server()
    core = await start_with_box(server)
    gate = asyncio.Event()
    apply = server.backend.set_egress

    async def slowly(handle: str, policy: EgressPolicy) -> None:
        await gate.wait()
        await apply(handle, policy)

    monkeypatch.setattr(server.backend, "set_egress", slowly)
    call = asyncio.ensure_future(core.containers.set_egress("box", DENY, ""))
    await settle()
    call.cancel()
    await settle()
    closing = asyncio.ensure_future(core.close())
    gate.set()
    await closing
    assert server.host.containers["box"].policy == DENY
    core = await server.start()
    assert core.containers.get("box").spec.egress == DENY
