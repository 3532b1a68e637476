"""Request and reply over a unix socket in wire frames, with descriptors; asyncio side and plain side."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from garden_py import wire
from garden_py.observe.apart import apart

_RECEIVE_BYTES = 64 << 10  # also bounds how long the frames of one turn take to decode
_SEND_PATIENCE_S = 5.0
_AT_ONCE_BYTES = 4096
_CMSG_SPACE = socket.CMSG_SPACE(wire.MAX_FDS * array.array("i").itemsize)


OTHER_SIDE_CLOSED = "the other side closed the connection"
"""Why a link has ended that the other side has closed, most likely by ending."""


class LinkClosed(Exception):
    """The other side is gone or broke the protocol; the message says which."""


class RequestRefused(Exception):
    """The other side answered with an error frame.

    Attributes:
        code: its stable code.
        data: the whole error: code, message and further facts.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(str(data.get("message", ""))[:4096] or "no message")
        self.code = str(data.get("code", "internal"))[:64]
        self.data = data


@dataclass(slots=True)
class Reply:
    """A reply's value and the descriptors that came with it; whoever takes them closes them."""

    value: dict[str, Any]
    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        """Close every descriptor that nobody has taken."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def receive_frames(sock: socket.socket, decoder: wire.Decoder, fds: deque[int]) -> list[wire.Frame] | None:
    """One recvmsg: the frames it completes, descriptors appended to fds; None at end of file.

    Raises:
        wire.WireError, OSError (BlockingIOError included).
    """
    data, ancillary, _, _ = sock.recvmsg(_RECEIVE_BYTES, _CMSG_SPACE, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            fds.extend(numbers)
    if not data:
        return None
    return list(decoder.feed(data))


def take_fds(frame: wire.Frame, fds: deque[int]) -> list[int]:
    """The descriptors that travelled with frame.

    Raises:
        wire.WireError: fewer arrived than the frame announces.
    """
    if frame.nfds > len(fds):
        raise wire.WireError(f"frame announces {frame.nfds} descriptors, {len(fds)} arrived")
    return [fds.popleft() for _ in range(frame.nfds)]


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class FramedLink:
    """The asking side: many requests in flight over one non-blocking socket.

    Nothing the other side sends can make it raise in the event loop, wait, or hold more than one frame and
    `wire.MAX_FDS` descriptors per frame: a peer that breaks the protocol is disconnected.

    Args:
        sock: connected; owned from here on.
        on_event: called with each event's value.
        on_close: called once with the reason when the link ends by itself.
        unasked_max: how many frames may come that no request is waiting for, i.e. events and answers that come too
            late; each request allows two more, but never more than this at a time. None: any number.

    Attributes:
        heard_at: when the other side has last sent a frame, in the event loop's time.
        limits: see wire.Decoder.limits; the largest payloads that are accepted.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_close: Callable[[str], None] | None = None,
        unasked_max: int | None = None,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._on_close = on_close
        self._decoder = wire.Decoder()
        self._fds: deque[int] = deque()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._next_id = 1
        self._send_lock = asyncio.Lock()
        self._closed_because = ""
        self._unasked_max = self._unasked = unasked_max if unasked_max is not None else sys.maxsize
        self.heard_at = self._loop.time()
        self.limits = self._decoder.limits
        apart(self._loop.add_reader, sock, self._readable)

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return not self._closed_because

    async def request(
        self,
        value: dict[str, Any],
        fds: list[int] | None = None,
        *,
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> Reply:
        """Send a request and wait for its reply. The caller keeps its own copies of fds.

        Args:
            value: what is asked.
            fds: sent along.
            timeout_s: how long to wait for the answer.
            meanwhile: called when the request is on its way; what it raises ends the waiting.

        Raises:
            RequestRefused: an error frame came back.
            LinkClosed: the link ended first.
            TimeoutError: no answer in timeout_s seconds.
        """
        if self._closed_because:
            raise LinkClosed(self._closed_because)
        number = self._next_id
        self._next_id = number % 0xFFFF_FFFF + 1
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting[number] = future
        self._unasked = min(self._unasked + 2, self._unasked_max)
        try:
            async with asyncio.timeout(timeout_s):
                frame = wire.encode_frame(wire.REQUEST, number, value, len(fds or ()))
                if not self._send_at_once(frame, fds or []):
                    await self._send_whole(frame, fds or [])
                if meanwhile is not None:
                    meanwhile()
                return await future
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled() and future.exception() is None and self._abandoned():
                future.result().close_fds()

    def _abandoned(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def _send_at_once(self, data: bytes, fds: list[int]) -> bool:
        """Send a small frame without a turn of the event loop; False if it has to wait for its turn or for room.

        A unix stream socket takes what fits one buffer as a whole or not at all (unix_stream_sendmsg in net/unix).
        """
        if len(data) > _AT_ONCE_BYTES or self._send_lock.locked():
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._sock.sendmsg([data], rights)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(f"sending failed: {error.strerror}")
            raise LinkClosed(self._closed_because) from error
        if sent != len(data):
            self._end("a frame was cut")
            raise LinkClosed(self._closed_because)
        return True

    async def _send_whole(self, data: bytes, fds: list[int]) -> None:
        """Send a frame to its end even if the asker leaves meanwhile: half a frame would garble all that follow."""
        sending = asyncio.ensure_future(self._send(data, fds))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait([sending], timeout=_SEND_PATIENCE_S)
            if not sending.done():
                self._end("the other side does not read")
            raise

    async def _send(self, data: bytes, fds: list[int]) -> None:
        async with self._send_lock:
            view = memoryview(data)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            while view:
                try:
                    sent = self._sock.sendmsg([view], rights)
                except BlockingIOError:
                    await self._writable()
                    continue
                except OSError as error:
                    self._end(f"sending failed: {error.strerror}")
                    raise LinkClosed(self._closed_because) from error
                view, rights = view[sent:], []

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._sock, partial(_finish, ready))
        try:
            await ready
        finally:
            if self.is_open:
                self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        try:
            frames = receive_frames(self._sock, self._decoder, self._fds)
            if frames is None:
                self._end(OTHER_SIDE_CLOSED)
                return
            for frame in frames:
                self._dispatch(frame, take_fds(frame, self._fds))
            if len(self._fds) > wire.MAX_FDS:
                raise wire.WireError("descriptors without a frame")
        except BlockingIOError:
            return
        except wire.WireError as error:
            self._end(f"protocol violation: {error}")
        except OSError as error:
            self._end(f"receiving failed: {error.strerror}")

    def _dispatch(self, frame: wire.Frame, fds: list[int]) -> None:
        if self._closed_because:  # by the frame before
            Reply({}, fds).close_fds()
            return
        reply = Reply(frame.value, fds)
        self.heard_at = self._loop.time()
        if frame.kind == wire.EVENT:
            reply.close_fds()
            self._count_unasked()
            if self._on_event is not None:
                # Not called from here: should it raise, the frames behind it still find their descriptors.
                self._loop.call_soon(self._on_event, frame.value)
            return
        future = self._waiting.get(frame.id)
        if future is None or future.done():
            reply.close_fds()  # the asker has left
            self._count_unasked()
        elif frame.kind == wire.REPLY:
            future.set_result(reply)
        else:
            reply.close_fds()
            future.set_exception(RequestRefused(frame.value))

    def _count_unasked(self) -> None:
        self._unasked -= 1
        if self._unasked < 0:
            raise wire.WireError("more frames than anybody asked for")

    def fail(self, reason: str) -> None:
        """End the link as if the other side had, with a reason for `on_close`."""
        self._end(reason)

    def close(self) -> None:
        """Close the link; requests under way fail with LinkClosed. Twice is fine."""
        self._on_close = None
        self._end("closed")

    def _end(self, reason: str) -> None:
        if self._closed_because:
            return
        self._closed_because = reason
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkClosed(reason))
        if self._on_close is not None:
            self._on_close(reason)
