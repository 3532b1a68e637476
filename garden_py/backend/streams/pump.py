"""Moves one output pipe into its SegmentLog as fast as both allow, from the event loop, without ever waiting."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable

from garden_py.backend.streams.segments import Intake, SegmentLog

_TURNS = 1  # splices of at most 1 MiB before other streams get their turn, and readers, which send meanwhile
_DISK_RETRY_S = 0.5
_BUSY_PIPE_BYTES = 1 << 20
_GROW_AFTER_BYTES = 256 << 10
_DRAIN_TURNS = 64


class Pump:
    """Owns the read end of a process's output pipe.

    Args:
        pipe_fd: owned from here on.
        on_end: called once when the pipe has been read to its end (every writer has closed it).
        on_error: called once instead if the descriptor misbehaves; the message says how.
    """

    def __init__(
        self, pipe_fd: int, log: SegmentLog, *, on_end: Callable[[], None], on_error: Callable[[str], None]
    ) -> None:
        self._fd = pipe_fd
        self._log = log
        self._on_end = on_end
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._grown = False
        self._watching = False
        os.set_blocking(pipe_fd, False)
        self._watch()

    def _watch(self) -> None:
        if self._fd >= 0 and not self._watching:
            self._loop.add_reader(self._fd, self._turn)
            self._watching = True

    def _unwatch(self) -> None:
        if self._watching:
            self._loop.remove_reader(self._fd)
            self._watching = False

    def _turn(self) -> None:
        self.drain(_TURNS)

    def drain(self, turns: int = _DRAIN_TURNS) -> None:
        """Take what is in the pipe now, in at most `turns` steps of 1 MiB."""
        if self._fd < 0:
            return
        before = self._log.end_offset
        try:
            for _ in range(turns):
                intake = self._log.take(self._fd)
                if intake is not Intake.TOOK:
                    self._settle(intake)
                    break
        except OSError as error:
            self.close()
            self._log.close()
            self._on_error(f"its output descriptor fails: {error.strerror}")
            return
        if self._log.end_offset != before:
            self._log.wake_readers()
            self._grow_when_busy(self._log.end_offset - before)

    def _settle(self, intake: Intake) -> None:
        match intake:
            case Intake.CLOSED:
                self.close()
                self._on_end()
            case Intake.HELD:
                self._unwatch()
                self._log.call_when_reader_moves(self._watch)
            case Intake.DISK_FULL:
                self._unwatch()
                self._retry = self._loop.call_later(_DISK_RETRY_S, self._watch)
            case Intake.EMPTY | Intake.TOOK:
                pass

    def _grow_when_busy(self, moved: int) -> None:
        # Only busy pipes are grown: unprivileged users' pipe pages are counted (pipe(7), pipe-user-pages-soft), and a
        # container's user over that bound would get tiny pipes from then on.
        # One read to its end has been closed by now.
        if self._fd >= 0 and not self._grown and moved >= _GROW_AFTER_BYTES // 4:
            self._grown = True
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _BUSY_PIPE_BYTES)
            except PermissionError:
                return

    def close(self) -> None:
        """Let go of the pipe; twice is fine. The agent's duplicate keeps the process from noticing."""
        if self._fd < 0:
            return
        self._unwatch()
        if self._retry is not None:
            self._retry.cancel()
        os.close(self._fd)
        self._fd = -1
