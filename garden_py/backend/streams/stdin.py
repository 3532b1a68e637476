"""The input side of a process: accepted in order, each byte once, fed as fast as the process reads."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
from collections.abc import Awaitable, Callable

from garden_py.backend.streams.spool import Spool
from garden_py.model.errors import NoTty, OffsetOutOfRange, OffsetUnknown, StdinClosed
from garden_py.model.process import WindowSize

_END_OF_TRANSMISSION = b"\x04"  # VEOF of the default line discipline, termios(3)
_BUSY_PIPE_BYTES = 1 << 20
_GROW_AT_BYTES = 32 << 10
_BACKLOG_BYTES = 1 << 20
_TURNS = 4  # of at most 1 MiB before others get theirs


def _nothing() -> None:
    return


class StdinFeed:
    """Owns the descriptor that a process reads from, and the spool before it.

    Args:
        fd: owned from here on; -1 when it is gone already.
        is_tty: a terminal reads it: input ends by a typed ^D.
        is_master: fd is a terminal's master, not a pipe.
        spool: of an earlier server, owned from here on; what it still holds is fed at once.
        keep: has a new spool kept by somebody who outlives this server; what it raises, the writer gets.
        counted: all that was ever fed went through a spool; else offsets cannot be honoured.
        on_end: called when input has ended and all of it was fed; fd is closed by then, unless it is a master.
    """

    def __init__(
        self,
        process_id: str,
        fd: int,
        *,
        is_tty: bool,
        is_master: bool = False,
        spool: Spool | None = None,
        keep: Callable[[int], Awaitable[None]] | None = None,
        counted: bool = True,
        on_end: Callable[[], None] = _nothing,
    ) -> None:
        self._process_id = process_id
        self._fd = fd
        self._is_tty = is_tty
        self._is_master = is_master
        self._spool = spool
        self._keep = keep
        self._counted = counted
        self._on_end = on_end
        self._closed = spool is not None and spool.ended
        self._typed_end = self._closed and is_tty
        self._accepted = 0 if spool is None else spool.size
        self._grown = is_master
        self._watching = False
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if fd >= 0:
            os.set_blocking(fd, False)
            if spool is not None:
                self._feed()

    @property
    def accepted(self) -> int | None:
        """Bytes taken so far, a typed end not counted; None if that is not known."""
        return self._accepted - self._typed_end if self._counted else None

    async def write(self, data: bytes, offset: int | None) -> None:
        """Accept data; see service.ports.RunningProcess.write_stdin.

        Data for a process that does not read any more is dropped, like a shell pipeline does after SIGPIPE.
        """
        async with self._turn:
            if offset is not None:
                data = self._without_accepted(data, offset)
                if not data:
                    return  # all of it is a repetition, which is fine after the end of stdin, too
            if self._closed:
                raise StdinClosed(self._process_id)
            await self._accept(memoryview(data))

    def _without_accepted(self, data: bytes, offset: int) -> bytes:
        """The part of data that has not been accepted yet."""
        accepted = self.accepted
        if accepted is None:
            raise OffsetUnknown(self._process_id)
        self._refuse_gap(offset, accepted)
        return data[accepted - offset :]

    def _refuse_gap(self, offset: int, accepted: int) -> None:
        if offset > accepted:
            problem = f"stdin goes on at offset {accepted}, the number of bytes so far; {offset} leaves a gap"
            raise OffsetOutOfRange(offset, 0, accepted, problem)

    async def _accept(self, view: memoryview) -> None:
        if self._spool is None and self._fd >= 0:
            await self._open_spool()
        if len(view) >= _GROW_AT_BYTES and not self._grown and self._fd >= 0:
            self._grow()
        while view and self._fd >= 0 and self._spool is not None:
            if self._spool.backlog >= _BACKLOG_BYTES:
                self._room.clear()
                await self._room.wait()
                continue
            taken = self._spool.append(view[: _BACKLOG_BYTES - self._spool.backlog])
            view = view[taken:]
            self._accepted += taken
            if not self._watching:
                self._feed()
        if view:
            self._drop(len(view))

    async def _open_spool(self) -> None:
        spool = Spool.create()
        try:
            if self._keep is not None:
                await self._keep(spool.fd)
        except BaseException:
            spool.close()
            raise
        if self._fd < 0:  # released meanwhile
            spool.close()
        else:
            self._spool = spool

    def _drop(self, count: int) -> None:
        self._accepted += count
        if self._spool is not None and self._spool.fd >= 0:
            self._spool.skip(count)

    def _grow(self) -> None:
        self._grown = True
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _BUSY_PIPE_BYTES)
        except OSError:  # over pipe-user-pages-soft: it works with the size it has
            return

    def _feed(self) -> None:
        """Move what fits. Runs whenever there is something to feed and room for it."""
        assert self._spool is not None
        try:
            for _ in range(_TURNS):
                if not self._spool.backlog:
                    break
                if not (self._spool.write if self._is_master else self._spool.move)(self._fd):
                    raise BrokenPipeError
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: no reader; EIO: the terminal's other side is gone
            self._give_up()
            return
        self._watch(bool(self._spool.backlog))
        if self._spool.backlog < _BACKLOG_BYTES:
            self._room.set()
        if self._closed and not self._spool.backlog:
            self._end()

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._watching:
            self._loop.add_writer(self._fd, self._feed)
        elif self._watching and not wanted:
            self._loop.remove_writer(self._fd)
        self._watching = wanted

    async def close(self, offset: int | None = None) -> None:
        """End of input, after what has been accepted; twice is fine.

        Raises:
            OffsetOutOfRange: it is to end beyond that; whoever reads it would take it for whole.
        """
        async with self._turn:
            if self._closed:
                return
            if offset is not None and self.accepted is not None and self._fd >= 0:
                self._refuse_gap(offset, self.accepted)
            if self._is_tty:
                await self._accept(memoryview(_END_OF_TRANSMISSION))
                self._typed_end = True
            self._closed = True
            if self._spool is not None and self._fd >= 0:
                self._spool.end()
                if not self._watching:
                    self._feed()
            else:
                self._end()

    def _end(self) -> None:
        """All has been fed: the process sees the end."""
        if not self._is_tty:
            self._close_fd()
        self._on_end()

    def _give_up(self) -> None:
        """Nobody reads: what is left is dropped, what comes is counted."""
        self._close_fd()
        if self._spool is not None and self._spool.fd >= 0 and not self._spool.ended:
            self._spool.skip(0)

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
        """Close our descriptors; whoever waits for room goes on. Twice is fine."""
        self._close_fd()
        if self._spool is not None:
            self._spool.close()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            self._watch(False)
            os.close(self._fd)
            self._fd = -1
        self._room.set()
