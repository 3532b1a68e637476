"""The server's connections: accepting them on the inherited socket, framed requests in, frames out."""

from __future__ import annotations

import _socket
import posix

from garden_py import wire
from garden_py.agent.loop import READABLE, WRITABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from garden_py.agent.loop import Loop
    from garden_py.wire import Value

MAX_CONNECTIONS = 4
MAX_QUEUED_BYTES = 4 << 20
_RECEIVE_BYTES = 64 << 10
_FD_BYTES = 4  # an int in a SCM_RIGHTS message, unix(7)
_DESCRIPTOR_SPACE = _socket.CMSG_SPACE(wire.MAX_FDS * _FD_BYTES)


class Connection:
    """One server. Bad bytes, or a peer that does not read, close this connection and nothing else."""

    def __init__(
        self,
        socket: _socket.socket,
        loop: Loop,
        on_frame: Callable[[Connection, wire.Frame, list[int]], None],
        on_close: Callable[[Connection], None],
    ) -> None:
        socket.setblocking(False)
        self._socket = socket
        self._loop = loop
        self._on_frame = on_frame
        self._on_close = on_close
        self._decoder = wire.Decoder()
        self._received_fds: list[int] = []
        self._queue: list[tuple[bytes, list[int]]] = []  # what to send, with descriptors owned by the queue
        self._queued_bytes = 0
        self.is_open = True
        loop.watch(socket.fileno(), READABLE, self._on_ready)

    def send(self, frame: bytes, fds: list[int]) -> None:
        """Send a frame with duplicates of `fds`, now or when the peer reads; `fds` stay the caller's."""
        if not self.is_open:
            return
        if not self._queue:
            rest = self._send_some(frame, fds)
            if rest is None or not rest:
                return
            # Descriptors travel with the first byte; what is left needs them only if nothing was sent.
            frame, fds = rest, fds if len(rest) == len(frame) else []
        if self._queued_bytes + len(frame) > MAX_QUEUED_BYTES:
            self.close()
            return
        self._queue.append((frame, [posix.dup(fd) for fd in fds]))
        self._queued_bytes += len(frame)
        self._loop.change(self._socket.fileno(), READABLE | WRITABLE)

    def close(self) -> None:
        """Close it and every descriptor in transit. Idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.forget(self._socket.fileno())
        self._socket.close()
        _close_all(self._received_fds)
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()
        self._on_close(self)

    def hand_over(self, keep: Callable[[int], int]) -> dict[str, Value]:
        """All there is to it, for `take_over` in the next program; `keep` is told every descriptor."""
        return {
            "fd": keep(self._socket.fileno()),
            "buffered": self._decoder.buffered,
            "fds": [keep(fd) for fd in self._received_fds],
            "queue": [[data, [keep(fd) for fd in fds]] for data, fds in self._queue],
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on where `hand_over` was called; the socket is the constructor's."""
        # What was buffered is less than a frame, so no frame comes out of this.
        tuple(self._decoder.feed(state["buffered"]))
        self._received_fds = state["fds"]
        self._queue = [(data, fds) for data, fds in state["queue"]]
        self._queued_bytes = sum(len(data) for data, _ in self._queue)
        if self._queue:
            self._loop.change(self._socket.fileno(), READABLE | WRITABLE)

    def _on_ready(self, events: int) -> None:
        if events & WRITABLE:
            self._flush()
        if self.is_open and events & ~WRITABLE:
            self._receive()

    def _send_some(self, data: bytes, fds: list[int]) -> bytes | None:
        """What could not be sent yet; None if the connection broke and was closed."""
        rights = b"".join(fd.to_bytes(_FD_BYTES, "little") for fd in fds)
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if fds else []
        try:
            sent = self._socket.sendmsg([data], ancillary, _socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return data
        except OSError:  # EPIPE, ECONNRESET: the server is gone; it comes back with a new connection
            self.close()
            return None
        return data[sent:]

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            rest = self._send_some(data, fds)
            if rest is None:
                return
            if len(rest) < len(data):
                _close_all(fds)
            self._queued_bytes -= len(data) - len(rest)
            if rest:
                self._queue[0] = (rest, fds)
                return
            del self._queue[0]
        self._loop.change(self._socket.fileno(), READABLE)

    def _receive(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _RECEIVE_BYTES, _DESCRIPTOR_SPACE, _socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, rights in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                self._received_fds += _parse_rights(rights)
        # MSG_CTRUNC: the peer attached more descriptors than any frame may have; the rest is lost.
        if not data or flags & _socket.MSG_CTRUNC or len(self._received_fds) > 2 * wire.MAX_FDS:
            self.close()
            return
        try:
            for frame in self._decoder.feed(data):
                self._deliver(frame)
                if not self.is_open:
                    return
            if self._received_fds and not self._decoder.buffered:
                raise wire.WireError("descriptors without a frame")
        except wire.WireError:
            self.close()

    def _deliver(self, frame: wire.Frame) -> None:
        if frame.kind != wire.REQUEST or frame.nfds > len(self._received_fds):
            raise wire.WireError("not a request, or its descriptors are missing")
        fds, self._received_fds = self._received_fds[: frame.nfds], self._received_fds[frame.nfds :]
        try:
            self._on_frame(self, frame, fds)
        finally:
            _close_all(fds)


class Acceptor:
    """Accepts servers on the listening socket and keeps the open connections."""

    def __init__(
        self,
        listener: _socket.socket,
        loop: Loop,
        on_frame: Callable[[Connection, wire.Frame, list[int]], None],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._loop = loop
        self._on_frame = on_frame
        self.connections: list[Connection] = []
        loop.watch(listener.fileno(), READABLE, self._on_ready)

    def _on_ready(self, events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]  # what socket.accept() wraps
        except OSError:  # the peer left again, or no descriptor is free: nothing to serve now
            return
        if len(self.connections) >= MAX_CONNECTIONS:
            posix.close(fd)
            return
        self.add(fd)

    def add(self, fd: int) -> Connection:
        """Serve a connected socket, which is owned from here on."""
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        connection = Connection(socket, self._loop, self._on_frame, on_close=self.connections.remove)
        self.connections.append(connection)
        return connection

    def broadcast(self, frame: bytes) -> None:
        """Send to every connection; one that cannot take it is closed on the way."""
        for connection in tuple(self.connections):
            connection.send(frame, [])


def _parse_rights(rights: bytes) -> list[int]:
    whole = len(rights) - len(rights) % _FD_BYTES
    return [int.from_bytes(rights[at : at + _FD_BYTES], "little") for at in range(0, whole, _FD_BYTES)]


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        posix.close(fd)
    fds.clear()
