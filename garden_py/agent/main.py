"""Entry of the agent: prepare PID 1, wire the parts together, serve until the kernel ends the container."""

from __future__ import annotations

import _socket
import posix

from garden_py.agent import rlimit, signals, syscalls
from garden_py.agent.connection import Acceptor
from garden_py.agent.loop import Loop, log
from garden_py.agent.processes import Process, ProcessTable
from garden_py.agent.reap import Reaper
from garden_py.agent.requests import Defaults, Requests, exit_event
from garden_py.agent.spawn import Spawner

LISTENER_FD = 3  # what `runc run --preserve-fds 1` hands over: a listening unix stream socket
PROCESS_NAME = b"garden-init"


def main() -> None:
    """Run the agent; returns never.

    Raises:
        SystemExit: descriptor 3 is not what the server hands over.
    """
    syscalls.set_process_name(PROCESS_NAME)
    syscalls.forbid_tracing()
    syscalls.drop_inheritable_capabilities()  # here once, for every process inherits the empty sets
    wakeup_fd = signals.take_over()
    posix.umask(0o022)
    if posix.getpid() != 1:
        syscalls.adopt_orphans()  # a sidecar's agent, which shares the pid namespace of the container
    listener = _take_listener()
    nofile = rlimit.raise_own_open_files()
    # The only look at the container's files by PID 1 itself: what is mounted there now is the runtime's work,
    # later it may be anybody's, and might hang.
    proc_fd = _open_directory(b"/proc")
    devpts_fd = _open_directory(b"/dev/pts")
    defaults = Defaults(nofile, proc_fd if _is_protected_from_oom(proc_fd) else -1)

    loop = Loop()
    table = ProcessTable()
    spawner = Spawner(loop, table, max_open_files=nofile[1], devpts_fd=devpts_fd)
    requests = Requests(table, spawner, defaults)
    acceptor = Acceptor(listener, loop, requests.handle)

    def on_exit(process: Process) -> None:
        spawner.settle(process)
        if table.by_id.get(process.id) is process:  # else it failed to start, which was reported
            acceptor.broadcast(exit_event(process))

    # Held by the loop, which calls it; the name only says so.
    _reaper = Reaper(loop, table, wakeup_fd, on_exit)
    loop.run()


def _take_listener() -> _socket.socket:
    try:
        posix.set_inheritable(LISTENER_FD, False)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, LISTENER_FD)
        is_listening = listener.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
    except OSError:
        is_listening = 0
    if not is_listening:
        raise SystemExit(f"{PROCESS_NAME.decode()}: descriptor {LISTENER_FD} is no listening socket")
    return listener


def _open_directory(path: bytes) -> int:
    """A descriptor of the directory, or -1 if the container has none."""
    try:
        return posix.open(path, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    except OSError as error:
        log(f"{path.decode()}: {error.strerror}")
        return -1


def _is_protected_from_oom(proc_fd: int) -> bool:
    """The server made PID 1 a late victim of the OOM killer; what it starts must not inherit that."""
    if proc_fd < 0:
        return False
    try:
        fd = posix.open(b"self/oom_score_adj", posix.O_RDONLY | posix.O_CLOEXEC, dir_fd=proc_fd)
    except OSError as error:
        log(f"oom_score_adj: {error.strerror}")
        return False
    adjustment = posix.read(fd, 16)
    posix.close(fd)
    return adjustment.startswith(b"-")
