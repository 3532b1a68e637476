"""The only place that waits for children.

A second one would steal statuses: `waitpid(-1)` here and a wait for one pid elsewhere race for the same
child.
"""

from __future__ import annotations

import posix
import time

from garden_py.agent.loop import READABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from garden_py.agent.loop import Loop
    from garden_py.agent.processes import Process, ProcessTable

_SIGCHLD = 17  # signal(7), all architectures but alpha, mips, sparc and parisc
_REAPS_PER_TURN = 256  # a storm of orphans must not keep the server waiting


class Reaper:
    """Reaps every child on SIGCHLD, records the exits of known processes, and tells about them."""

    def __init__(
        self, loop: Loop, table: ProcessTable, wakeup_fd: int, on_exit: Callable[[Process], None]
    ) -> None:
        self._table = table
        self._wakeup_fd = wakeup_fd
        self._on_exit = on_exit
        self._expected: dict[int, Callable[[int], None]] = {}
        loop.watch(wakeup_fd, READABLE, self._on_signal)

    def expect(self, pid: int, on_end: Callable[[int], None]) -> None:
        """Call `on_end` with the wait status of a child that is none of the table's processes."""
        self._expected[pid] = on_end

    def look(self) -> None:
        """Reap in the next turn, as if SIGCHLD had come."""
        posix.kill(posix.getpid(), _SIGCHLD)

    def _on_signal(self, events: int) -> None:
        # Drain first: a child that ends after the last waitpid writes a new byte, which must not be lost.
        self._drain_wakeup()
        for _ in range(_REAPS_PER_TURN):
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._record(pid, status)
        self.look()  # more may wait: come back after everybody else had a turn

    def _drain_wakeup(self) -> None:
        try:
            posix.read(self._wakeup_fd, 4096)
        except BlockingIOError:
            return

    def _record(self, pid: int, status: int) -> None:
        process = self._table.take_reaped(pid)
        if process is None:
            on_end = self._expected.pop(pid, None)
            if on_end is not None:
                on_end(status)
            return
        process.status = status
        process.ended_ns = time.time_ns()
        self._on_exit(process)
