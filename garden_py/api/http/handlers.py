"""What each route of the Garden protocol does: decode, one verb of the service, encode. Names as in routes.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import structlog

from garden_py.api.http import decode, encode
from garden_py.api.http.attachments import Attachment, Attachments
from garden_py.api.http.control import Controls, linger
from garden_py.api.http.errors import describe
from garden_py.api.http.exchange import Answer, BrokenOff, Hijack, Reply, Request, Stream, json_reply
from garden_py.api.http.fields import BadJson, as_fields, parse_object, parse_value, read_list
from garden_py.api.http.routes import Match
from garden_py.config import Config
from garden_py.model.errors import CopyFailed, GardenError, ProcessExited, ProcessNotFound, PropertyNotFound
from garden_py.model.process import OutputStream
from garden_py.service.core import Core
from garden_py.service.ports import NetworkFacts
from garden_py.service.registry import Container

log = structlog.get_logger()
Route: TypeAlias = Callable[[Match, Request], Awaitable[Answer]]
_NOTHING: Any = {}
_OFFSETS = {OutputStream.STDOUT: "stdout_offset", OutputStream.STDERR: "stderr_offset"}


class GardenHandlers:
    """Answers of one door. Errors leave as exceptions; door.py makes them replies."""

    def __init__(self, core: Core, config: Config) -> None:
        self._core = core
        self._containers_dir = config.state_dir / "containers"
        self._body_max = config.max_message_bytes
        self.attachments = Attachments(remember=not config.no_attach_cursor, metrics=core.metrics)
        self.controls = Controls(core.processes, self.attachments, core.metrics)

    def route(self, name: str) -> Route:
        """The method of a route."""
        found: Route = getattr(self, name)
        return found

    async def _json(self, request: Request) -> Any:
        return parse_value(await request.body(self._body_max))

    def _network(self, handle: str) -> NetworkFacts:
        try:
            return self._core.backend.facts_of_network(handle)
        except GardenError:  # it is being made, destroyed, or broken: nothing of it is up
            return NetworkFacts()

    def _properties(self, container: Container) -> dict[str, str]:
        return encode.properties_of(container, self._network(container.handle))

    # --- the server

    async def ping(self, match: Match, request: Request) -> Answer:
        """Route 1."""
        return json_reply(_NOTHING)

    async def capacity(self, match: Match, request: Request) -> Answer:
        """Route 2."""
        await self._core.backend.capacity_told()
        host, most, _ = self._core.containers.capacity()
        return json_reply(encode.capacity_json(host, most))

    # --- containers

    async def list_containers(self, match: Match, request: Request) -> Answer:
        """Route 3."""
        shown = [
            container.handle
            for container in self._core.registry
            if encode.matches(self._properties(container), match.query)
        ]
        return json_reply({"Handles": shown})

    async def create(self, match: Match, request: Request) -> Answer:
        """Route 4."""
        fields = parse_object(await request.body(self._body_max))
        spec = decode.container_spec(fields, self._core.default_egress)
        return json_reply({"Handle": (await self._core.containers.create(spec)).handle})

    async def info(self, match: Match, request: Request) -> Answer:
        """Route 5."""
        return json_reply(self._describe(self._core.containers.get(match.captures["handle"])))

    def _describe(self, container: Container) -> dict[str, Any]:
        handle = container.handle
        return encode.info_json(container, self._network(handle), str(self._containers_dir / handle))

    async def bulk_info(self, match: Match, request: Request) -> Answer:
        """Route 6; one entry per asked handle, and no grace timer is touched."""

        async def look(handle: str) -> dict[str, Any]:
            return self._describe(self._core.registry.get(handle))

        return json_reply(await self._bulk(match, "Info", encode.EMPTY_INFO, look))

    async def bulk_metrics(self, match: Match, request: Request) -> Answer:
        """Route 7."""
        return json_reply(await self._bulk(match, "Metrics", encode.EMPTY_METRICS, self._metrics))

    async def _bulk(
        self,
        match: Match,
        name: str,
        empty: dict[str, Any],
        look: Callable[[str], Awaitable[dict[str, Any]]],
    ) -> dict[str, Any]:
        """One entry per asked handle, all looked at at the same time (§2.8)."""
        handles = list(dict.fromkeys(filter(None, match.query.get("handles", "").split(","))))
        if handles:
            await self._core.recovery.wait_for_many(handles)
        results = await asyncio.gather(*map(look, handles), return_exceptions=True)
        return {handle: _entry(name, empty, result) for handle, result in zip(handles, results, strict=True)}

    async def metrics(self, match: Match, request: Request) -> Answer:
        """Route 28."""
        handle = match.captures["handle"]
        with self._core.processes.use(handle):
            return json_reply(await self._metrics(handle))

    async def _metrics(self, handle: str) -> dict[str, Any]:
        container = self._core.registry.find(handle)
        if container is None and (found := self._core.processes.find_sidecar(handle)) is not None:
            owner, process = found
            try:
                usage = await self._core.containers.usage_of_process(owner, process.id)
            except ProcessExited as error:  # in this protocol there are no metrics of what is not there
                raise ProcessNotFound(owner, process.id) from error
            return encode.sidecar_metrics_json(process, usage)
        usage = await self._core.containers.usage_of_container(handle)
        container = self._core.registry.get(handle)
        return encode.metrics_json(container, usage, self._core.containers.entitlement)

    async def destroy(self, match: Match, request: Request) -> Answer:
        """Route 8."""
        await self._core.containers.destroy(match.captures["handle"], joins=False)
        return json_reply(_NOTHING)

    async def stop(self, match: Match, request: Request) -> Answer:
        """Route 9."""
        kill = parse_object(await request.body(self._body_max)).flag("kill")
        await self._core.containers.stop(match.captures["handle"], kill=kill)
        return json_reply(_NOTHING)

    async def set_grace_time(self, match: Match, request: Request) -> Answer:
        """Route 23."""
        grace_s = decode.grace_time_s(await self._json(request))
        self._core.containers.set_grace_time(match.captures["handle"], grace_s)
        return json_reply(_NOTHING)

    # --- files

    async def stream_in(self, match: Match, request: Request) -> Answer:
        """Route 10."""
        query = match.query
        destination, user = query.get("destination") or ".", query.get("user", "")
        try:
            await self._core.files.stream_in(match.captures["handle"], destination, user, request.pieces())
        except CopyFailed as error:
            # Statement F3: clients look for these words.
            raise CopyFailed(error.reason, f"stream-in: error streaming in: {error}") from error
        return json_reply(_NOTHING)

    async def stream_out(self, match: Match, request: Request) -> Answer:
        """Route 11. What fails before the first byte is an ordinary error."""
        query = match.query
        pieces = self._core.files.stream_out(
            match.captures["handle"], query.get("source") or ".", query.get("user", "")
        )
        try:
            first = await anext(pieces)
        except StopAsyncIteration:
            return Reply(200, b"", "application/x-tar")
        except BaseException:
            await pieces.aclose()
            raise
        return Stream(_resumed(first, pieces))

    # --- limits

    async def bandwidth_limits(self, match: Match, request: Request) -> Answer:
        """Route 12; nothing where none was set (statement OL2)."""
        in_force = await self._core.containers.limits(match.captures["handle"])
        return json_reply(encode.bandwidth_limits_json(in_force))

    async def disk_limits(self, match: Match, request: Request) -> Answer:
        """Route 14: there are none (statement D6)."""
        self._core.containers.get(match.captures["handle"])
        return json_reply(_NOTHING)

    async def cpu_limits(self, match: Match, request: Request) -> Answer:
        """Route 13."""
        container = self._core.containers.get(match.captures["handle"])
        in_force = await self._core.containers.limits(container.handle)
        return json_reply(encode.cpu_limits_json(container.spec.limits, in_force))

    async def memory_limits(self, match: Match, request: Request) -> Answer:
        """Route 15."""
        return json_reply(
            encode.memory_limits_json(await self._core.containers.limits(match.captures["handle"]))
        )

    # --- network

    async def net_in(self, match: Match, request: Request) -> Answer:
        """Route 16."""
        mapping = decode.port_mapping(parse_object(await request.body(self._body_max)))
        mapped = await self._core.containers.map_port(match.captures["handle"], mapping)
        return json_reply({"host_port": mapped.host_port, "container_port": mapped.container_port})

    async def net_out(self, match: Match, request: Request) -> Answer:
        """Route 17."""
        rule = decode.egress_rule(parse_object(await request.body(self._body_max)))
        await self._core.containers.open_egress(match.captures["handle"], (rule,), bulk=False)
        return json_reply(_NOTHING)

    async def bulk_net_out(self, match: Match, request: Request) -> Answer:
        """Route 18."""
        value = await self._json(request)
        rules = read_list(value, "", lambda item, path: decode.egress_rule(as_fields(item, path)))
        await self._core.containers.open_egress(match.captures["handle"], rules)
        return json_reply(_NOTHING)

    # --- properties

    async def properties(self, match: Match, request: Request) -> Answer:
        """Route 24."""
        return json_reply(self._properties(self._core.containers.get(match.captures["handle"])))

    async def property(self, match: Match, request: Request) -> Answer:
        """Route 25."""
        handle, key = match.captures["handle"], match.captures["key"]
        found = self._properties(self._core.containers.get(handle))
        if key not in found:
            raise PropertyNotFound(handle, key)
        return json_reply({"value": found[key]})

    async def set_property(self, match: Match, request: Request) -> Answer:
        """Route 26."""
        value = parse_object(await request.body(self._body_max)).text("value")
        self._core.containers.update_properties(match.captures["handle"], {match.captures["key"]: value}, [])
        return json_reply(_NOTHING)

    async def remove_property(self, match: Match, request: Request) -> Answer:
        """Route 27; an absent one is as good as removed (statement PR2)."""
        self._core.containers.update_properties(match.captures["handle"], {}, [match.captures["key"]])
        return json_reply(_NOTHING)

    # --- processes

    async def run(self, match: Match, request: Request) -> Answer:
        """Route 21. The container is in use from here to the end of the control connection."""
        handle = match.captures["handle"]
        spec = decode.process_spec(parse_object(await request.body(self._body_max)))
        process = await self._core.processes.start(handle, spec)
        attachment = self.attachments.begin(handle, process, {}, fresh=True)
        return Hijack(201, partial(self._control, attachment))

    async def attach(self, match: Match, request: Request) -> Answer:
        """Route 22; `stdout_offset` and `stderr_offset` in the query say from where (docs/garden-compatibility.md)."""
        handle = match.captures["handle"]
        process = self._core.processes.get(handle, match.captures["pid"])
        given = {stream: _offset(match.query, name) for stream, name in _OFFSETS.items()}
        attachment = self.attachments.begin(handle, process, given, fresh=False)
        return Hijack(200, partial(self._control, attachment))

    async def _control(
        self, attachment: Attachment, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.controls.converse(attachment, reader, writer)
        await linger(reader)

    async def stdout(self, match: Match, request: Request) -> Answer:
        """Route 19."""
        return self._side(match, OutputStream.STDOUT)

    async def stderr(self, match: Match, request: Request) -> Answer:
        """Route 20."""
        return self._side(match, OutputStream.STDERR)

    def _side(self, match: Match, stream: OutputStream) -> Answer:
        captures = match.captures
        attachment = self.attachments.find(captures["streamid"], captures["handle"], captures["pid"])

        async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if attachment is not None:  # else it ends at once, without a word (§6.3, statement 13)
                await self.attachments.pour(attachment, stream, reader, writer)

        return Hijack(200, pour)


def _offset(query: dict[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise BadJson(f"{name}: {text!r} is no offset in bytes")
    return int(text)


async def _resumed(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        try:
            async for piece in rest:
                yield piece
        except GardenError as error:
            log.warning("garden.broken_off", error=str(error))
            raise BrokenOff from error


def _entry(name: str, empty: dict[str, Any], result: dict[str, Any] | BaseException) -> dict[str, Any]:
    if isinstance(result, dict):
        return {name: result, "Err": None}
    if not isinstance(result, GardenError):
        raise result
    return {name: empty, "Err": {**describe(result).as_json(), "Type": "", "Handle": ""}}
