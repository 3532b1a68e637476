"""Requests of the server: each is checked field by field, then acted on, then answered.

A bad request becomes an error frame and changes nothing. See `garden_py.wire` for all messages.
"""

from __future__ import annotations

import posix

from garden_py import wire
from garden_py.agent import pty, rlimit
from garden_py.agent.child import Plan
from garden_py.agent.fields import Fields, InvalidField
from garden_py.agent.loop import describe_failure, log
from garden_py.agent.signals import LAST_SIGNAL, SIGKILL
from garden_py.agent.spawn import SpawnError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from garden_py.agent.connection import Connection
    from garden_py.agent.processes import Asker, Process, ProcessTable
    from garden_py.agent.spawn import Spawner
    from garden_py.wire import Frame, Value

AGENT_VERSION = "2"

_PROGRAMS = ("tar-in", "tar-out")
_MAX_DIMENSION = 65535  # struct winsize holds unsigned shorts, ioctl_tty(2)


class RequestError(Exception):
    """The request cannot be served; becomes an error frame."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Defaults:
    """What every child starts with.

    Attributes:
        nofile: (soft, hard) limit of open files.
        proc_fd: see `Plan.proc_fd`.
        devpts_fd: directory with ptmx, or -1.
    """

    def __init__(self, nofile: tuple[int, int], proc_fd: int, devpts_fd: int) -> None:
        self.nofile = nofile
        self.proc_fd = proc_fd
        self.devpts_fd = devpts_fd


class Requests:
    """Serves the requests of all connections.

    Args:
        build: name of the bundle that this program is from.
        on_upgrade: called with the asker and the fields of an upgrade request; it answers by itself, later.
    """

    def __init__(
        self,
        build: str,
        table: ProcessTable,
        spawner: Spawner,
        defaults: Defaults,
        on_upgrade: Callable[[Asker, Fields], None],
    ) -> None:
        self._build = build
        self._table = table
        self._spawner = spawner
        self._defaults = defaults
        self._on_upgrade = on_upgrade
        self._operations: dict[str, Callable[[Fields], tuple[dict[str, Value], list[int]]]] = {
            "hello": self._hello,
            "ping": self._ping,
            "list": self._list,
            "attach": self._attach,
            "close_stdin": self._close_stdin,
            "drop_output": self._drop_output,
            "signal": self._signal,
            "signal_all": self._signal_all,
            "resize": self._resize,
            "release": self._release,
            "cancel": self._cancel,
        }

    def handle(self, connection: Connection, frame: Frame, fds: list[int]) -> None:
        """Serve one request; `fds` came with it and are closed by the caller afterwards."""
        try:
            fields = Fields(frame.value)
            operation = fields.text("op")
            if operation == "spawn":
                self._spawn(connection, frame.id, fields, fds)  # answered when the child has executed
                return
            if operation == "keep":
                self._keep(connection, frame.id, fields, fds)
                return
            if operation == "upgrade":
                self._on_upgrade((connection, frame.id), fields)
                return
            if operation not in self._operations:
                raise InvalidField("op", f"unknown operation {operation[:40]!r}")
            reply, reply_fds = self._operations[operation](fields)
        except InvalidField as error:
            details: dict[str, Value] = {
                "code": "invalid_request",
                "message": str(error),
                "field": error.field,
            }
        except RequestError as error:
            details = {"code": error.code, "message": str(error)}
        except SpawnError as error:
            details = error.details
        except Exception as error:  # noqa: BLE001 - a bug of ours must neither end PID 1 nor go unanswered
            log(f"unexpected {describe_failure(error)}")
            details = {"code": "internal", "message": describe_failure(error)}
        else:
            connection.send(wire.encode_frame(wire.REPLY, frame.id, reply, len(reply_fds)), reply_fds)
            return
        connection.send(wire.encode_frame(wire.ERROR, frame.id, details), [])

    def _hello(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        fields.text("server")
        lowest, highest = fields.integer_pair("wire")
        if not lowest <= wire.VERSION <= highest:
            raise RequestError("unsupported_wire", f"this agent speaks version {wire.VERSION} only")
        return {**self.introduction, "processes": self._table.records()}, []

    @property
    def introduction(self) -> dict[str, Value]:
        """Who we are: part of the answer to hello, and the answer to an upgrade that brought us here."""
        return {"agent": AGENT_VERSION, "wire": wire.VERSION, "build": self._build}

    def _ping(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        return {}, []

    def _list(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        return {"processes": self._table.records()}, []

    def _spawn(self, connection: Connection, request_id: int, fields: Fields, fds: list[int]) -> None:
        id = fields.identifier("id")
        plan = _parse_plan(fields)
        tty = fields.optional_mapping("tty")
        size = None if tty is None else _parse_size(Fields(tty, "tty."))
        if id in self._table.by_id:
            raise RequestError("process_exists", f"process ID '{id}' already in use")
        plan.cgroup_fds = list(fds)
        if fields.boolean("gated"):
            if not fds:
                raise InvalidField("gated", "no descriptor came with it")
            plan.gate_fd = plan.cgroup_fds.pop()
        plan.nofile = self._defaults.nofile
        plan.proc_fd = self._defaults.proc_fd
        self._spawner.spawn(id, plan, size, (connection, request_id))

    def _attach(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        process = self._find(fields)
        reply = process.record()
        reply["fds"] = list(process.ends)
        return reply, list(process.ends.values())

    def _keep(self, connection: Connection, request_id: int, fields: Fields, fds: list[int]) -> None:
        process = self._find(fields)
        if len(fds) != 1:
            raise InvalidField("id", "one descriptor must come with it")
        if process.exited or "spool" in process.ends:
            raise RequestError("not_kept", f"process '{process.id}' has ended, or has a spool already")
        try:
            process.ends["spool"] = self._spawner.duplicate(fds[0])
        except OSError as error:
            raise RequestError("not_kept", f"no descriptor is free: {error.strerror}") from error
        connection.send(wire.encode_frame(wire.REPLY, request_id, {}), [])

    def _close_stdin(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        process = self._find(fields)
        # A terminal's stdin is the master, which its output needs; its end of file is a typed ^D.
        return {"closed": process.terminal is None and process.close_end("stdin")}, []

    def _drop_output(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        stream = fields.choice("stream", ("stdout", "stderr"))
        return {"dropped": self._find(fields).close_end(stream)}, []

    def _signal(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        number = fields.integer("signal", 1, LAST_SIGNAL)
        to_group = fields.boolean("group")
        process = self._find(fields)
        return {"delivered": _kill(process, number, to_group=to_group)}, []

    def _signal_all(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        number = fields.integer("signal", 1, LAST_SIGNAL)
        if posix.getpid() != 1:
            # kill(2) with -1 would reach everything in somebody else's pid namespace.
            raise RequestError("not_init", "this agent is not the first process of its pid namespace")
        try:
            posix.kill(-1, number)
        except ProcessLookupError:
            return {"delivered": False}, []
        return {"delivered": True}, []

    def _resize(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        rows, columns = _parse_size(fields)
        process = self._find(fields)
        if process.terminal is None:
            raise RequestError("no_tty", f"process '{process.id}' has no terminal")
        process.terminal.resize(rows, columns)
        return {}, []

    def _release(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        process = self._find(fields)
        if not process.exited:
            raise RequestError("still_running", f"process '{process.id}' has not exited")
        self._table.forget(process)
        return {}, []

    def _cancel(self, fields: Fields) -> tuple[dict[str, Value], list[int]]:
        process = self._table.by_id.get(fields.identifier("id"))
        if process is None:
            return {"found": False}, []
        process.cancelled = True
        if process.exited:
            self._table.forget(process)
        else:
            _kill(process, SIGKILL, to_group=True)
        return {"found": True}, []

    def _find(self, fields: Fields) -> Process:
        id = fields.identifier("id")
        process = self._table.by_id.get(id)
        if process is None:
            raise RequestError("process_not_found", f"unknown process: {id}")
        return process


def _kill(process: Process, number: int, *, to_group: bool) -> bool:
    """Signal a process or its group; False if there is nobody any more."""
    if process.exited:
        return False
    try:
        # The pid is not reaped, so it is not reused. A child too young to lead its group has no children.
        if to_group and not process.starting:
            posix.killpg(process.pid, number)
        else:
            posix.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def answer_spawn(process: Process, failure: dict[str, Value] | None) -> None:
    """Tell whoever asked for a process that it runs, or why not."""
    asker, process.asker = process.asker, None
    if asker is None:  # it has left, so there is nobody to tell
        return
    connection, request_id = asker
    if failure is None and process.cancelled:
        failure = {"code": "cancelled", "message": "the request was cancelled", "step": "start"}
    if failure is not None:
        connection.send(wire.encode_frame(wire.ERROR, request_id, failure), [])
        return
    reply: dict[str, Value] = {"pid": process.pid, "fds": list(process.ends)}
    ends = list(process.ends.values())
    connection.send(wire.encode_frame(wire.REPLY, request_id, reply, len(ends)), ends)


def exit_event(process: Process) -> bytes:
    """The frame that tells of a process's end."""
    event = {
        "event": "exited",
        "process": process.id,
        "status": process.status,
        "ended_ns": process.ended_ns,
    }
    return wire.encode_frame(wire.EVENT, 0, event)


