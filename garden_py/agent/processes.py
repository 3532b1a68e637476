"""The table of processes the server started and has not released yet."""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from garden_py.agent.connection import Connection
    from garden_py.agent.pty import Terminal
    from garden_py.wire import Value

    Asker: TypeAlias = tuple[Connection, int]

# Bounds a record list to one frame: 2048 records of at most 255 bytes id and 150 bytes else.
MAX_PROCESSES = 2048


class Process:
    """One process, from fork until the server has persisted its exit and releases it.

    Attributes:
        id: the server's name for it.
        pid: valid for signals while `exited` is False: not reaped means not reused.
        ends: the server's ends of its streams that are still held, by name, in the order stdin, stdout,
            stderr. With a terminal, stderr is missing.
        terminal: moves bytes between a pty and those pipes; None without tty.
        status_fd: where the child tells that it could not start; -1 once it has executed its program.
        asker: the connection and the id of the spawn request to be answered; None once it was.
        cancelled: nobody wants it any more; it is forgotten when it is reaped.
        status: raw wait status, None until reaped.
    """

    def __init__(
        self,
        id: str,
        pid: int,
        started_ns: int,
        ends: dict[str, int],
        terminal: Terminal | None,
        status_fd: int = -1,
    ) -> None:
        self.id = id
        self.pid = pid
        self.started_ns = started_ns
        self.ends = ends
        self.terminal = terminal
        self.status_fd = status_fd
        self.asker: Asker | None = None
        self.cancelled = False
        self.status: int | None = None
        self.ended_ns: int | None = None

    @property
    def starting(self) -> bool:
        """The child has not executed its program yet."""
        return self.status_fd >= 0

    @property
    def exited(self) -> bool:
        """It has ended and was reaped."""
        return self.status is not None

    def record(self) -> dict[str, Value]:
        """What `list`, `hello` and `attach` tell about it."""
        return {
            "id": self.id,
            "pid": self.pid,
            "started_ns": self.started_ns,
            "starting": self.starting,
            "exited": self.exited,
            "status": self.status,
            "ended_ns": self.ended_ns,
            "tty": self.terminal is not None,
        }

    def close_end(self, name: str) -> bool:
        """Give up one of the server's ends; False if that was done before."""
        fd = self.ends.pop(name, None)
        if fd is None:
            return False
        posix.close(fd)
        return True

    def close_ends(self) -> None:
        """Give up all of them. Idempotent."""
        for name in tuple(self.ends):
            self.close_end(name)


class ProcessTable:
    """Processes by the server's id and, while they live, by pid.

    Attributes:
        loose: terminals of processes that were forgotten before all output had been moved.
    """

    def __init__(self) -> None:
        self.by_id: dict[str, Process] = {}
        self._by_pid: dict[int, Process] = {}
        self.loose: list[Terminal] = []

    def add(self, process: Process) -> None:
        """Register a process that was just forked, or that an earlier program has handed over."""
        self.by_id[process.id] = process
        if not process.exited:
            self._by_pid[process.pid] = process

    def take_reaped(self, pid: int) -> Process | None:
        """The process of a reaped pid, which is free for reuse from now on; None for an orphan."""
        return self._by_pid.pop(pid, None)

    def forget(self, process: Process) -> None:
        """Remove it and close its descriptors. A pid that still lives becomes an orphan."""
        self.by_id.pop(process.id, None)
        if self._by_pid.get(process.pid) is process:
            del self._by_pid[process.pid]
        if process.terminal is not None:
            self.let_finish(process.terminal)
        process.close_ends()

    def let_finish(self, terminal: Terminal) -> None:
        """Keep a terminal until it has moved what the pty still holds."""
        if terminal.finish_alone(self.loose.remove):
            self.loose.append(terminal)

    def records(self) -> list[Value]:
        """All records, oldest first."""
        return [process.record() for process in self.by_id.values()]
