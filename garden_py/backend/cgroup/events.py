"""Being told by the kernel that a cgroup ran out of memory."""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Callable
from pathlib import Path

from garden_py.backend.cgroup.stats import parse_flat_keyed

# v1 signals before it looks for a victim, and writes a report to the console between the two (oom_kill.c, dump_header).
_LOOK_AGAIN_S = (0.02, 0.1, 0.5, 2.0)


class OomWatch:
    """One descriptor that becomes readable when the OOM killer may have killed tasks of a group; it counts them.

    The kernel's signals are only a reason to look. v1: an eventfd registered in cgroup.event_control
    (cgroup-v1/memory.rst §9) is signalled for each charge that fails, hundreds of times for one kill, also for charges
    to groups above this one, and before the kill. v2: memory.events raises POLLPRI (cgroup-v2.rst), also when something
    else in it changes; since the file is always POLLIN as well, it sits in an epoll of its own that asks for POLLPRI
    only. How many were killed is `oom_kill` in memory.oom_control or memory.events (since Linux 4.13, older than what
    a server runs on).

    Args:
        directory: of the group in the memory hierarchy.
        version: 1 or 2.
        on_kills: called with how many tasks of the group were killed since the last time, at least 1.
    """

    def __init__(self, directory: Path, version: int, on_kills: Callable[[int], None]) -> None:
        self._on_kills = on_kills
        self._version = version
        self._fds: list[int] = []
        self._epoll: select.epoll | None = None
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._counts = self._open(directory / ("memory.events" if version == 2 else "memory.oom_control"))
            self._told = self._read()
            self._fd = self._watch_v1(directory) if version == 1 else self._watch_v2()
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._fd

    def acknowledge(self) -> None:
        """Take the signal off the descriptor, if there is one, and tell of the kills that there were."""
        if self._version == 1:
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                pass
            else:
                self._look_again(0)
        self._look()

    def _look(self) -> None:
        kills = self._read()
        if kills > self._told:
            new, self._told = kills - self._told, kills
            self._on_kills(new)

    def _look_again(self, times: int) -> None:
        """Look a while after the last signal of v1, ever more rarely: the kill comes behind it."""
        if self._timer is not None:
            self._timer.cancel()
        if times == len(_LOOK_AGAIN_S):
            self._timer = None
            return

        def look() -> None:
            self._look_again(times + 1)
            self._look()

        self._timer = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S[times], look)

    def _read(self) -> int:
        """Tasks of the group killed so far; on v2 reading re-arms POLLPRI (kernfs)."""
        try:
            return parse_flat_keyed(os.pread(self._counts, 4096, 0).decode()).get("oom_kill", 0)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return 0  # the group is gone

    def close(self) -> None:
        """Stop watching; twice is fine."""
        if self._timer is not None:
            self._timer.cancel()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self._epoll is not None:
            self._epoll.close()

    def _open(self, file: Path) -> int:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def _watch_v1(self, directory: Path) -> int:
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(event)
        (directory / "cgroup.event_control").write_text(f"{event} {self._counts}")
        return event

    def _watch_v2(self) -> int:
        self._epoll = select.epoll()
        self._epoll.register(self._counts, select.EPOLLPRI)
        return self._epoll.fileno()