def _parse_size(fields: Fields) -> tuple[int, int]:
    return (
        fields.integer("rows", 0, _MAX_DIMENSION) or pty.DEFAULT_ROWS,
        fields.integer("columns", 0, _MAX_DIMENSION) or pty.DEFAULT_COLUMNS,
    )


def _parse_plan(fields: Fields) -> Plan:
    plan = Plan()
    plan.argv = fields.byte_strings("argv")
    plan.env = fields.byte_strings("env")
    for index, assignment in enumerate(plan.env):
        if assignment.find(b"=") < 1:
            raise InvalidField(f"env[{index}]", "must be NAME=value with a name")
    plan.dir = fields.byte_string("dir")
    plan.user = fields.text("user", max_length=255)
    plan.primary_group_only = fields.optional_choice("groups", ("primary",)) is not None
    try:
        plan.limits = rlimit.parse_limits(fields.mapping("rlimits"))
    except rlimit.BadLimit as error:
        raise RequestError("bad_rlimit", str(error)) from error
    plan.bounding = fields.optional_integer("bounding", 0)
    plan.no_new_privs = fields.boolean("no_new_privs")
    plan.program = fields.optional_choice("program", _PROGRAMS)
    if plan.program is None:
        if not plan.argv or not plan.argv[0]:
            raise InvalidField("argv", "must begin with the executable")
    else:
        if plan.argv:
            raise InvalidField("argv", "must be empty with a built-in program")
        plan.program_path = Fields(fields.mapping("program_args"), "program_args.").byte_string("path")
        if not plan.program_path:
            raise InvalidField("program_args.path", "must not be empty")
    return plan
