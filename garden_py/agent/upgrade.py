"""Putting another program in PID 1's place without anybody noticing. Imported when one is asked for.

    server                    this agent (PID 1)            a child                      the next agent (PID 1)
      |  request upgrade          |                            |
      |-------------------------->|  memfd with all we know    |
      |                           |--------------------------->|  exec new agent, `check`
      |                           |                            |  takes over, serves nothing
      |                           |      exit status           |
      |  error upgrade_failed     |<---------------------------|  not 0: nothing has changed
      |<- - - - - - - - - - - - - |
      |                           |  memfd anew, signals held, descriptors kept, execve `resume`
      |                           |--------------------------------------------------------->|
      |  reply, as to hello                                                                  |  takes over
      |<-------------------------------------------------------------------------------------|  reaps

The check runs the very code that will run in PID 1, on the very state, in the same namespaces. What can fail after it
is execve itself, and that returns.
"""

from __future__ import annotations

import posix

from garden_py import wire
from garden_py.agent import signals
from garden_py.agent.fields import InvalidField
from garden_py.agent.handover import Estate
from garden_py.agent.loop import describe_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from garden_py.agent.connection import Acceptor
    from garden_py.agent.fields import Fields
    from garden_py.agent.processes import Asker, ProcessTable
    from garden_py.agent.reap import Reaper
    from garden_py.agent.requests import Defaults

_CHECK_TIMEOUT_S = 20
_MAX_REASON_BYTES = 2000


class Successor:
    """The program to come."""

    def __init__(self, fields: Fields) -> None:
        self.build = fields.identifier("build")
        self.argv = fields.byte_strings("argv")
        if not self.argv or not self.argv[0].startswith(b"/"):
            raise InvalidField("argv", "must begin with the absolute path of a program")
        self.env = {}
        for assignment in fields.byte_strings("env"):
            name, _, value = assignment.partition(b"=")
            self.env[name] = value

    def execute(self, mode: bytes, estate: Estate, fd: int, *, listener_fd: int) -> None:
        """Become it; returns never, or raises OSError and has changed nothing but inheritable descriptors."""
        for kept in (listener_fd, fd, *estate.fds):
            posix.set_inheritable(kept, True)
        posix.execve(self.argv[0], [*self.argv, mode, b"%d" % fd], self.env)


class Upgrader:
    """Carries out one upgrade at a time; the latest one asked for."""

    def __init__(
        self,
        acceptor: Acceptor,
        table: ProcessTable,
        defaults: Defaults,
        reaper: Reaper,
        listener_fd: int,
    ) -> None:
        self._acceptor = acceptor
        self._table = table
        self._defaults = defaults
        self._reaper = reaper
        self._listener_fd = listener_fd
        self._asker: Asker | None = None

    def begin(self, asker: Asker, fields: Fields) -> None:
        """Run the check; what follows comes when it has ended.

        Raises:
            InvalidField: of the request.
            OSError: no memory, process or descriptor for the check.
        """
        successor = Successor(fields)
        if self._asker is not None:
            _refuse(self._asker, "another upgrade was asked for meanwhile")
        self._asker = None
        estate = Estate(self._acceptor, self._table, self._defaults, asker)
        state_fd = estate.pack()
        reading, writing = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        try:
            pid = posix.fork()
            if pid == 0:
                self._check(successor, estate, state_fd, writing)
        except OSError:
            posix.close(reading)
            raise
        finally:
            posix.close(state_fd)
            posix.close(writing)

        def on_end(status: int) -> None:
            try:
                said = posix.read(reading, _MAX_REASON_BYTES)
            except BlockingIOError:  # a child of its own still holds the pipe
                said = b""
            posix.close(reading)
            if self._asker is not asker:
                return
            self._asker = None
            if status == 0:
                self._replace(successor, asker)
            else:
                reason = said.decode("utf-8", "replace").strip() or f"wait status {status}"
                _refuse(asker, f"the check of agent {successor.build} failed: {reason}")

        self._asker = asker
        self._reaper.expect(pid, on_end)

    def _check(self, successor: Successor, estate: Estate, state_fd: int, said_fd: int) -> None:
        """In the forked child: never returns."""
        try:
            posix.dup2(said_fd, 2)
            # A check that hangs would hold duplicates of streams that their processes wait to see the end of.
            signals.end_after(_CHECK_TIMEOUT_S)
            successor.execute(b"check", estate, state_fd, listener_fd=self._listener_fd)
        except BaseException as error:  # noqa: BLE001 - nothing may carry the child back into PID 1's loop
            posix.write(2, describe_failure(error).encode("utf-8", "replace"))
        finally:
            posix._exit(1)

    def _replace(self, successor: Successor, asker: Asker) -> None:
        estate = Estate(self._acceptor, self._table, self._defaults, asker)
        state_fd = -1
        try:
            state_fd = estate.pack()
            signals.hold_all()
            successor.execute(b"resume", estate, state_fd, listener_fd=self._listener_fd)
        except OSError as error:
            for fd in (self._listener_fd, *estate.fds):
                posix.set_inheritable(fd, False)
            signals.release_all()
            if state_fd >= 0:
                posix.close(state_fd)
            _refuse(asker, f"agent {successor.build} cannot be executed: {error.strerror}")


def _refuse(asker: Asker, message: str) -> None:
    connection, request_id = asker
    connection.send(
        wire.encode_frame(wire.ERROR, request_id, {"code": "upgrade_failed", "message": message}), []
    )
