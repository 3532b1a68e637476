"""Being told by the kernel that a cgroup ran out of memory."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path


class OomWatch:
    """One descriptor that becomes readable when a group's OOM killer has run.

    v1: an eventfd registered in cgroup.event_control (cgroup-v1/memory.rst §9). v2: memory.events raises POLLPRI
    (cgroup-v2.rst); since the file is always POLLIN as well, it sits in an epoll of its own that asks for POLLPRI only.
    """

    def __init__(self, directory: Path, version: int, on_oom: Callable[[], None]) -> None:
        self.on_oom = on_oom
        self._version = version
        self._fds: list[int] = []
        self._epoll: select.epoll | None = None
        try:
            self._fd = self._watch_v1(directory) if version == 1 else self._watch_v2(directory)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._fd

    def acknowledge(self) -> None:
        """Take the event off the descriptor and report it."""
        if self._version == 1:
            os.eventfd_read(self._fd)
        else:
            os.lseek(self._fds[0], 0, os.SEEK_SET)
            os.read(self._fds[0], 4096)  # reading re-arms POLLPRI (kernfs)
        self.on_oom()

    def close(self) -> None:
        """Stop watching; twice is fine."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self._epoll is not None:
            self._epoll.close()

    def _watch_v1(self, directory: Path) -> int:
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(event)
        control = os.open(directory / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(control)
        (directory / "cgroup.event_control").write_text(f"{event} {control}")
        return event

    def _watch_v2(self, directory: Path) -> int:
        events = os.open(directory / "memory.events", os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(events)
        os.read(events, 4096)
        self._epoll = select.epoll()
        self._epoll.register(events, select.EPOLLPRI)
        return self._epoll.fileno()
