"""What an agent leaves to the program that takes its place, and how that one goes on with it.

An upgrade executes another program in PID 1 (see `upgrade`). Descriptors and children stay what they are through
execve(2); everything else is written here into a memfd: the table of processes with the exits that no server has
acknowledged, terminals with the bytes they hold, connections with half-received and half-sent frames.

A child that ends meanwhile is a zombie until the next program reaps it: wait(2) loses nothing to an exec, and the
disposition of SIGCHLD is never "ignore", which would.

The format is one encoded dict (garden_py.wire). It is read by another version of this module: a new key needs a default
in `take_over`, and whatever an older reader would get wrong without understanding it needs another FORMAT.
"""

from __future__ import annotations

import posix

from garden_py import wire
from garden_py.agent.processes import Process
from garden_py.agent.pty import Terminal
from garden_py.agent.requests import Defaults

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from garden_py.agent.connection import Acceptor
    from garden_py.agent.loop import Loop
    from garden_py.agent.processes import Asker, ProcessTable
    from garden_py.agent.spawn import Spawner
    from garden_py.wire import Value

FORMAT = 1
_MFD_CLOEXEC, _MFD_NOEXEC_SEAL = 1, 8  # memfd_create(2); sysctl vm.memfd_noexec=2 demands the latter
_READ_BYTES = 1 << 20


class HandoverError(Exception):
    """What the earlier program left cannot be taken over."""


class Estate:
    """Everything that one program leaves to the next.

    Attributes:
        state: the values; `pack` makes the memfd's content of them.
        fds: descriptors named in it, which must stay open across the exec.
    """

    def __init__(
        self, acceptor: Acceptor, table: ProcessTable, defaults: Defaults, asker: Asker | None
    ) -> None:
        self.fds: list[int] = []
        connections = acceptor.connections
        self._places = {id(connection): index for index, connection in enumerate(connections)}
        self.state: dict[str, Value] = {
            "format": FORMAT,
            "nofile": list(defaults.nofile),
            "proc_fd": self._keep(defaults.proc_fd),
            "devpts_fd": self._keep(defaults.devpts_fd),
            "connections": [dict(connection.hand_over(self._keep)) for connection in connections],
            "processes": [self._process(process) for process in table.by_id.values()],
            "loose": [terminal.hand_over(self._keep) for terminal in table.loose],
            "asker": self._asker(asker),
        }

    def _keep(self, fd: int) -> int:
        if fd >= 0:
            self.fds.append(fd)
        return fd

    def _asker(self, asker: Asker | None) -> list[Value] | None:
        if asker is None or id(asker[0]) not in self._places:
            return None
        return [self._places[id(asker[0])], asker[1]]

    def _process(self, process: Process) -> dict[str, Value]:
        ends: dict[str, Value] = {name: self._keep(fd) for name, fd in process.ends.items()}
        return {
            "id": process.id,
            "pid": process.pid,
            "started_ns": process.started_ns,
            "status": process.status,
            "ended_ns": process.ended_ns,
            "cancelled": process.cancelled,
            "status_fd": self._keep(process.status_fd),
            "asker": self._asker(process.asker),
            "ends": ends,
            "terminal": None if process.terminal is None else process.terminal.hand_over(self._keep),
        }

    def pack(self) -> int:
        """A memfd with the state, close-on-exec."""
        try:
            fd = posix.memfd_create("garden-estate", _MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
        except OSError:  # EINVAL: older than Linux 6.3
            fd = posix.memfd_create("garden-estate", _MFD_CLOEXEC)
        try:
            rest = memoryview(wire.encode(self.state))
            while rest:
                rest = rest[posix.write(fd, rest) :]
        except BaseException:
            posix.close(fd)
            raise
        return fd


def unpack(fd: int) -> dict[str, Any]:
    """The state in a memfd.

    Raises:
        HandoverError: it is of a format that this program does not know.
        WireError, OSError: it is none at all.
    """
    data = b""
    while more := posix.pread(
        fd, _READ_BYTES, len(data)
    ):  # its offset is shared with the program that wrote it
        data += more
    state = wire.decode(data)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise HandoverError("the running agent leaves its state in a format that this one does not know")
    for known in _descriptors(state):
        posix.set_inheritable(known, False)
    return state


def _descriptors(value: object) -> list[int]:
    """Every descriptor in the state: the exec had to make them inheritable, and nobody else may inherit them."""
    found: list[int] = []
    if isinstance(value, list):
        for item in value:
            found += _descriptors(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("fd", "proc_fd", "devpts_fd", "status_fd"):
                found.append(item)
            elif key in ("fds", "ends"):
                found += item.values() if isinstance(item, dict) else item
            elif key == "queue":
                found += [fd for _, fds in item for fd in fds]
            else:
                found += _descriptors(item)
    return [fd for fd in found if fd >= 0]


def take_defaults(state: dict[str, Any]) -> Defaults:
    """What every child starts with."""
    soft, hard = state["nofile"]
    return Defaults((soft, hard), state["proc_fd"], state["devpts_fd"])


def take_over(
    state: dict[str, Any], loop: Loop, table: ProcessTable, spawner: Spawner, acceptor: Acceptor
) -> Asker | None:
    """Put everything in its place again; nothing is read, written or waited for yet.

    Returns:
        Who asked for the upgrade, if it is still there.
    """
    connections = []
    for each in state["connections"]:
        connection = acceptor.add(each["fd"])
        connection.take_over(each)
        connections.append(connection)

    def find(asker: list[int] | None) -> Asker | None:
        return None if asker is None else (connections[asker[0]], asker[1])

    for each in state["processes"]:
        terminal = None if each["terminal"] is None else Terminal.take_over(each["terminal"], loop)
        process = Process(
            each["id"], each["pid"], each["started_ns"], each["ends"], terminal, each["status_fd"]
        )
        process.status, process.ended_ns = each["status"], each["ended_ns"]
        process.cancelled, process.asker = each["cancelled"], find(each["asker"])
        table.add(process)
        if process.starting:
            spawner.watch(process)
    for each in state["loose"]:
        table.let_finish(Terminal.take_over(each, loop))
    return find(state["asker"])
