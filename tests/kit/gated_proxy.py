"""A TCP forwarder on loopback that holds back what comes through it: a slow registry, or one that hangs."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_PIECE = 16 << 10


class GatedProxy:
    """Forwards to a port of loopback. After `let_through` bytes on a connection it waits until `open_gate`.

    Args:
        port: where to.
        let_through: bytes towards the client on one connection before the gate closes for it.
    """

    def __init__(self, port: int, let_through: int) -> None:
        self._target = port
        self._let_through = let_through
        self._gate = threading.Condition()
        self._open = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def host(self) -> str:
        """HOST:PORT for references."""
        return f"127.0.0.1:{self.port}"

    def open_gate(self) -> None:
        """Hold nothing back any more."""
        with self._gate:
            self._open = True
            self._gate.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open_gate()
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._forward_slowly, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _forward_slowly(self, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(_PIECE):
                if passed >= self._let_through:
                    with self._gate:
                        self._gate.wait_for(lambda: self._open)
                passed += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
