"""PID 1's side of starting a process: streams, fork, and the word from the child whether it went well."""

from __future__ import annotations

import errno
import posix
import time

from garden_py import wire
from garden_py.agent import child, pty
from garden_py.agent.loop import READABLE
from garden_py.agent.processes import MAX_PROCESSES, Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from garden_py.agent.child import Plan
    from garden_py.agent.loop import Loop
    from garden_py.agent.processes import Asker, ProcessTable
    from garden_py.wire import Value

_STATUS_BYTES = 8 << 10
_RESERVED_FDS = 32  # kept free for connections and for the descriptors they bring


class SpawnError(Exception):
    """The process was not started; `details` is the payload of the error frame."""

    def __init__(self, code: str, message: str, step: str, error: OSError | None = None) -> None:
        super().__init__(message)
        self.details: dict[str, Value] = {"code": code, "message": message, "step": step}
        if error is not None and error.errno is not None:
            self.details["errno"] = errno.errorcode.get(error.errno, str(error.errno))


class Streams:
    """The descriptors of one process: its own ends, and the server's."""

    def __init__(self, max_fds: int) -> None:
        self._max_fds = max_fds
        self.child_ends: list[int] = []
        self.server_ends: dict[str, int] = {}
        self.terminal_ends: list[int] = []  # as the arguments of pty.Terminal

    def make_pipes(self) -> None:
        """stdin, stdout and stderr as pipes."""
        read, write = self._pipe()
        self.child_ends.append(read)
        self.server_ends["stdin"] = write
        for name in ("stdout", "stderr"):
            read, write = self._pipe()
            self.child_ends.append(write)
            self.server_ends[name] = read

    def make_terminal(self, devpts_fd: int, rows: int, columns: int) -> None:
        """A pty, and the pipes that its output and input are moved through."""
        master = self._bounded(pty.open_master(devpts_fd))
        self.terminal_ends.append(master)
        pty.set_size(master, rows, columns)
        input, self.server_ends["stdin"] = self._pipe()
        self.terminal_ends.append(input)
        self.server_ends["stdout"], output = self._pipe()
        self.terminal_ends.insert(1, output)
        self.terminal_ends.append(self._bounded(posix.dup(master)))
        posix.set_blocking(output, False)
        posix.set_blocking(input, False)

    def close_child_ends(self) -> None:
        """After the fork: the process alone holds its ends."""
        for fd in self.child_ends:
            posix.close(fd)
        self.child_ends.clear()

    def close(self) -> None:
        """Everything, after a failure."""
        self.close_child_ends()
        for fd in self.server_ends.values():
            posix.close(fd)
        self.server_ends.clear()
        for fd in self.terminal_ends:
            posix.close(fd)
        self.terminal_ends.clear()

    def _pipe(self) -> tuple[int, int]:
        read, write = posix.pipe2(posix.O_CLOEXEC)
        try:
            return self._bounded(read), self._bounded(write)
        except OSError:
            posix.close(read if read < self._max_fds else write)
            raise

    def _bounded(self, fd: int) -> int:
        """The lowest free number is always used, so a high one tells that few are left."""
        if fd >= self._max_fds:
            posix.close(fd)
            raise OSError(errno.EMFILE, posix.strerror(errno.EMFILE))
        return fd


class Spawner:
    """Starts processes and learns from their status pipes whether they did start."""

    def __init__(
        self,
        loop: Loop,
        table: ProcessTable,
        max_open_files: int,
        devpts_fd: int,
        on_started: Callable[[Process, dict[str, Value] | None], None],
    ) -> None:
        """Prepare.

        Args:
            loop: calls when a status pipe is ready.
            table: where processes are kept.
            max_open_files: own limit.
            devpts_fd: directory with ptmx, or -1.
            on_started: called once for each process that was forked, with None when it runs, or with the error
                frame's payload when it failed, in which case it is not in the table any more.
        """
        self._loop = loop
        self._table = table
        self._max_fds = max_open_files - _RESERVED_FDS
        self._devpts_fd = devpts_fd
        self._on_started = on_started

    def duplicate(self, fd: int) -> int:
        """A descriptor of our own for what fd is; OSError if none but the reserved ones is free."""
        own = posix.dup(fd)
        if own >= self._max_fds:
            posix.close(own)
            raise OSError(errno.EMFILE, posix.strerror(errno.EMFILE))
        return own

    def spawn(self, id: str, plan: Plan, tty_size: tuple[int, int] | None, asker: Asker) -> None:
        """Fork the process and register it.

        Args:
            id: not in the table yet.
            plan: complete but for stdio and master, which are filled in here.
            tty_size: (rows, columns), or None for pipes.
            asker: see `Process`.

        Raises:
            SpawnError: nothing was started.
        """
        if len(self._table.by_id) >= MAX_PROCESSES:
            raise SpawnError(
                "too_many_processes", f"{MAX_PROCESSES} processes are running or not released", "table"
            )
        streams = Streams(self._max_fds)
        status_read = status_write = -1
        step = "streams"
        try:
            if tty_size is None:
                streams.make_pipes()
                plan.stdio = streams.child_ends
            else:
                streams.make_terminal(self._devpts_fd, *tty_size)
                plan.master = streams.terminal_ends[0]
            status_read, status_write = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
            step = "fork"
            started_ns = time.time_ns()
            pid = posix.fork()
        except OSError as error:
            for fd in (status_read, status_write):
                if fd >= 0:
                    posix.close(fd)
            streams.close()
            raise _spawn_error(step, error) from error
        if pid == 0:
            child.run(plan, status_write)
        posix.close(status_write)
        streams.close_child_ends()
        terminal = pty.Terminal(streams.terminal_ends, self._loop) if streams.terminal_ends else None
        process = Process(id, pid, started_ns, streams.server_ends, terminal, status_read)
        process.asker = asker
        self._table.add(process)
        self.watch(process)

    def watch(self, process: Process) -> None:
        """Be called when a starting process has something to say."""
        self._loop.watch(process.status_fd, READABLE, lambda events: self.settle(process))

    def settle(self, process: Process) -> None:
        """Read the status pipe if it has something to say.

        Called when the pipe is ready, and when the child was reaped: then it certainly has ended, and whoever
        waits for the spawn must hear of it before hearing of the exit.
        """
        if not process.starting:
            return
        try:
            status = posix.read(process.status_fd, _STATUS_BYTES)
        except BlockingIOError:
            if not process.exited:
                return
            status = b""
        self._loop.forget(process.status_fd)
        posix.close(process.status_fd)
        process.status_fd = -1
        if status:
            self._table.forget(process)
            self._on_started(process, _parse_failure(status))
            return
        if process.terminal is not None:
            process.terminal.start()
        self._on_started(process, None)


def _parse_failure(status: bytes) -> dict[str, Value]:
    """The child's own words; it has read files of the container by then, so they are checked."""
    try:
        failure = wire.decode(status)
    except wire.WireError:
        failure = None
    if not isinstance(failure, dict) or not isinstance(failure.get("code"), str):
        return {"code": "spawn_failed", "message": "the child reported nonsense", "step": "status"}
    return failure


def _spawn_error(step: str, error: OSError) -> SpawnError:
    if error.errno == errno.ENOMEM:
        code = "out_of_memory"
    elif (step == "fork" and error.errno == errno.EAGAIN) or error.errno in (errno.EMFILE, errno.ENFILE):
        code = "too_many_processes"
    else:
        code = "spawn_failed"
    return SpawnError(code, f"{step}: {error.strerror}", step, error)
