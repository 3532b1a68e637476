"""The Garden door: where it listens, and what every request goes through."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from garden_py.api.address import check_garden_http
from garden_py.api.http.errors import describe
from garden_py.api.http.exchange import (
    Answer,
    BodyTooLarge,
    BrokenBody,
    Connection,
    Hijack,
    Reply,
    Request,
    json_reply,
)
from garden_py.api.http.fields import BadJson
from garden_py.api.http.handlers import GardenHandlers
from garden_py.api.http.routes import Match, NoMatch, match_route
from garden_py.api.unix_socket import socket_file
from garden_py.config import Config
from garden_py.model.errors import GardenError, HostFault, ShuttingDown
from garden_py.observe.calls import REQUEST_ID_HEADER, TRACE_HEADERS, begin_call
from garden_py.service.core import Core

log = structlog.get_logger()
_BACKLOG: Final = 1024
_STREAM_LIMIT: Final = 1 << 20
_IDLE_S: Final = 300.0
_STOP_GRACE_S: Final = 2.0
_LAST_ANSWER_S: Final = 0.5
_REQUEST_ID: Final = "X-Request-Id"
_NO_ROUTE: Final = "none"  # in the metrics: whatever else was asked for
_FIRST_FAILURE: Final = 400  # RFC 9110 §15


class GardenDoor:
    """Serves the Garden protocol on `config.garden_http`, if that is set."""

    def __init__(self, core: Core, config: Config) -> None:
        self._core = core
        self._config = config
        self._handlers = GardenHandlers(core, config)
        self._server: asyncio.Server | None = None
        self._bound_path: Path | None = None
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._stopping = False

    async def start(self) -> str:
        """Bind and serve; the address, empty if there is none.

        Raises:
            InvalidField: it is neither unix:PATH nor HOST:PORT, or others could reach it and nobody said they may.
            HostFault: it cannot be bound.
        """
        address = self._config.garden_http
        if not address:
            return ""
        try:
            if address.startswith("unix:"):
                self._server = await self._listen_unix(Path(address.removeprefix("unix:")))
            else:
                self._server = await self._listen_tcp(address)
        except OSError as error:
            raise HostFault("listen", f"cannot bind {address} for Garden clients: {error}") from error
        return address

    async def _listen_unix(self, path: Path) -> asyncio.Server:
        mode, group = self._config.garden_http_socket_mode, self._config.garden_http_group
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with socket_file(path, mode=mode, group=group, fields=("garden_http", "garden_http_group")):
                sock.bind(os.fspath(path))
        except BaseException:
            sock.close()
            raise
        self._bound_path = path
        return await asyncio.start_unix_server(self._accept, sock=sock, backlog=_BACKLOG, limit=_STREAM_LIMIT)

    async def _listen_tcp(self, address: str) -> asyncio.Server:
        check_garden_http(self._config)
        host, _, port = address.rpartition(":")
        return await asyncio.start_server(
            self._accept, host.strip("[]"), int(port), backlog=_BACKLOG, limit=_STREAM_LIMIT
        )

    async def stop(self) -> None:
        """As the protocol's §6.6 says: requests under way are finished, Run and Attach end without a last message."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
            self._server = None
        self._handlers.controls.stop()
        for task, connection in self._connections.items():
            connection.is_last = True
            if connection.is_idle:
                task.cancel()
        # Those whose requests take longer are told so, as far as they listen.
        for timeout_s in (_STOP_GRACE_S, _LAST_ANSWER_S, None):
            if self._connections:
                await asyncio.wait(self._connections, timeout=timeout_s)
            for task in list(self._connections):
                task.cancel()
        if self._bound_path is not None:
            self._bound_path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Run connections are quiet for weeks: only so a client that is gone without a word is noticed (tcp(7)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        connection = Connection(
            reader,
            writer,
            self._answer,
            head_timeout_s=self._config.read_header_timeout_s,
            idle_timeout_s=_IDLE_S,
        )
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection
        try:
            await connection.serve()
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        finally:
            del self._connections[task]
            writer.close()

    # --- one request

    async def _answer(self, request: Request) -> Answer:
        """Route, log, and make every error a reply."""
        started = time.monotonic()
        match = match_route(request.method, request.target)
        if isinstance(match, NoMatch):
            return self._counted(_NO_ROUTE, _no_route(match), started)
        handle = match.captures.get("handle", "")
        trace = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        request_id = begin_call(_given_id(request), handle, trace)  # a hijacked connection goes on under it
        answer = await self._do(match, request, handle, started)
        if not isinstance(answer, Hijack):  # its head is written by the protocol's letter
            answer = replace(answer, headers=(*answer.headers, (_REQUEST_ID, request_id)))
        return self._counted(match.name, answer, started)

    async def _do(self, match: Match, request: Request, handle: str, started: float) -> Answer:
        name = match.name
        try:
            await self._core.recovery.wait_for(handle)
            answer = await self._handlers.route(name)(match, request)
        except (GardenError, BadJson, BodyTooLarge, BrokenBody) as error:
            report = log.warning if isinstance(error, HostFault) else log.debug
            report("garden.refused", route=name, error=str(error), took_ms=_ms_since(started))
            return _refusal(error)
        except ConnectionError:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopping or task is None:
                raise
            task.uncancel()
            log.warning("garden.cut_short", route=name, took_ms=_ms_since(started))
            return _refusal(ShuttingDown())
        except Exception as error:
            log.exception("garden.failed", route=name, took_ms=_ms_since(started))
            return _refusal(error)
        log.debug("garden.done", route=name, took_ms=_ms_since(started))
        return answer

    def _counted(self, route: str, answer: Answer, started: float) -> Answer:
        metrics, status = self._core.metrics, answer.status
        metrics.garden_requests.labels(route, str(status)).inc()
        if status < _FIRST_FAILURE:
            metrics.garden_seconds.labels(route).observe(time.monotonic() - started)
        return answer


def _given_id(request: Request) -> str:
    """The caller's id of the request, under our name for it or Cloud Foundry's."""
    return request.headers.get(REQUEST_ID_HEADER, "") or request.headers.get("x-vcap-request-id", "")


def _refusal(error: Exception) -> Reply:
    told = describe(error)
    return json_reply(told.as_json(), told.status)


def _no_route(match: NoMatch) -> Reply:
    """§1.1, statement 11."""
    kind, nosniff = "text/plain; charset=utf-8", ("X-Content-Type-Options", "nosniff")
    if match.allowed:
        return Reply(405, b"Method Not Allowed\n", kind, (("Allow", ", ".join(match.allowed)), nosniff))
    return Reply(404, b"404 page not found\n", kind, (nosniff,))


def _ms_since(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 2)
