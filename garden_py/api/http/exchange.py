"""One connection of the Garden door: requests one after the other, until it closes or a handler takes it over.

h11 reads and writes heads and bodies. A handler that answers with a hijack gets the bare streams: from its reply's head
on they carry what the protocol's §6 says, and h11 is out of the way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Final, TypeAlias

import h11

# Of a request's head. Go's net/http takes 1 MiB (DefaultMaxHeaderBytes); callers of this protocol need some hundred
# bytes, and each half-read head is memory that an unknown client takes.
HEAD_MAX_BYTES: Final = 64 << 10
READ_BYTES: Final = 64 << 10
# How long a client that still sends a body is listened to after its answer: a close at once could reset it away.
LINGER_S: Final = 0.5


class BodyTooLarge(Exception):
    """A body is larger than the server takes; the message says how large it may be."""


class Disconnected(Exception):
    """The client has gone."""


class BrokenBody(Exception):
    """A body breaks off or is no HTTP; the message says which."""


class BrokenOff(Exception):
    """The pieces of an answer cannot go on; the log has the reason."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An ordinary answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def json_reply(value: Any, status: int = 200) -> Reply:
    """A JSON value and a newline."""
    return Reply(status, json.dumps(value, separators=(",", ":")).encode() + b"\n")


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer whose body comes in pieces; its length is not known beforehand."""

    pieces: AsyncGenerator[bytes, None]
    content_type: str = "application/x-tar"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Hijack:
    """The handler goes on with the bare connection once the head is written."""

    status: int
    then: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


Answer: TypeAlias = Reply | Stream | Hijack


@dataclass(slots=True)
class Request:
    """A request whose head has been read."""

    method: str
    target: str
    headers: dict[str, str]
    _pieces: AsyncIterator[bytes] = field(repr=False)

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            BrokenBody: it breaks off, or is no HTTP.
            ConnectionError: the client has gone.
        """
        return self._pieces

    async def body(self, most: int) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: it is larger than most bytes.
            BrokenBody: it breaks off, or is no HTTP.
            ConnectionError: the client has gone.
        """
        too_large = BodyTooLarge(f"the body is larger than {most} bytes")
        if int(self.headers.get("content-length", "0")) > most:  # h11 has looked at it
            raise too_large
        found = bytearray()
        async for piece in self._pieces:
            found += piece
            if len(found) > most:
                raise too_large
        return bytes(found)


Handler: TypeAlias = Callable[[Request], Awaitable[Answer]]
_REASONS: Final = {
    200: "OK", 201: "Created", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    413: "Request Entity Too Large", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 505: "HTTP Version Not Supported",
}  # fmt: skip


class Connection:
    """Serves one client.

    Attributes:
        is_idle: no request is under way.
        is_last: no request is taken behind the one that is.

    Args:
        handle: answers requests; errors are its affair.
        head_timeout_s: from the first byte of a request to the end of its head; 0: any time.
        idle_timeout_s: how long a connection may be open without a request.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handle: Handler,
        *,
        head_timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._handle = handle
        self._head_timeout_s = head_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
        self.is_idle = True
        self.is_last = False

    async def serve(self) -> None:
        """Answer until one of both has had enough."""
        try:
            while await self._serve_one() and not self.is_last:
                self._http.start_next_cycle()
        except (Disconnected, BrokenOff, ConnectionError, TimeoutError):
            return
        finally:
            self._writer.close()

    async def _serve_one(self) -> bool:
        """One request; whether another may follow."""
        self.is_idle = True
        try:
            head = await self._read_head()
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            return False
        self.is_idle = False
        request = Request(
            head.method.decode(),
            head.target.decode("latin-1"),
            {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers},
            self._read_body(),
        )
        if self._http.they_are_waiting_for_100_continue:
            await self._write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
        answer = await self._handle(request)
        match answer:
            case Reply():
                await self._send_reply(answer, is_head=request.method == "HEAD")
            case Stream():
                await self._send_stream(answer)
            case Hijack():
                await self._give_away(answer)
                return False
        return await self._finish_request()

    # --- reading

    async def _read_head(self) -> h11.Request:
        """The next request's head. A client that has begun one must go on; before that it may rest."""
        deadline: float | None = None
        loop = asyncio.get_running_loop()
        while (event := self._http.next_event()) is h11.NEED_DATA:
            began = bool(self._http.trailing_data[0])
            if began and deadline is None and self._head_timeout_s:
                deadline = loop.time() + self._head_timeout_s
            async with asyncio.timeout_at(deadline if began else loop.time() + self._idle_timeout_s):
                self._http.receive_data(await self._reader.read(READ_BYTES))
        if not isinstance(event, h11.Request):
            raise Disconnected  # the client has closed the connection between two requests
        if not event.http_version.startswith(b"1."):
            raise h11.RemoteProtocolError("another HTTP", error_status_hint=505)
        # One that comes whole with its end is no incomplete event, whose bound h11 keeps.
        if len(event.target) + sum(len(name) + len(value) for name, value in event.headers) > HEAD_MAX_BYTES:
            raise h11.RemoteProtocolError("too long a head", error_status_hint=431)
        return event

    async def _read_body(self) -> AsyncIterator[bytes]:
        ended = False
        try:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    data = await self._reader.read(READ_BYTES)
                    ended = not data
                    self._http.receive_data(data)
                elif isinstance(event, h11.Data):
                    yield bytes(event.data)
                else:
                    return
        except h11.RemoteProtocolError as error:
            # A client that has only ended its sending half still learns what its request came to.
            raise BrokenBody("unexpected EOF" if ended else "malformed chunked encoding") from error

    async def _finish_request(self) -> bool:
        """After an answer: read what is left of the body for a moment; whether the connection is as good as new."""
        try:
            # What has come of it already, which for most requests is an end without a body.
            while self._http.their_state is h11.SEND_BODY and self._http.next_event() is not h11.NEED_DATA:
                pass
        except h11.RemoteProtocolError:
            return False
        if self._http.their_state is h11.SEND_BODY:
            if self._writer.can_write_eof():
                self._writer.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    with suppress(BrokenBody):
                        async for _ in self._read_body():
                            pass
            return False
        return bool(self._http.our_state is h11.DONE and self._http.their_state is h11.DONE)

    # --- writing

    async def _write(self, data: bytes | None) -> None:
        if data:
            self._writer.write(data)
            await self._writer.drain()

    async def _send_reply(self, reply: Reply, *, is_head: bool) -> None:
        headers = [
            ("Content-Type", reply.content_type),
            ("Date", formatdate(usegmt=True)),
            ("Content-Length", str(len(reply.body))),
            *reply.headers,
        ]
        head = h11.Response(status_code=reply.status, reason=_reason(reply.status), headers=headers)
        body = b"" if is_head else reply.body
        parts = (
            self._http.send(head),
            self._http.send(h11.Data(data=body)),
            self._http.send(h11.EndOfMessage()),
        )
        await self._write(b"".join(part or b"" for part in parts))

    async def _send_stream(self, stream: Stream) -> None:
        """What fails in the middle ends the connection without the last chunk, so that the reader notices."""
        headers = [
            ("Content-Type", stream.content_type),
            ("Date", formatdate(usegmt=True)),
            ("Transfer-Encoding", "chunked"),
            *stream.headers,
        ]
        await self._write(
            self._http.send(
                h11.Response(status_code=stream.status, reason=_reason(stream.status), headers=headers)
            )
        )
        async with aclosing(stream.pieces):  # a reader that leaves ends whoever writes
            async for piece in stream.pieces:
                await self._write(self._http.send(h11.Data(data=piece)))
        await self._write(self._http.send(h11.EndOfMessage()))

    async def _give_away(self, hijack: Hijack) -> None:
        """Chunked is announced, and raw messages follow: so the protocol is (§6.2)."""
        head = (
            f"HTTP/1.1 {hijack.status} {_reason(hijack.status).decode()}\r\nContent-Type: application/json\r\n"
            f"Date: {formatdate(usegmt=True)}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self._writer.write(head.encode())
        behind_request, _ = self._http.trailing_data  # is of the stream already
        await hijack.then(_Prepended(self._reader, behind_request), self._writer)

    async def _refuse(self, status: int) -> None:
        """Answer what is no HTTP as Go's net/http does."""
        text = f"{status} {_reason(status).decode()}"
        head = (
            f"HTTP/1.1 {text}\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n{text}"
        )
        await self._write(head.encode())


class _Prepended(asyncio.StreamReader):
    """A reader that first gives the bytes that were read already."""

    def __init__(self, rest: asyncio.StreamReader, first: bytes) -> None:
        super().__init__()
        self._rest = rest
        self._first = first

    async def read(self, n: int = -1) -> bytes:
        if self._first:
            data, self._first = self._first, b""
            return data
        return await self._rest.read(n)


def _reason(status: int) -> bytes:
    return _REASONS.get(status, "Error").encode()
