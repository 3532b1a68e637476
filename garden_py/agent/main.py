"""Entry of the agent: prepare PID 1, wire the parts together, serve until the kernel ends the container."""

from __future__ import annotations

import _socket
import posix
import sys

from garden_py import wire
from garden_py.agent import rlimit, signals, syscalls
from garden_py.agent.connection import Acceptor
from garden_py.agent.loop import Loop, log
from garden_py.agent.processes import Process, ProcessTable
from garden_py.agent.reap import Reaper
from garden_py.agent.requests import Defaults, Requests, answer_spawn, exit_event
from garden_py.agent.spawn import Spawner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from garden_py.agent.fields import Fields
    from garden_py.agent.processes import Asker
    from garden_py.agent.upgrade import Upgrader

LISTENER_FD = 3  # what `runc run --preserve-fds` hands over first: a listening unix stream socket
PROCESS_NAME = b"garden-init"


def main(build: str) -> None:
    """Run the agent; returns never.

    Args:
        build: name of the bundle that this program is from. Two more arguments on the command line, a mode and a
            descriptor, tell that it is to filter system calls with the program in that file (`filter`), that it takes
            the place of an earlier agent (`resume`), or is to try whether it could (`check`); see `upgrade`.

    Raises:
        SystemExit: descriptor 3 is not what the server hands over; or a check has ended, with success if status 0.
    """
    mode, state_fd = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) == 3 else ("", -1)
    syscalls.set_process_name(PROCESS_NAME)
    syscalls.forbid_tracing()
    if mode == "filter":
        _filter_system_calls(state_fd)
        mode = ""
    syscalls.prepare_capabilities()
    if mode:
        from garden_py.agent import handover

        estate = handover.unpack(state_fd)
        posix.close(state_fd)
    wakeup_fd = signals.take_over()
    posix.umask(0o022)
    if posix.getpid() != 1:
        syscalls.adopt_orphans()  # a sidecar's agent, which shares the pid namespace of the container
    listener = _take_listener()
    defaults = handover.take_defaults(estate) if mode else _make_defaults()

    loop = Loop()
    table = ProcessTable()
    max_open_files = rlimit.raise_own_open_files()
    spawner = Spawner(loop, table, max_open_files, defaults.devpts_fd, answer_spawn)

    upgrader: Upgrader | None = None

    def upgrade(asker: Asker, fields: Fields) -> None:
        nonlocal upgrader
        if upgrader is None:
            from garden_py.agent import upgrade

            upgrader = upgrade.Upgrader(acceptor, table, defaults, reaper, LISTENER_FD)
        upgrader.begin(asker, fields)

    requests = Requests(build, table, spawner, defaults, upgrade)
    acceptor = Acceptor(listener, loop, requests.handle)

    def on_exit(process: Process) -> None:
        spawner.settle(process)
        if process.cancelled:
            table.forget(process)
        elif table.by_id.get(process.id) is process:  # else it failed to start, which was reported
            acceptor.broadcast(exit_event(process))

    reaper = Reaper(loop, table, wakeup_fd, on_exit)
    if mode:
        asker = handover.take_over(estate, loop, table, spawner, acceptor)
        if mode == "check":
            raise SystemExit(0)
        reaper.look()  # children may have ended while there was nobody to be told
        if asker is not None:
            connection, request_id = asker
            connection.send(wire.encode_frame(wire.REPLY, request_id, requests.introduction), [])
    loop.run()


def _filter_system_calls(fd: int) -> None:
    # All agents of a server share the file, and so the offset in it: it is not moved.
    syscalls.install_filter(posix.pread(fd, posix.fstat(fd).st_size, 0))
    posix.close(fd)


def _make_defaults() -> Defaults:
    """Look at the container once.

    The only look at its files by PID 1 itself: what is mounted there now is the runtime's work, later it may be
    anybody's, and might hang.
    """
    nofile = rlimit.read_own_open_files()
    proc_fd = _open_directory(b"/proc")
    devpts_fd = _open_directory(b"/dev/pts")
    return Defaults(nofile, proc_fd if _is_protected_from_oom(proc_fd) else -1, devpts_fd)


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
