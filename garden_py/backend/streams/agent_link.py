"""The server's conversation with one container's agent. What the agent says is hostile input.

Nothing it sends becomes a path, a pid the server acts on, or unbounded memory: texts are cut, numbers checked,
descriptors are accepted only if they are what was asked for.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garden_py import wire
from garden_py.backend.host.framed import FramedLink, LinkClosed, Reply, RequestRefused
from garden_py.model import errors
from garden_py.model.process import ProcessSpec

REQUEST_TIMEOUT_S = 10.0
SPAWN_TIMEOUT_S = 30.0
_TEXT_MAX = 1024
_STREAM_NAMES = ("stdin", "stdout", "stderr")
_PTY_MASTER_DEVICES = {(5, 2)}  # /dev/ptmx, admin-guide/devices.txt


@dataclass(frozen=True, slots=True)
class AgentExit:
    """A process's end as the agent tells it: a raw wait status, and CLOCK_REALTIME ns."""

    process_id: str
    status: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Spawned:
    """A started process: pid as the container numbers it, and our ends of its streams by name."""

    pid: int
    fds: dict[str, int]
    exit: AgentExit | None = None


class AgentMisbehaved(Exception):
    """The agent's answer is not what the protocol allows."""


class AgentLink:
    """Requests to one agent, typed.

    Args:
        handle: of the container, for errors.
        on_exit: called for each process end the agent reports.
        on_lost: called once if the connection ends by itself, with the reason.
    """

    def __init__(
        self,
        handle: str,
        sock: socket.socket,
        *,
        on_exit: Callable[[AgentExit], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._handle = handle
        self._on_exit = on_exit
        self._link = FramedLink(sock, on_event=self._event, on_close=on_lost)

    @classmethod
    def connect(
        cls, handle: str, path: Path, *, on_exit: Callable[[AgentExit], None], on_lost: Callable[[str], None]
    ) -> AgentLink:
        """Connect to an agent's socket, which listens before the agent even runs.

        Raises:
            OSError: nothing listens there.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            sock.close()
            raise
        return cls(handle, sock, on_exit=on_exit, on_lost=on_lost)

    @property
    def is_open(self) -> bool:
        """Whether the connection stands."""
        return self._link.is_open

    def close(self) -> None:
        """Disconnect; the agent and its processes do not notice."""
        self._link.close()

    def _event(self, value: dict[str, Any]) -> None:
        if value.get("event") != "exited":
            return
        found = _parse_exit({"id": value.get("process"), **value})
        if found is not None:
            self._on_exit(found)

    async def _ask(self, value: dict[str, Any], fds: list[int] | None = None, *, timeout_s: float) -> Reply:
        try:
            return await self._link.request(value, fds, timeout_s=timeout_s)
        except LinkClosed as error:
            raise errors.ContainerBroken(self._handle, f"its agent is gone ({error})") from error
        except TimeoutError as error:
            raise errors.ContainerBroken(
                self._handle, f"its agent gave no answer in {timeout_s:g} s"
            ) from error

    async def hello(self, *, server: str, timeout_s: float) -> dict[str, AgentExit | None]:
        """Greet the agent; returns when it runs.

        Returns:
            The processes it holds, with the exits of those that have ended.
        """
        greeting = {"op": "hello", "server": server, "wire": [wire.VERSION, wire.VERSION]}
        try:
            reply = await self._ask(greeting, timeout_s=timeout_s)
        except RequestRefused as error:
            raise self._refused(error) from error
        reply.close_fds()
        found: dict[str, AgentExit | None] = {}
        for record in _list(reply.value, "processes"):
            if isinstance(record, dict) and isinstance(record.get("id"), str):
                found[record["id"]] = _parse_exit(record) if record.get("exited") is True else None
        return found

    async def spawn(
        self,
        spec: ProcessSpec,
        env: tuple[str, ...],
        cgroup_fds: list[int],
        *,
        bounding: int | None,
        program: str | None = None,
        program_path: str = "",
    ) -> Spawned:
        """Start a process.

        Args:
            spec: with id filled in.
            env: entries in order, later wins; the agent adds PATH, HOME and USER.
            cgroup_fds: cgroup.procs files it joins.
            bounding: capability mask it keeps; None: all of the container's.
            program: "tar-in" or "tar-out" instead of the spec's path.
            program_path: its argument.

        Raises:
            GardenError: as service.ports.Backend.start_process.
        """
        argv = [] if program else [os.fsencode(text) for text in (spec.path, *spec.args)]
        request: dict[str, Any] = {
            "op": "spawn",
            "id": spec.id,
            "argv": argv,
            "env": [os.fsencode(entry) for entry in env],
            "dir": os.fsencode(spec.dir),
            "user": spec.user,
            "tty": None if spec.tty is None else {"rows": spec.tty.rows, "columns": spec.tty.columns},
            "rlimits": {name: _signed(value) for name, value in spec.rlimits},
            "bounding": bounding,
            "no_new_privs": False,
            "program": program,
            "program_args": {"path": os.fsencode(program_path)} if program else {},
        }
        try:
            reply = await self._ask(request, cgroup_fds, timeout_s=SPAWN_TIMEOUT_S)
        except RequestRefused as error:
            raise self._spawn_error(spec, error) from error
        return self._parse_spawned(reply, is_tty=spec.tty is not None)

    async def attach(self, process_id: str, *, is_tty: bool) -> Spawned:
        """Our ends of a running or finished process's streams again, those not yet dropped."""
        try:
            reply = await self._ask({"op": "attach", "id": process_id}, timeout_s=REQUEST_TIMEOUT_S)
        except RequestRefused as error:
            raise self._refused(error) from error
        return self._parse_spawned(reply, is_tty=is_tty)

    def _refused(self, error: RequestRefused) -> errors.ContainerBroken:
        return errors.ContainerBroken(self._handle, f"its agent refuses: {_printable(str(error))}")

    def _parse_spawned(self, reply: Reply, *, is_tty: bool) -> Spawned:
        try:
            names = _list(reply.value, "fds")
            pid = reply.value.get("pid")
            if not isinstance(pid, int) or not 1 < pid < 1 << 31:
                raise AgentMisbehaved("a reply without a pid")
            if len(names) != len(reply.fds) or any(name not in _STREAM_NAMES for name in names):
                raise AgentMisbehaved("descriptors that nobody asked for")
            found = {str(name): fd for name, fd in zip(names, reply.fds, strict=True)}
            for name, fd in found.items():
                _check_stream(fd, is_terminal=is_tty and name == "stdin")
                _own_description(fd, name)
        except AgentMisbehaved as error:
            reply.close_fds()
            raise errors.ContainerBroken(self._handle, f"its agent misbehaves: {error}") from error
        except OSError as error:
            reply.close_fds()
            raise errors.HostFault("take over streams", str(error)) from error
        reply.fds.clear()  # taken over
        ended = _parse_exit(reply.value) if reply.value.get("exited") is True else None
        return Spawned(pid, found, ended)

    def _spawn_error(self, spec: ProcessSpec, error: RequestRefused) -> errors.GardenError:
        message = _printable(str(error))
        match error.code:
            case "executable_not_found":
                return errors.ExecutableNotFound(message)
            case "not_executable":
                return errors.NotExecutable(message)
            case "user_not_found" | "group_not_found":
                return errors.UserNotFound(message)
            case "process_exists":
                return errors.ProcessIdInUse(self._handle, spec.id)
            case "bad_rlimit":
                return errors.InvalidField("spec.rlimits", message)
            case "bad_user":
                return errors.InvalidField("spec.user", message)
            case "bad_directory":
                return errors.InvalidField("spec.dir", message)
            case "invalid_request":
                return errors.InvalidField(f"spec.{_printable(str(error.data.get('field', '')))}", message)
            case _:
                return errors.ProcessStartFailed(message)

    async def _tell(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """A request about a process that may be gone already; None if it is."""
        try:
            reply = await self._ask(value, timeout_s=REQUEST_TIMEOUT_S)
        except RequestRefused as error:
            if error.code in ("process_not_found", "still_running", "no_tty"):
                return None
            raise self._refused(error) from error
        reply.close_fds()
        return reply.value

    async def signal(self, process_id: str, number: int, *, group: bool) -> bool:
        """Send a signal; False if the process is gone."""
        answer = await self._tell({"op": "signal", "id": process_id, "signal": int(number), "group": group})
        return answer is not None and answer.get("delivered") is True

    async def signal_all(self, number: int) -> None:
        """Signal every process of the container but PID 1."""
        await self._tell({"op": "signal_all", "signal": int(number)})

    async def close_stdin(self, process_id: str) -> None:
        """Have the agent drop its duplicate of stdin, so that the process sees the end."""
        await self._tell({"op": "close_stdin", "id": process_id})

    async def release(self, process_id: str) -> None:
        """Let the agent forget a finished process whose exit is in the journal."""
        await self._tell({"op": "release", "id": process_id})


def _parse_exit(record: dict[str, Any]) -> AgentExit | None:
    process_id, status, ended_ns = record.get("id"), record.get("status"), record.get("ended_ns")
    if not isinstance(process_id, str) or not isinstance(status, int) or not isinstance(ended_ns, int):
        return None
    return AgentExit(process_id, status & 0xFFFF, max(0, ended_ns))


def _list(value: dict[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []


def _check_stream(fd: int, *, is_terminal: bool) -> None:
    """Accept a pipe, or a terminal's master where one was asked for."""
    found = os.fstat(fd)
    if is_terminal:
        device = (os.major(found.st_rdev), os.minor(found.st_rdev))
        if not stat.S_ISCHR(found.st_mode) or device not in _PTY_MASTER_DEVICES:
            raise AgentMisbehaved("a descriptor that is no terminal")
    elif not stat.S_ISFIFO(found.st_mode):
        raise AgentMisbehaved("a descriptor that is no pipe")


def _own_description(fd: int, name: str) -> None:
    """Put a pipe opened anew in fd's place; a stdin that nobody can read any more becomes /dev/null.

    The agent holds the same open file description as fd, so it could clear O_NONBLOCK (fcntl(2), F_SETFL) and hold the
    whole server in one write. A terminal's master cannot be opened a second time: /dev/ptmx makes a new pair (pts(4)).
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return
    mode = os.O_WRONLY if name == "stdin" else os.O_RDONLY
    try:
        own = os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe without a reader, fifo(7)
            raise
        own = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(own, fd, inheritable=False)
    finally:
        os.close(own)


def _printable(text: str) -> str:
    """Text from inside a container, cut and without control characters, fit for logs and terminals."""
    return "".join(c if c.isprintable() else "?" for c in text[:_TEXT_MAX])


def _signed(value: int) -> int:
    """An rlimit as the wire carries it: RLIM_INFINITY (2^64-1) is -1, as in resource.RLIM_INFINITY."""
    return value - (1 << 64) if value >= 1 << 63 else value
