"""Being told by the kernel that a cgroup ran out of memory."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from pathlib import Path

from garden_py.backend.cgroup.stats import met_own_limit, parse_flat_keyed


class OomWatch:
    """One descriptor that becomes readable when the OOM killer has run for want of what a group's own limit allows.

    v1: an eventfd registered in cgroup.event_control (cgroup-v1/memory.rst §9), which is also told of a group above
    this one. v2: memory.events.local raises POLLPRI (cgroup-v2.rst), also when something else in it changes; since the
    file is always POLLIN as well, it sits in an epoll of its own that asks for POLLPRI only.

    Args:
        directory: of the group in the memory hierarchy.
        version: 1 or 2.
        on_oom: called for each time.
        below_limit: a group above this one has a limit too.
    """

    def __init__(
        self, directory: Path, version: int, on_oom: Callable[[], None], *, below_limit: bool = False
    ) -> None:
        self.on_oom = on_oom
        self._below_limit = below_limit
        self._directory = directory
        self._version = version
        self._told = 0
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
        """Take the event off the descriptor, if there is one, and report it if the limit was this group's own."""
        if self._version == 1:
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                return
            if not self._below_limit or met_own_limit(self._directory, self._version):
                self.on_oom()
            return
        times = self._read_v2()
        if times > self._told:
            self._told = times
            self.on_oom()

    def _read_v2(self) -> int:
        """How often the group's limit left no way out; reading re-arms POLLPRI (kernfs)."""
        os.lseek(self._fds[0], 0, os.SEEK_SET)
        try:
            return parse_flat_keyed(os.read(self._fds[0], 4096).decode()).get("oom", 0)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return 0  # the group is gone

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
        events = os.open(directory / "memory.events.local", os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(events)
        self._told = self._read_v2()
        self._epoll = select.epoll()
        self._epoll.register(events, select.EPOLLPRI)
        return self._epoll.fileno()
