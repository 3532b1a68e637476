"""Everything that can be found out about one container, as a tar of small files.

No part can spoil the others: all are read at the same time, each until its deadline, and what cannot be had is told in
the last file. So it works for containers whose agent is gone and for those the kernel does not let go.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from garden_py.model.codec import dump_container_spec, dump_exit, dump_process_spec
from garden_py.model.errors import ContainerNotFound, GardenError
from garden_py.model.process import OutputStream
from garden_py.model.redact import scrub, secrets_of, without_secrets
from garden_py.service.events import Event, EventHub
from garden_py.service.expiry import Expiry
from garden_py.service.ports import Backend, Clue
from garden_py.service.registry import Container, ProcessEntry, Registry

_DEADLINE_S = 6.0
_PART_MAX_BYTES = 2 << 20
SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class Part:
    """What became of one clue: what it says, or why it says nothing; in `took_ms` milliseconds."""

    name: str
    data: bytes
    problem: str
    took_ms: float


class Diagnosis:
    """Collects what there is to be found.

    Args:
        log_of: the latest log lines about a handle.
        version: of the server.
        deadline_s: of each part.
    """

    def __init__(
        self,
        backend: Backend,
        registry: Registry,
        events: EventHub,
        expiry: Expiry,
        log_of: Callable[[str], str],
        version: str,
        deadline_s: float = _DEADLINE_S,
    ) -> None:
        self._backend = backend
        self._registry = registry
        self._events = events
        self._expiry = expiry
        self._log_of = log_of
        self._version = version
        self._deadline_s = deadline_s

    async def collect(self, handle: str) -> AsyncGenerator[bytes, None]:
        """A tar in pieces, one of which may be as large as a part.

        Raises:
            ContainerNotFound.
        """
        container = self._registry.find(handle)
        if container is None:
            raise ContainerNotFound(handle)
        with self._expiry.use(container):
            async with aclosing(self._collect(container)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _collect(self, container: Container) -> AsyncGenerator[bytes, None]:
        handle = container.handle
        clues = [*self._own_clues(container), *self._backend.clues(handle, container.facts)]
        secrets = _secrets(container)
        began_ns = time.time_ns()
        reading = [asyncio.ensure_future(self._read(clue, secrets)) for clue in clues]
        directory, told = f"garden-{handle}", []
        try:
            for each in reading:
                part = await each
                told.append(
                    {
                        "name": part.name,
                        "bytes": len(part.data),
                        "took_ms": part.took_ms,
                        "problem": part.problem,
                    }
                )
                if part.data or not part.problem:
                    yield _member(f"{directory}/{part.name}", part.data, began_ns)
        finally:
            for each in reading:
                each.cancel()
        summary = {"handle": handle, "server": self._version, "began_ns": began_ns, "parts": told}
        yield _member(f"{directory}/{SUMMARY}", _json(summary), began_ns)
        yield bytes(2 * tarfile.BLOCKSIZE)  # the end of a tar

    async def _read(self, clue: Clue, secrets: list[bytes]) -> Part:
        """One part. A reader that does not end is told to, and not waited for: it may hang where nothing reaches it."""
        began = time.monotonic()
        task = asyncio.ensure_future(_read_scrubbed(clue, secrets))
        try:
            await asyncio.wait([task], timeout=self._deadline_s)
        finally:
            task.cancel()
        data, problem = b"", ""
        if not task.done() or task.cancelled():
            problem = f"not read in {self._deadline_s:g} s"
            task.add_done_callback(_look_away)
        elif (error := task.exception()) is not None:
            problem = str(error) if isinstance(error, GardenError | OSError) else repr(error)
        else:
            data, length = task.result()
            problem = f"cut: there were {length} bytes" if length > _PART_MAX_BYTES else ""
        problem = scrub(problem.encode(errors="replace"), secrets).decode(errors="replace")
        return Part(clue.name, data, problem, round((time.monotonic() - began) * 1000, 1))

    def _own_clues(self, container: Container) -> list[Clue]:
        handle, backend = container.handle, self._backend

        async def usage() -> bytes:
            return _json(asdict(await backend.usage(handle)))

        async def limits() -> bytes:
            return _json(asdict(await backend.limits(handle)))

        async def egress() -> bytes:
            rules = container.spec.egress.rules if container.spec.egress else ()
            return _json(asdict(await backend.egress_counts(handle, len(rules))))

        def now(say: Callable[[], Any]) -> Callable[[], Awaitable[bytes]]:
            async def read() -> bytes:
                said = say()
                return said.encode() if isinstance(said, str) else _json(said)

            return read

        return [
            Clue("container.json", now(lambda: _describe(container))),
            Clue(
                "processes.json",
                now(lambda: [_describe_process(each) for each in container.processes.values()]),
            ),
            Clue("events.jsonl", now(lambda: _lines(map(_describe_event, self._events.kept_about(handle))))),
            Clue("log.jsonl", now(lambda: self._log_of(handle))),
            Clue("server.json", now(self._describe_server)),
            Clue("usage.json", usage),
            Clue("limits.json", limits),
            Clue("egress.json", egress),
        ]

    def _describe_server(self) -> dict[str, Any]:
        return {
            "version": self._version,
            "capacity": asdict(self._backend.capacity()),
            "pools": {name: asdict(level) for name, level in self._backend.pools().items()},
            "containers": len(self._registry),
        }


async def _read_scrubbed(clue: Clue, secrets: list[bytes]) -> tuple[bytes, int]:
    """What a clue says, cut to its largest size and without secrets, and how long it was before."""
    data = await clue.read()
    return await asyncio.to_thread(scrub, data[:_PART_MAX_BYTES], secrets), len(data)


def _secrets(container: Container) -> list[bytes]:
    specs = [entry.process.spec for entry in container.processes.values()]
    return secrets_of([*container.spec.env, *(each for spec in specs for each in spec.env)])


def _describe(container: Container) -> dict[str, Any]:
    return {
        "handle": container.handle,
        "state": container.state.value,
        "state_reason": container.state_reason,
        "request_id": container.request_id,
        "created_ns": container.created_ns,
        "spec": without_secrets(dump_container_spec(container.spec)),
        "facts": container.facts,
        "uses": container.uses,
        "recovering": container.recovering,
        "fetching": container.fetching,
        "being_changed": container.changing.locked(),
        "destroy_tries": container.destroy_tries,
        "notable": container.notable,
    }


def _describe_process(entry: ProcessEntry) -> dict[str, Any]:
    process = entry.process
    outputs = {stream: process.output(stream) for stream in OutputStream}
    return {
        "id": process.id,
        "pid": process.pid,
        "request_id": entry.request_id,
        "started_ns": process.started_ns,
        "exit": None if process.exit is None else dump_exit(process.exit),
        "spec": without_secrets(dump_process_spec(process.spec)),
        "stdin_bytes": process.stdin_bytes,
        "output": {
            stream.name.lower(): {"first": log.first_offset, "end": log.end_offset, "closed": log.closed}
            for stream, log in outputs.items()
        },
    }


def _describe_event(event: Event) -> dict[str, Any]:
    return {
        "cursor": event.cursor,
        "at_ns": event.at_ns,
        "kind": event.kind.value,
        "process_id": event.process_id,
        "exit": None if event.exit is None else dump_exit(event.exit),
        "details": event.details,
    }


def _lines(values: Any) -> str:
    return "".join(f"{json.dumps(value, default=str)}\n" for value in values)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, default=str).encode() + b"\n"


def _member(name: str, data: bytes, at_ns: int) -> bytes:
    """One file of a tar, padded to its block size. Source: tar(5)."""
    head = tarfile.TarInfo(name)
    head.size, head.mode, head.mtime = len(data), 0o600, at_ns // 1_000_000_000
    out = io.BytesIO()
    out.write(head.tobuf(tarfile.PAX_FORMAT))
    out.write(data)
    out.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return out.getvalue()


def _look_away(task: asyncio.Future[tuple[bytes, int]]) -> None:
    """Its end, whenever it comes, is nobody's affair any more."""
    if not task.cancelled():
        task.exception()
