"""A backend with what a service would give it: events that are listened to and facts that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from garden_py.model.codec import dump_container_spec, dump_exit, dump_process_spec
from garden_py.model.connection import Connection
from garden_py.model.errors import ContainerBroken
from garden_py.model.handle import make_name
from garden_py.model.lifecycle import State
from garden_py.model.netrule import EgressPolicy
from garden_py.model.process import OutputStream, ProcessSpec
from garden_py.model.spec import ContainerSpec
from garden_py.service.ports import (
    Backend,
    BackendEvents,
    ContainerRow,
    OutOfMemory,
    OutputLog,
    ProcessRow,
    RunningProcess,
)
from kit.patience import FACTOR

PATIENCE_S = 20.0 * FACTOR


@dataclass
class Heard:
    """What a backend has reported by itself."""

    exits: list[tuple[str, str]] = field(default_factory=list)
    out_of_memory: list[tuple[str, OutOfMemory]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    connections: list[tuple[str, Connection]] = field(default_factory=list)

    def events(self) -> BackendEvents:
        return BackendEvents(
            process_exited=lambda handle, process: self.exits.append((handle, process.id)),
            out_of_memory=lambda handle, killed: self.out_of_memory.append((handle, killed)),
            broken=lambda handle, reason: self.broken.append((handle, reason)),
            connection=lambda handle, connection: self.connections.append((handle, connection)),
        )


@dataclass
class Stage:
    """One backend under test, and the records of what was made with it.

    Args:
        make: a new backend on the same host, as after a restart of the server.
    """

    make: Callable[[], Backend]
    backend: Backend
    heard: Heard = field(default_factory=Heard)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    specs: dict[str, ContainerSpec] = field(default_factory=dict)
    started: dict[str, list[RunningProcess]] = field(default_factory=dict)

    def recorder(self, handle: str) -> Callable[[dict[str, Any]], None]:
        return lambda facts: self.facts.__setitem__(handle, facts)

    async def create(self, handle: str = "", **fields: Any) -> str:
        """Make a container; its handle."""
        spec = full_spec(handle or f"contract-{make_name()[:8]}", **fields)
        self.specs[spec.handle] = spec
        await self.backend.create(spec, self.recorder(spec.handle), lambda progress: None)
        return spec.handle

    async def destroy(self, handle: str) -> None:
        await self.backend.destroy(handle, self.facts.get(handle, {}))

    async def start(self, handle: str, *argv: str, **fields: Any) -> RunningProcess:
        """Start a program with an id of its own."""
        env = fields.pop("all_env", fields.get("env", ()))
        record: Callable[[], None] = fields.pop("record", lambda: None)
        spec = ProcessSpec(path=argv[0], args=argv[1:], **{"id": make_name(), **fields})
        process = await self.backend.start_process(handle, spec, env, record)
        self.started.setdefault(handle, []).append(process)
        return process

    async def restart(self) -> dict[str, str]:
        """Close the backend and open another over the same records; what it could not take over."""
        await self.backend.close()
        self.backend = self.make()
        self.heard = Heard()
        rows = [
            ContainerRow(handle, State.ACTIVE, "", "", 1, dump_container_spec(self.specs[handle]), facts)
            for handle, facts in self.facts.items()
        ]
        await self.backend.open(self.heard.events(), rows)
        lost: dict[str, str] = {}
        for row in rows:
            try:
                await self.backend.adopt(row)
            except ContainerBroken as error:
                lost[row.handle] = error.reason
        return lost

    async def adopt(self, handle: str, process: RunningProcess) -> RunningProcess:
        """The process as the backend after a restart has it."""
        exit_ = None if process.exit is None else dump_exit(process.exit)
        spec = dump_process_spec(process.spec)
        row = ProcessRow(handle, process.id, "", process.started_ns, process.pid, spec, exit_)
        return await self.backend.adopt_process(handle, row, process.spec)

    async def clear(self) -> None:
        """Destroy everything and close."""
        for handle, facts in self.facts.items():
            await self.backend.destroy(handle, facts)
        await self.backend.close()


def full_spec(handle: str, **fields: Any) -> ContainerSpec:
    """A spec as the service hands it over: handle, hostname and egress are filled in."""
    spec = ContainerSpec(handle=handle, hostname=handle[-49:], **fields)
    return spec if spec.egress is not None else replace(spec, egress=EgressPolicy())


async def read_all(log: OutputLog, offset: int = 0) -> bytes:
    """A stream from offset until it is closed."""
    reader = log.open_reader(offset)
    try:
        async with asyncio.timeout(PATIENCE_S):
            found = bytearray()
            while data := await reader.read(1 << 16):
                found += data
            return bytes(found)
    finally:
        reader.close()


async def read_exactly(log: OutputLog, count: int) -> bytes:
    """The first count bytes of a stream."""
    reader = log.open_reader(0)
    try:
        async with asyncio.timeout(PATIENCE_S):
            found = bytearray()
            while len(found) < count:
                data = await reader.read(count - len(found))
                assert data, f"the stream ended after {bytes(found)!r}"
                found += data
            return bytes(found)
    finally:
        reader.close()


async def output_of(process: RunningProcess) -> tuple[bytes, bytes]:
    """Everything that a process writes, by stream."""
    return await read_all(process.output(OutputStream.STDOUT)), await read_all(
        process.output(OutputStream.STDERR)
    )


async def exit_of(process: RunningProcess) -> tuple[int | None, int | None]:
    """Its end: (code, signal)."""
    async with asyncio.timeout(PATIENCE_S):
        status = await process.wait()
    return status.code, status.signal


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait, in small steps, until a condition that nothing announces has come true."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.005)


async def chunks_of(data: bytes, size: int = 4096) -> AsyncIterator[bytes]:
    """Data in pieces, as a client sends it."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
