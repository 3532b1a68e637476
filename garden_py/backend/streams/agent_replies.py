"""What an agent says, taken apart. It is hostile input: everything is checked, cut and counted.

Descriptors are accepted only if they are what was asked for, and pipes are opened anew, so that the server holds no
open file description that something in the container holds, too.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Any

from garden_py import wire
from garden_py.backend.host.framed import Reply

_TEXT_MAX = 1024
_BUILD_MAX = 64
_STREAM_NAMES = ("stdin", "stdout", "stderr")
_PTY_MASTER_DEVICES = {(5, 2)}  # /dev/ptmx, admin-guide/devices.txt


@dataclass(frozen=True, slots=True)
class AgentExit:
    """A process's end as the agent tells it: a raw wait status, and CLOCK_REALTIME ns."""

    process_id: str
    status: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Greeting:
    """The answer to hello.

    Attributes:
        wire: the version it speaks, one of those that this server speaks.
        build: name of the bundle it was started from; empty in wire version 1.
        processes: those it holds, with the exits of those that have ended.
    """

    wire: int
    build: str
    processes: dict[str, AgentExit | None]


@dataclass(frozen=True, slots=True)
class Spawned:
    """A started process: pid as the container numbers it, and our ends of its streams by name."""

    pid: int
    fds: dict[str, int]
    exit: AgentExit | None = None


class AgentMisbehaved(Exception):
    """The agent's answer is not what the protocol allows."""


class ForeignWire(Exception):
    """The agent speaks a version of the protocol that this server does not; the message says which."""


def parse_greeting(value: dict[str, Any]) -> Greeting:
    """Take apart the answer to hello, or to an upgrade.

    Raises:
        AgentMisbehaved: it makes no sense.
        ForeignWire: it speaks a version that this server does not.
    """
    version, build = value.get("wire"), value.get("build", "")
    if not isinstance(version, int) or not isinstance(build, str):
        raise AgentMisbehaved("a greeting without its version")
    if not wire.OLDEST <= version <= wire.VERSION:
        raise ForeignWire(f"version {version}")
    found: dict[str, AgentExit | None] = {}
    for record in _list(value, "processes"):
        if isinstance(record, dict) and isinstance(record.get("id"), str):
            found[record["id"]] = parse_exit(record) if record.get("exited") is True else None
    return Greeting(version, printable(build[:_BUILD_MAX]), found)


def parse_spawned(reply: Reply, *, is_master: bool, is_complete: bool, is_tty: bool) -> Spawned:
    """Take over the descriptors of a started process; the reply holds none any more, whatever happens.

    Args:
        reply: to spawn or attach.
        is_master: stdin is a terminal's master (wire version 1), not a pipe.
        is_complete: every stream must be there; else some may have been given up.
        is_tty: there is no stderr of its own.

    Raises:
        AgentMisbehaved: it is not what was asked for.
        OSError: this server cannot open them.
    """
    try:
        names, wanted = reply.value.get("fds"), list(_STREAM_NAMES[: 2 if is_tty else 3])
        if not is_complete:
            wanted.append("spool")
        pid = reply.value.get("pid")
        if not isinstance(pid, int) or not 1 < pid < 1 << 31:
            raise AgentMisbehaved("a reply without a pid")
        if not isinstance(names, list) or [name for name in wanted if name in names] != names:
            raise AgentMisbehaved("descriptors that nobody asked for")
        if len(names) != len(reply.fds) or (is_complete and len(names) != len(wanted)):
            raise AgentMisbehaved("descriptors are missing")
        found = {str(name): fd for name, fd in zip(names, reply.fds, strict=True)}
        for name, fd in found.items():
            if name != "spool":  # which is checked by whoever makes use of it
                _check_stream(fd, is_terminal=is_master and name == "stdin")
                _own_description(fd, name)
    except BaseException:
        reply.close_fds()
        raise
    reply.fds.clear()  # taken over
    ended = parse_exit(reply.value) if reply.value.get("exited") is True else None
    return Spawned(pid, found, ended)


def parse_exit(record: dict[str, Any]) -> AgentExit | None:
    """The end that a record or an event tells of; None if it makes no sense."""
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


def printable(text: str) -> str:
    """Text from inside a container, cut and without control characters, fit for logs and terminals."""
    return "".join(c if c.isprintable() else "?" for c in text[:_TEXT_MAX])
