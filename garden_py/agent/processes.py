"""The table of processes the server started and has not released yet."""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from garden_py.agent.pty import Terminal
    from garden_py.wire import Value

# Bounds a record list to one frame: 2048 records of at most 255 bytes id and 150 bytes else.
MAX_PROCESSES = 2048


class Process:
    """One process, from fork until the server has persisted its exit and releases it.

    Attributes:
        id: the server's name for it.
        pid: valid for signals while `exited` is False: not reaped means not reused.
        ends: the server's ends of its streams that are still held, by name, in the order stdin, stdout,
            stderr. With a terminal, stdin is the pty master and stderr is missing.
        terminal: moves a pty's output into the stdout pipe; None without tty.
        starting: the child has not executed its program yet.
        status: raw wait status, None until reaped.
    """

    def __init__(
        self, id: str, pid: int, started_ns: int, ends: dict[str, int], terminal: Terminal | None
    ) -> None:
        self.id = id
        self.pid = pid
        self.started_ns = started_ns
        self.ends = ends
        self.terminal = terminal
        self.starting = True
        self.status: int | None = None
        self.ended_ns: int | None = None

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

    def close(self) -> None:
        """Give up everything; a terminal first moves what the pty still holds. Idempotent."""
        if self.terminal is not None:
            if self.terminal.finish_alone():
                self.ends.pop("stdin", None)
            else:
                self.terminal.close()
        for name in tuple(self.ends):
            self.close_end(name)


class ProcessTable:
    """Processes by the server's id and, while they live, by pid."""

    def __init__(self) -> None:
        self.by_id: dict[str, Process] = {}
        self._by_pid: dict[int, Process] = {}

    def add(self, process: Process) -> None:
        """Register a process that was just forked."""
        self.by_id[process.id] = process
        self._by_pid[process.pid] = process

    def take_reaped(self, pid: int) -> Process | None:
        """The process of a reaped pid, which is free for reuse from now on; None for an orphan."""
        return self._by_pid.pop(pid, None)

    def forget(self, process: Process) -> None:
        """Remove it and close its descriptors. A pid that still lives becomes an orphan."""
        self.by_id.pop(process.id, None)
        if self._by_pid.get(process.pid) is process:
            del self._by_pid[process.pid]
        process.close()

    def records(self) -> list[Value]:
        """All records, oldest first."""
        return [process.record() for process in self.by_id.values()]
