"""Processes of the host, told apart from later ones with the same number."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path


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
    fields = _read_stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def read_session(pid: int) -> int | None:
    """A process's session id (proc_pid_stat(5), field 6); None if there is no such process."""
    fields = _read_stat(pid)
    return int(fields[3]) if fields else None


def _read_stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty if there is no such process.

    The second field is the command name in parentheses, which may hold anything, parentheses too.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_wait_channel(pid: int) -> str:
    """Where in the kernel a process sleeps, as far as we may know; for messages."""
    fields = _read_stat(pid)
    try:
        return f"state {fields[0]}, wait channel {Path(f'/proc/{pid}/wchan').read_text() or 'unknown'}"
    except (IndexError, FileNotFoundError, ProcessLookupError):
        return "gone"


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
        if _has_ended(fd):
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


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
