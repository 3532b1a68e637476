"""The rules about processes, on a backend in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.model import errors
from garden_py.model.codec import load_exit
from garden_py.model.process import OutputStream, ProcessSpec
from garden_py.model.spec import ContainerSpec
from garden_py.service.core import Core


async def core_with_box(server: Server, **fields: object) -> Core:
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box", **fields))  # type: ignore[arg-type]
    return core


def program(path: str, id_: str = "", *args: str) -> ProcessSpec:
    return ProcessSpec(path=path, id=id_, args=args)


@in_virtual_time
async def test_same_request_gets_the_same_process() -> None:
    """A repeated start joins the one under way, or finds it running, or finished."""
    server = Server()
    core = await core_with_box(server)
    server.backend.start_gate.clear()
    first = asyncio.ensure_future(core.processes.start("box", program("echo", "p"), "r1"))
    await settle()
    second = asyncio.ensure_future(core.processes.start("box", program("echo", "p"), "r1"))
    other = asyncio.ensure_future(core.processes.start("box", program("echo", "p"), "r2"))
    await settle()
    server.backend.start_gate.set()
    assert await first is await second
    with pytest.raises(errors.ProcessIdInUse):
        await other
    await (await first).wait()
    assert await core.processes.start("box", program("echo", "p"), "r1") is await first
    with pytest.raises(errors.ProcessIdInUse):
        await core.processes.start("box", program("echo", "p"))
    assert server.backend.calls.count(("start", "p")) == 1


@in_virtual_time
async def test_start_goes_on_when_its_caller_leaves() -> None:
    """A client that broke off finds the process by its id."""
    server = Server()
    core = await core_with_box(server)
    server.backend.start_gate.clear()
    call = asyncio.ensure_future(core.processes.start("box", program("sleep", "p", "9")))
    await settle()
    call.cancel()
    await settle()
    server.backend.start_gate.set()
    await settle()
    assert core.processes.get("box", "p").exit is None


@in_virtual_time
async def test_failed_start_leaves_no_record() -> None:
    """The id is free again, in memory and in the journal."""
    server = Server()
    core = await core_with_box(server)
    with pytest.raises(errors.ExecutableNotFound):
        await core.processes.start("box", program("nonsense", "p"))
    assert server.journal.processes("box") == []
    with pytest.raises(errors.ProcessNotFound):
        core.processes.get("box", "p")
    await core.processes.start("box", program("true", "p"))


@in_virtual_time
async def test_exit_is_recorded_before_it_is_told() -> None:
    """Whoever was told of an exit finds it in the journal, and only then may the backend forget it."""
    server = Server()
    core = await core_with_box(server)
    process = await core.processes.start("box", ProcessSpec(path="sh", args=("-c", "exit 7"), id="p"))
    await process.wait()
    await settle()
    (row,) = server.journal.processes("box")
    assert row.exit is not None
    assert load_exit(row.exit).code == 7
    assert server.host.containers["box"].processes["p"].recorded == 1
    told = [event for event in server.kept() if event.kind.value == "PROCESS_EXITED"]
    assert [(event.process_id, event.exit) for event in told] == [("p", process.exit)]


@in_virtual_time
async def test_exit_before_the_start_was_answered_is_not_lost() -> None:
    """`true` may be over before the backend has said that it began: started comes first, then exited."""
    server = Server()
    core = await core_with_box(server)
    original = server.backend.start_process

    async def start_and_let_it_end(
        handle: str, spec: ProcessSpec, env: tuple[str, ...], record: Callable[[], None]
    ) -> object:
        process = await original(handle, spec, env, record)
        await process.wait()
        return process

    server.backend.start_process = start_and_let_it_end  # type: ignore[method-assign, assignment]
    await core.processes.start("box", program("true", "p"))
    kinds = [kind for kind, _ in server.events() if kind.startswith("PROCESS")]
    assert kinds == ["PROCESS_STARTED", "PROCESS_EXITED"]
    assert server.journal.processes("box")[0].exit is not None


@in_virtual_time
async def test_containers_environment_comes_before_the_processs() -> None:
    """The process's own entries win."""
    server = Server()
    core = await core_with_box(server, env=("A=box", "B=box"))
    process = await core.processes.start("box", ProcessSpec(path="env", env=("A=process",)))
    await process.wait()
    log = process.output(OutputStream.STDOUT).open_reader(0)
    assert log.read_nowait(1000) == b"PATH=/bin\nA=process\nB=box\n"


@in_virtual_time
async def test_wait_ends_with_the_exit_or_the_timeout() -> None:
    """None says that the process still runs; the answer can be had any number of times."""
    server = Server()
    core = await core_with_box(server)
    process = await core.processes.start("box", program("sleep", "p", "1000"))
    assert await core.processes.wait("box", "p", 5) is None
    waiting = asyncio.ensure_future(core.processes.wait("box", "p", None))
    assert await core.processes.signal("box", "p", 15, group=False)
    status = await waiting
    assert status is not None
    assert status.signal == 15
    assert await core.processes.wait("box", "p", 0) == status == process.exit
    assert not await core.processes.signal("box", "p", 15, group=False)


@in_virtual_time
async def test_waiting_holds_the_container() -> None:
    """A caller in WaitProcess is a user."""
    server = Server()
    core = await core_with_box(server, grace_time_s=1)
    await core.processes.start("box", program("sleep", "p", "1000"))
    assert await core.processes.wait("box", "p", 60) is None
    assert core.registry.find("box") is not None


@in_virtual_time
async def test_processes_are_listed_oldest_first() -> None:
    """Running and finished ones."""
    server = Server()
    core = await core_with_box(server)
    for name in ("z", "a", "m"):
        await core.processes.start("box", program("true", name))
    assert [process.id for process in core.processes.list_processes("box")] == ["z", "a", "m"]


@in_virtual_time
async def test_processes_of_an_unknown_container_are_not_found() -> None:
    """The container is the first thing that is looked for."""
    core = await Server().start()
    with pytest.raises(errors.ContainerNotFound):
        core.processes.list_processes("unknown")
    with pytest.raises(errors.ContainerNotFound):
        core.processes.get("unknown", "p")
    with pytest.raises(errors.ContainerNotFound):
        await core.processes.start("unknown", program("true"))
