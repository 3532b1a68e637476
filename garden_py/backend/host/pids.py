"""Processes of the host, told apart from later ones with the same number."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from garden_py.backend.host.small_files import read_small

_NAMED_MOST = 4
_PIDFD_INFO = struct.Struct("=Q52xi")  # mask, ids and credentials, exit_code
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_PIDFD_INFO_EXIT = 1 << 3


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A pid and its start time in clock ticks since boot (proc_pid_stat(5), field 22)."""

    pid: int
    start: int

    def open(self) -> int | None:
        """A pidfd of exactly this process; None if it has ended, reaped or not. The caller closes it."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if read_start_time(self.pid) == self.start:
            return fd
        os.close(fd)
        return None


def read_start_time(pid: int) -> int | None:
    """A process's start time in clock ticks since boot; None if there is no such process, or only its zombie."""
    fields = _read_stat(str(pid))
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def read_exit_status(pidfd: int, pid: int) -> int | None:
    """The wait status of an ended process that somebody else's child is; None if it is not known, or still runs.

    Args:
        pidfd: of the process; tells it once the process was reaped, since Linux 6.15.
        pid: of the same; its zombie tells it before.

    Source: PIDFD_GET_INFO, linux/pidfd.h; proc_pid_stat(5), field 52.
    """
    if (fields := _read_stat(str(pid))) and fields[0] == "Z" and has_ended(pidfd):
        return int(fields[-1])
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:  # an older kernel
        return None
    mask, status = _PIDFD_INFO.unpack(info)
    return status if mask & _PIDFD_INFO_EXIT else None


def describe_exit(status: int) -> str:
    """A wait status in words, as what follows "its PID 1"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        named = number < signal.SIGRTMIN  # of those beyond only two have names
        return f"was ended by signal {number}" + (f" ({signal.Signals(number).name})" if named else "")
    return f"has exited with status {os.waitstatus_to_exitcode(status)}"


def read_session(pid: int) -> int | None:
    """A process's session id (proc_pid_stat(5), field 6); None if there is no such process."""
    fields = _read_stat(str(pid))
    return int(fields[3]) if fields else None


def _read_stat(whose: str) -> list[str]:
    """Fields of /proc/PID/stat, or of a thread's, from the third (state) on; empty if there is no such process.

    The second field is the command name in parentheses, which may hold anything, parentheses too.
    """
    try:
        return read_small(f"/proc/{whose}/stat").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_wait_channel(pid: int) -> str:
    """Where in the kernel a process sleeps, as far as we may know; for messages."""
    stuck = read_stuck(pid)
    return "gone" if stuck is None else stuck.where


@dataclass(frozen=True, slots=True)
class Stuck:
    """A process that does not end.

    Attributes:
        state: one letter of proc_pid_stat(5); D is a sleep that SIGKILL does not end.
        wait_channel: the function of the kernel that it sleeps in; "0": none (proc_pid_wchan(5)).
    """

    pid: int
    state: str
    wait_channel: str

    @property
    def where(self) -> str:
        """State and wait channel, for messages."""
        return f"state {self.state}, wait channel {self.wait_channel or 'unknown'}"


def read_stuck(pid: int) -> Stuck | None:
    """A process as one of its threads has it that SIGKILL does not end, else as its first; None if it is gone."""
    found: Stuck | None = None
    try:
        for thread in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
            fields = _read_stat(f"{pid}/task/{thread}")
            if fields and (found is None or fields[0] == "D"):
                found = Stuck(pid, fields[0], Path(f"/proc/{pid}/task/{thread}/wchan").read_text())
                if found.state == "D":
                    return found
    except (FileNotFoundError, ProcessLookupError):
        return found
    return found


def describe_stuck(processes: Collection[Stuck], init: int = 0) -> str:
    """A sentence about processes that do not end: those that hold up the others.

    Args:
        processes: all that are left.
        init: PID 1, which cannot end before the others (pid_namespaces(7)); 0: it is none of them.
    """
    left = [each for each in processes if each.pid != init] or list(processes)
    named = [each for each in left if each.state == "D"] or left
    told = [f"{each.pid} ({each.where})" for each in named[:_NAMED_MOST]]
    if len(named) > _NAMED_MOST:
        told.append(f"{len(named) - _NAMED_MOST} more")
    if named and named[0].pid == init:
        return f"PID 1 does not end: {told[0]}"
    if len(told) == 1:
        return f"process {told[0]} does not end"
    return (
        f"processes {', '.join(told[:-1])} and {told[-1]} do not end"
        if told
        else "its processes have just ended"
    )


async def kill_and_wait(identity: ProcessIdentity, *, timeout_s: float) -> bool:
    """SIGKILL a process and wait for its end; False if it is still there after timeout_s seconds."""
    fd = identity.open()
    if fd is None:
        return True
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def readable() -> None:
        loop.remove_reader(fd)
        if not ended.done():
            ended.set_result(None)

    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        if has_ended(fd):
            return True
        loop.add_reader(fd, readable)
        async with asyncio.timeout(timeout_s):
            await ended
        return True
    except ProcessLookupError:
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
