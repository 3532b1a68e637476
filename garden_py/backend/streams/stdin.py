"""The input side of a process: a pipe's write end or a terminal's master, fed in order, at most once per byte."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from functools import partial

from garden_py.model.errors import NoTty, OffsetOutOfRange, OffsetUnknown, StdinClosed
from garden_py.model.process import WindowSize

_END_OF_TRANSMISSION = b"\x04"  # VEOF of the default line discipline, termios(3)
_BUSY_PIPE_BYTES = 1 << 20
_GROW_AT_BYTES = 32 << 10


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class StdinFeed:
    """Owns the descriptor that a process reads from.

    Args:
        fd: owned from here on; -1 when it is gone already.
        is_tty: it is a terminal's master.
        counted: nothing has been fed before; else how much was fed is not known, and offsets cannot be honoured.
    """

    def __init__(self, process_id: str, fd: int, *, is_tty: bool, counted: bool = True) -> None:
        self._process_id = process_id
        self._fd = fd
        self._is_tty = is_tty
        self._closed = False
        self._grown = is_tty
        self._turn = asyncio.Lock()
        self._room: asyncio.Future[None] | None = None
        self._counted = counted
        self._accepted = 0
        if fd >= 0:
            os.set_blocking(fd, False)

    @property
    def accepted(self) -> int | None:
        """Bytes taken so far; None if that is not known."""
        return self._accepted if self._counted else None

    async def write(self, data: bytes, offset: int | None) -> None:
        """Feed data; see service.ports.RunningProcess.write_stdin.

        Data for a process that does not read any more is dropped, like a shell pipeline does after SIGPIPE.
        """
        async with self._turn:
            if offset is not None:
                data = self._without_fed(data, offset)
                if not data:
                    return  # all of it is a repetition, which is fine after the end of stdin, too
            if self._closed:
                raise StdinClosed(self._process_id)
            await self._write_all(memoryview(data))

    def _without_fed(self, data: bytes, offset: int) -> bytes:
        """The part of data that has not been fed yet."""
        if not self._counted:
            raise OffsetUnknown(self._process_id)
        if offset > self._accepted:
            raise OffsetOutOfRange(offset, 0, self._accepted)
        return data[self._accepted - offset :]

    async def _write_all(self, view: memoryview) -> None:
        if len(view) >= _GROW_AT_BYTES and not self._grown and self._fd >= 0:
            self._grow()
        while view:
            if self._fd < 0:
                self._accepted += len(view)
                return
            try:
                written = os.write(self._fd, view)
            except BlockingIOError:
                await self._wait_for_room()
                continue
            except OSError:  # EPIPE: no reader; EIO: the terminal's other side is gone
                self.release()
                continue
            self._accepted += written
            view = view[written:]

    def _grow(self) -> None:
        self._grown = True
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _BUSY_PIPE_BYTES)
        except OSError:  # over pipe-user-pages-soft: it works with the size it has
            return

    async def _wait_for_room(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        fd = self._fd
        loop.add_writer(fd, partial(_finish, ready))
        self._room = ready
        try:
            await ready
        finally:
            if self._fd == fd:
                loop.remove_writer(fd)

    async def close(self) -> bool:
        """End of input; False if it had ended before."""
        async with self._turn:
            if self._closed:
                return False
            if self._is_tty:
                await self._write_all(memoryview(_END_OF_TRANSMISSION))
            self._closed = True
            if not self._is_tty:
                self.release()
            return True

    def resize(self, size: WindowSize) -> None:
        """Set the terminal's size; the kernel sends SIGWINCH. TIOCSWINSZ, tty_ioctl(2).

        Raises:
            NoTty: the process has none.
        """
        if not self._is_tty:
            raise NoTty(self._process_id)
        if self._fd >= 0:
            packed = struct.pack("HHHH", size.rows or 24, size.columns or 80, 0, 0)
            fcntl.ioctl(self._fd, termios.TIOCSWINSZ, packed)

    def release(self) -> None:
        """Close the descriptor; whoever waits for room in it goes on. Twice is fine."""
        if self._fd < 0:
            return
        asyncio.get_running_loop().remove_writer(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
