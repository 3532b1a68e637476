"""A server that starts again beside agents that are busy, hostile, or silent."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kit.core import Server
from kit.fake_backend import FakeBackend
from kit.virtual_clock import in_virtual_time

from garden_py import wire
from garden_py.backend.cgroup.layout import ContainerCgroup, Hierarchies
from garden_py.backend.linux.backend import LinuxBackend
from garden_py.backend.linux.container import ContainerFacts, LinuxContainer
from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.linux.processes import LinuxProcesses
from garden_py.backend.linux.sidecars import Sidecar
from garden_py.backend.linux.site import Site
from garden_py.config import load_config
from garden_py.model import errors
from garden_py.model.codec import dump_process_spec
from garden_py.model.lifecycle import State
from garden_py.model.process import ProcessSpec
from garden_py.model.process import Sidecar as SidecarSpec
from garden_py.model.spec import ContainerSpec
from garden_py.service.ports import BackendEvents, ProcessRow

RECORD = {"id": "p", "pid": 7, "exited": False, "status": None, "ended_ns": 0}


def make_container(directory: Path) -> LinuxContainer:
    """A container whose cgroup is a directory of ordinary files."""
    cgroup = ContainerCgroup(Hierarchies(1, {"memory": directory}), "c")
    cgroup.directory("memory", *cgroup.leaf(None)).mkdir(parents=True)
    cgroup.directory("memory", *cgroup.leaf(None), "memory.oom_control").write_text("oom_kill 0\n")
    facts = ContainerFacts("id", False, NetworkLease(cast(Any, "10.0.0.2"), ()), 0)
    nobody = BackendEvents(*[lambda *_: None] * 4)
    return LinuxContainer("c", facts, cgroup, directory, nobody)


async def agent(listener: socket.socket) -> None:
    """Greets with a process that runs, and has seen it end by the time it is asked for its streams."""
    loop = asyncio.get_running_loop()
    sock, _ = await loop.sock_accept(listener)
    ended = {**RECORD, "exited": True, "status": 3 << 8, "ended_ns": 5}
    answers: list[dict[str, Any]] = [
        {"wire": 2, "processes": [RECORD]},
        {"delivered": False},
        {**ended, "fds": []},
    ]
    with sock:
        for answer in answers:
            (request,) = wire.Decoder().feed(await loop.sock_recv(sock, 1 << 16))
            event = wire.encode_frame(wire.EVENT, 0, {"event": "exited", "process": "p", **ended})
            await loop.sock_sendall(sock, wire.encode_frame(wire.REPLY, request.id, answer, 0))
            if answer is answers[0]:
                await loop.sock_sendall(sock, event)
        await loop.sock_recv(sock, 1)


async def test_exit_between_greeting_and_adoption_is_not_lost(tmp_path: Path) -> None:
    """With many containers a second passes between the two, and the agent tells of an exit only once."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        listener.setblocking(False)
        playing = asyncio.ensure_future(agent(listener))
        container = make_container(tmp_path)
        container.connect(tmp_path / "agent.sock", patience_s=1)
        await container.greet(timeout_s=1)
        assert container.held == {"p": None}
        await container.link.signal("other", 15, group=False)  # its answer comes behind the event
        backend = LinuxBackend(load_config({}, environ={}))
        backend._containers["c"] = container
        depot = SimpleNamespace(streams=lambda *_: tmp_path / "streams")
        site = cast(Site, SimpleNamespace(depot=depot, config=load_config({}, environ={})))
        nobody: Any = None
        backend._processes = LinuxProcesses(site, nobody, nobody, nobody, nobody, nobody)
        spec = ProcessSpec(path="true", id="p")
        row = ProcessRow("c", "p", "", 1, 7, dump_process_spec(spec), None)
        process = await backend.adopt_process("c", row, spec)
        assert process.exit is not None
        assert process.exit.code == 3
        container.let_go()
        await playing


async def test_sidecar_whose_agent_goes_during_adoption_costs_its_own_process_only(tmp_path: Path) -> None:
    """Greeted, and gone before its process was adopted: the container and everything else in it are taken over."""
    container = make_container(tmp_path)
    sidecar = Sidecar("c", "p")
    sidecar.held, sidecar.broken_because = {"p": None}, "its agent is gone"
    container.sidecars["p"] = sidecar
    backend = LinuxBackend(load_config({}, environ={}))
    backend._containers["c"] = container
    depot = SimpleNamespace(streams=lambda *_: tmp_path / "streams")
    site = cast(Site, SimpleNamespace(depot=depot, config=load_config({}, environ={})))
    nobody: Any = None
    backend._processes = LinuxProcesses(site, nobody, nobody, nobody, nobody, nobody)
    spec = ProcessSpec(path="true", id="p", sidecar=SidecarSpec("/image"))
    row = ProcessRow("c", "p", "", 1, 7, dump_process_spec(spec), None)
    process = await backend.adopt_process("c", row, spec)
    assert process.exit is not None
    assert process.exit.signal == 9
    assert "sidecar is gone" in process.exit.reason
    assert not container.broken_because
    container.let_go()


@in_virtual_time
async def test_container_whose_agent_fails_during_adoption_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a usable container without its processes; and a silent agent costs the start one time-out, not one each."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    for name in ("p", "q", "r"):
        await core.processes.start("box", ProcessSpec(path="sleep", id=name, args=("1000",)))
    asked: list[str] = []

    async def refuse(_: FakeBackend, handle: str, row: ProcessRow, spec: ProcessSpec) -> Any:
        asked.append(row.id)
        raise errors.ContainerBroken(handle, "its agent gave no answer in 10 s")

    monkeypatch.setattr(FakeBackend, "adopt_process", refuse)
    core = await server.start()
    assert core.containers.get("box").state is State.BROKEN
    assert "no answer" in core.containers.get("box").state_reason
    assert len(asked) == 1


@in_virtual_time
async def test_broken_container_goes_after_its_grace_time_also_after_a_restart() -> None:
    """Nobody uses it and nobody can; its address and its user ids are wanted."""
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box", grace_time_s=60))
    del server.host.containers["box"]
    core = await server.start()
    assert core.containers.get("box").state is State.BROKEN
    await asyncio.sleep(61)
    with pytest.raises(errors.ContainerNotFound):
        core.containers.get("box")
