"""Accepts on a listening socket that somebody else owns and passes each connection on to the server's own socket.

Run as `python relay.py LISTENER_FD CONTROL_FD PATH`; a process of its own, with nothing but the standard library.
Why it exists: docs/decisions/0006-socket-activation.md.

    server                          relay                               client
      │ starts it, PATH listens       │                          connect, waits in the
      │                               │◄───────────────────────── listener's queue
      │◄──────────── connect to PATH ─┤ first: what the server cannot take stays in the queue
      │                               ├─ accept ─────────────────────►│
      │◄═════════ bytes ═════════════►│◄═════════ bytes ═════════════►│
      ├─ "stop" ─────────────────────►│ accepts no more
      │                               ├─ GOAWAY ─────────────────────►│ makes its next call on another
      │◄═════════ calls under way ═══►│◄══════════ end ══════════════►│ connection, in the listener's queue
      │◄─────────────────────── exit ─┤ when all connections have ended
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import sys
import time

CHUNK_BYTES = 256 << 10
_FRAME_HEADER_BYTES = 9  # of which the first three are the payload's length: RFC 9113 section 4.1
# Type 7 on stream 0: last stream id 2^31 - 1, NO_ERROR. "Make no new calls here; those under way go on."
# Source: RFC 9113 section 6.8, graceful shutdown.
GOAWAY = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000")
_FLUSH_S = 5.0
_RETRY_S = 0.01


class Frames:
    """Finds the ends of the HTTP/2 frames in what the server sends."""

    def __init__(self) -> None:
        self._header = b""
        self._left = 0

    @property
    def at_end(self) -> bool:
        """Whether everything so far was whole frames."""
        return not self._header and not self._left

    def pass_over(self, data: memoryview) -> int | None:
        """Go on by data; where in it the first frame ends, if one does."""
        position, first_end = 0, None
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                self._left -= step
            else:
                step = min(_FRAME_HEADER_BYTES - len(self._header), len(data) - position)
                self._header += bytes(data[position : position + step])
                if len(self._header) == _FRAME_HEADER_BYTES:
                    self._left = int.from_bytes(self._header[:3], "big")
                    self._header = b""
            position += step
            if first_end is None and self.at_end:
                first_end = position
        return first_end


class Flow:
    """One direction of a connection: what was received and not sent yet, and whether more will come.

    Args:
        frames: of the direction that a GOAWAY can be put into.
    """

    def __init__(self, source: socket.socket, target: socket.socket, frames: Frames | None = None) -> None:
        self.source = source
        self.target = target
        self.pending = memoryview(b"")
        self.ended = False
        self._frames = frames
        self._begun = False
        self._goaway_due = False

    def move(self, buffer: bytearray) -> None:
        """Receive and send as much as goes without waiting; OSError: the connection is broken."""
        while True:
            if not self.pending and (self.ended or not self._receive(buffer)):
                return
            try:
                sent = self.target.send(self.pending)
            except BlockingIOError:
                self.pending = memoryview(bytes(self.pending))  # the buffer is the next flow's
                return
            self.pending = self.pending[sent:]

    def _receive(self, buffer: bytearray) -> bool:
        try:
            count = self.source.recv_into(buffer)
        except BlockingIOError:
            return False
        if count == 0:
            self.ended = True
            self.target.shutdown(socket.SHUT_WR)
            return False
        self.pending = memoryview(buffer)[:count]
        if self._frames is not None:
            end = self._frames.pass_over(self.pending)
            if self._goaway_due and end is not None:
                self._goaway_due = False
                self.pending = memoryview(bytes(self.pending[:end]) + GOAWAY + bytes(self.pending[end:]))
        self._begun = True
        return True

    def say_goaway(self) -> None:
        """Put a GOAWAY behind the frame that is on its way; the server's first frame must come before it."""
        assert self._frames is not None
        if self._begun and self._frames.at_end:
            self.pending = memoryview(bytes(self.pending) + GOAWAY)
        else:
            self._goaway_due = True


