"""What keeps a process from running before it has been recorded, and lets it ask for what only the host can give."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from garden_py.wire import LIMITS_RAISED, LIMITS_REFUSED

_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid; unix(7)
_ASK_BYTES: Final = 16


class Gate:
    """A pipe on which a child waits before exec: one byte lets it run, the end without one lets it go.

    So a process can be prepared while it is still being recorded, and none that is not recorded ever runs, whenever
    this server may be killed.

    With raise_limits it is a socket, on which the child may ask once for limits that it cannot give itself:

        child                                       server
          │  ask; the kernel puts its pid beside it    │
          ├───────────────────────────────────────────▶│  recorded?
          │  the byte that lets it run                 │
          │◀───────────────────────────────────────────┤  raise_limits(pid)
          │  LIMITS_RAISED, or LIMITS_REFUSED          │
          │◀───────────────────────────────────────────┤

    Args:
        record: called by `open` before the byte is written.
        raise_limits: raises the limits of a process, by its pid on the host, to what its caller wants; OSError if that
            cannot be. Nothing that the child says decides what they are.
    """

    def __init__(self, record: Callable[[], None], raise_limits: Callable[[int], None] | None = None) -> None:
        self._record = record
        self._raise_limits = raise_limits
        self._socket: socket.socket | None = None
        self.failure: Exception | None = None
        if raise_limits is None:
            self.child_end, self._own_end = os.pipe2(os.O_CLOEXEC)
            return
        self._socket, theirs = socket.socketpair()
        # Before the child can say anything: its pid comes with its words, translated into our numbers.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.setblocking(False)
        self.child_end, self._own_end = theirs.detach(), -1

    def open(self) -> None:
        """Let the program run, if it can be recorded; else `failure` says why not, and the agent answers soon."""
        try:
            self._record()
            if self._socket is None:
                os.write(self._own_end, b"\n")
            else:
                self._socket.send(b"\n")
                asyncio.get_running_loop().add_reader(self._socket, self._answer)
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for the agent's answer
            self.failure = error
        finally:
            if self._socket is None or self.failure is not None:
                self._close_own_end()

    def _answer(self) -> None:
        assert self._socket is not None
        assert self._raise_limits is not None
        asyncio.get_running_loop().remove_reader(self._socket)  # it asks once
        with suppress(OSError):  # it has gone; the agent says how
            asked, beside, _, _ = self._socket.recvmsg(_ASK_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            if not asked:
                return
            try:
                self._raise_limits(_pid_of(beside))
                answer = LIMITS_RAISED
            except OSError:
                answer = LIMITS_REFUSED
            self._socket.send(answer)

    def _close_own_end(self) -> None:
        if self._socket is not None:
            if self._socket.fileno() >= 0:
                asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        if self._own_end >= 0:
            os.close(self._own_end)
            self._own_end = -1

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.child_end)
        self._close_own_end()


def _pid_of(beside: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid: int = _CREDENTIALS.unpack(data)[0]
            return pid
    raise ProcessLookupError