class Connection:
    """A client and its connection to the server."""

    def __init__(self, client: socket.socket, upstream: socket.socket) -> None:
        self.client, self.upstream = client, upstream
        self.inward, self.outward = Flow(client, upstream), Flow(upstream, client, Frames())

    def move(self, buffer: bytearray) -> bool:
        """Move what there is; False: the connection is over."""
        try:
            self.inward.move(buffer)
            self.outward.move(buffer)
        except OSError:
            return False
        return not (self.inward.ended and self.outward.ended)

    def wanted(self, sock: socket.socket) -> int:
        """Which selector events of one of its sockets would let something move."""
        reads, writes = (self.inward, self.outward) if sock is self.client else (self.outward, self.inward)
        reading = selectors.EVENT_READ if not reads.pending and not reads.ended else 0
        return reading | (selectors.EVENT_WRITE if writes.pending else 0)

    def close(self) -> None:
        """Close both sides."""
        self.client.close()
        self.upstream.close()


class Relay:
    """The listener, the server's word, and the connections.

    Args:
        listener: accepted from while the server lives and has not said "stop".
        control: a stream to the server; its end is the server's.
        path: of the server's own socket.
    """

    def __init__(self, listener: socket.socket, control: socket.socket, path: str) -> None:
        self._listener, self._control, self._path = listener, control, path
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._buffer = bytearray(CHUNK_BYTES)
        self._accepting = True
        self._deadline: float | None = None
        listener.setblocking(False)
        control.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(control, selectors.EVENT_READ, self._told)

    def run(self) -> None:
        """Relay until the server has stopped or gone and every connection has ended."""
        while self._accepting or self._connections:
            wait_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                if isinstance(key.data, Connection):
                    self._move(key.data)
                else:
                    key.data()
            if self._deadline is not None and time.monotonic() > self._deadline:
                return

    def _accept(self) -> None:
        upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        upstream.setblocking(False)
        try:
            upstream.connect(self._path)
            client, _ = self._listener.accept()
        except (
            OSError
        ):  # the server's queue is full (EAGAIN), or it has just gone and the control will say so
            upstream.close()
            time.sleep(_RETRY_S)
            return
        client.setblocking(False)
        connection = Connection(client, upstream)
        self._connections.add(connection)
        for sock in (client, upstream):
            self._selector.register(sock, selectors.EVENT_READ, connection)

    def _move(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # ended by the event before
        sockets = (connection.client, connection.upstream)
        if connection.move(self._buffer):
            for sock in sockets:
                self._watch(sock, connection.wanted(sock), connection)
            return
        self._connections.discard(connection)
        for sock in sockets:
            self._watch(sock, 0, connection)
        connection.close()

    def _watch(self, sock: socket.socket, wanted: int, connection: Connection) -> None:
        known = self._selector.get_map().get(sock)
        if known is None:
            if wanted:
                self._selector.register(sock, wanted, connection)
        elif not wanted:
            self._selector.unregister(sock)
        elif known.events != wanted:
            self._selector.modify(sock, wanted, connection)

    def _told(self) -> None:
        stopped = bool(self._control.recv(16))
        if self._accepting:
            self._accepting = False
            self._selector.unregister(self._listener)
            self._listener.close()
        if not stopped:
            self._selector.unregister(self._control)
            self._deadline = time.monotonic() + _FLUSH_S
            return
        for connection in list(self._connections):
            connection.outward.say_goaway()
            self._move(connection)


def main() -> None:
    """Relay from the inherited listener."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.socket(fileno=int(sys.argv[1]))
    control = socket.socket(fileno=int(sys.argv[2]))
    os.set_inheritable(listener.fileno(), False)
    Relay(listener, control, sys.argv[3]).run()


if __name__ == "__main__":
    main()
