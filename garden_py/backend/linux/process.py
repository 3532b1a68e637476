"""A process in a container, from its start to long after its end; implements service.ports.RunningProcess."""

from __future__ import annotations

import asyncio
import os
import signal as _signal
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.streams.agent_link import AgentLink
from garden_py.backend.streams.agent_replies import AgentExit, Spawned
from garden_py.backend.streams.pump import Pump
from garden_py.backend.streams.segments import SegmentLog
from garden_py.backend.streams.spool import NoSpool, Spool
from garden_py.backend.streams.stdin import StdinFeed
from garden_py.model.errors import ContainerBroken, NoTty, ProcessExited
from garden_py.model.process import ExitStatus, OutputStream, ProcessSpec, WindowSize, signal_name

log = structlog.get_logger()
_SIGKILL_SHELL_CODE = 128 + _signal.SIGKILL
_BURST_S = 1.0


class OomAccount:
    """The OOM kills of one cgroup, each of which explains at most one process's end.

    Processes without limits of their own share a group, so its counter alone does not tell whom it was. Not every kill
    ends one: the victim may be a process's child. So kills that explain nothing within a second of a process's end
    which another one explains are taken for such.

    Args:
        read: how many tasks of the group the OOM killer has ended so far.
        now_s: a clock.
    """

    def __init__(self, read: Callable[[], int], now_s: Callable[[], float] = time.monotonic) -> None:
        self.read = read
        self._now_s = now_s
        self._explained = 0
        self._burst, self._burst_ends_s = 0, 0.0

    def explains_another(self) -> None:
        """An earlier server has taken one more for the reason of a process's end."""
        self._explained += 1

    def claim(self, before: int) -> bool:
        """Whether there was a kill since `before` that explains no other process's end."""
        kills, now_s = self.read(), self._now_s()
        if now_s > self._burst_ends_s:
            self._explained = max(self._explained, self._burst)
        explained = max(before, self._explained)
        if kills <= explained:
            return False
        self._explained = explained + 1
        self._burst, self._burst_ends_s = kills, now_s + _BURST_S
        return True


class LinuxProcess:
    """One process. The pumps run from the start; exit and end of output are two facts.

    Args:
        spec: with id filled in.
        pid: as the container numbers it.
        directory: of its segment files.
        oom: of its cgroup.
        describe_oom: a sentence about the limit that was hit.
        drop_group: removes its own cgroup, if it has one.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        pid: int,
        started_ns: int,
        directory: Path,
        retention_bytes: int,
        recover: bool,
        link: AgentLink | None,
        oom: OomAccount,
        describe_oom: Callable[[], str],
        drop_group: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.pid = pid
        self.started_ns = started_ns
        self.exit: ExitStatus | None = None
        self.own_group = spec.has_own_group
        self._recovered = recover
        self._link = link
        self._oom = oom
        self._describe_oom = describe_oom
        self._drop_group = drop_group
        self._oom_before = 0 if self.own_group or link is None else oom.read()
        self._killed_by_caller = False
        self._exited = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stdin = StdinFeed(spec.id, -1, is_tty=spec.tty is not None, counted=not recover)
        self._pumps: dict[OutputStream, Pump] = {}
        retention = spec.output_retention_bytes or retention_bytes
        self.logs = {
            s: SegmentLog(directory, s.value, retention_bytes=retention, recover=recover)
            for s in OutputStream
        }
        self.directory = directory

    @property
    def id(self) -> str:
        """The process's name in its container."""
        return self.spec.id

    @property
    def is_drained(self) -> bool:
        """Whether no more output can come."""
        return not self._pumps

    def connect(self, spawned: Spawned, on_error: Callable[[str], None]) -> None:
        """Take over the process's stream descriptors; streams without one are closed."""
        self._stdin = self._connect_stdin(spawned)
        for stream, log in self.logs.items():
            fd = spawned.fds.get(stream.value)
            if fd is None:
                log.close()
            else:
                self._pumps[stream] = Pump(fd, log, on_end=self._ended(stream), on_error=on_error)

    def _connect_stdin(self, spawned: Spawned) -> StdinFeed:
        spool, link, is_tty = None, self._link, self.spec.tty is not None
        if (spool_fd := spawned.fds.get("spool", -1)) >= 0:
            try:
                spool = Spool(spool_fd)
            except NoSpool as error:
                os.close(spool_fd)
                log.warning("stdin.no_spool", process_id=self.id, error=str(error))
        # An agent of wire version 1 keeps no spool, and its terminals' input is the master.
        keep = partial(link.keep_spool, self.id) if link is not None and link.wire >= 2 else None
        return StdinFeed(
            self.spec.id,
            spawned.fds.get("stdin", -1),
            is_tty=is_tty,
            is_master=is_tty and keep is None,
            spool=spool,
            keep=keep,
            counted=keep is not None or not self._recovered,
            on_end=self._stdin_fed,
        )

    def _stdin_fed(self) -> None:
        """All input was fed: the agent's duplicate is the last that keeps the process from seeing the end."""
        if self.spec.tty is None and self._link is not None and self.exit is None:
            self._start(self._link.close_stdin(self.id))

    def _ended(self, stream: OutputStream) -> Callable[[], None]:
        def ended() -> None:
            self._pumps.pop(stream, None)
            self._release_when_done()

        return ended

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(_quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the end

    def ended(self, told: AgentExit) -> ExitStatus:
        """Take the agent's report; output that was written before is in the logs when this returns."""
        for pump in list(self._pumps.values()):
            pump.drain()
        self.finish(self._judge(told))
        assert self.exit is not None
        return self.exit

    def ended_unseen(self, told: AgentExit) -> ExitStatus:
        """As `ended`, of one that did while there was no server, which would have seen an OOM kill before it."""
        self._oom_before = 0
        return self.ended(told)

    def finish(self, status: ExitStatus) -> None:
        """Set the exit status and wake everybody who waits for it."""
        self.exit = status
        self._stdin.release()
        self._exited.set()
        for log in self.logs.values():
            log.wake_readers()

    def exit_recorded(self) -> None:
        """The exit is in the journal: the agent may forget the process once its output has been read."""
        if self.own_group:
            self._drop_group()
        self._release_when_done()

    def _release_when_done(self) -> None:
        if self.exit is not None and not self._pumps and self._link is not None and self._link.is_open:
            self._start(self._link.release(self.id))
            self._link = None

    def _judge(self, told: AgentExit) -> ExitStatus:
        signaled = os.WIFSIGNALED(told.status)
        code = None if signaled else os.WEXITSTATUS(told.status)
        number = os.WTERMSIG(told.status) if signaled else None
        killed = number == _signal.SIGKILL or code == _SIGKILL_SHELL_CODE
        if killed and not self._killed_by_caller and self._oom.claim(self._oom_before):
            return ExitStatus(
                code, number, True, told.ended_ns, f"killed: out of memory ({self._describe_oom()})"
            )
        reason = f"ended by {signal_name(number)}" if number is not None else ""
        return ExitStatus(code, number, False, told.ended_ns, reason)

    def lost(self, reason: str, now_ns: int) -> None:
        """The agent is gone, and every process of the container with it."""
        for stream, pump in list(self._pumps.items()):
            pump.drain()
            pump.close()
            self.logs[stream].close()
        self._pumps.clear()
        self._link = None
        if self.exit is None:
            self.finish(ExitStatus(None, int(_signal.SIGKILL), False, now_ns, reason))

    def let_go(self) -> None:
        """Close our descriptors; the process and its agent do not notice."""
        self._stdin.release()
        for pump in self._pumps.values():
            pump.close()
        self._pumps.clear()
        for log in self.logs.values():
            log.close()

    # --- service.ports.RunningProcess

    def output(self, stream: OutputStream) -> SegmentLog:
        """A stored output stream."""
        return self.logs[stream]

    async def wait(self) -> ExitStatus:
        """The exit status, as soon as there is one."""
        await self._exited.wait()
        assert self.exit is not None
        return self.exit

    async def write_stdin(self, data: bytes, offset: int | None) -> None:
        """Feed stdin."""
        await self._stdin.write(data, offset)

    @property
    def stdin_bytes(self) -> int | None:
        """Bytes of stdin taken so far; None after a restart of the server."""
        return self._stdin.accepted

    async def close_stdin(self, offset: int | None = None) -> None:
        """End stdin."""
        await self._stdin.close(offset)

    async def resize(self, size: WindowSize) -> None:
        """Set the terminal's size."""
        if self.spec.tty is None:
            raise NoTty(self.id)
        if self.exit is not None:
            raise ProcessExited(self.id)
        if self._link is not None and self._link.wire >= 2:
            await self._link.resize(self.id, size)
        else:
            self._stdin.resize(size)

    async def signal(self, number: int, *, group: bool) -> bool:
        """Send a signal; False if the process had exited."""
        if self.exit is not None or self._link is None:
            return False
        self._killed_by_caller = self._killed_by_caller or number == _signal.SIGKILL
        return await self._link.signal(self.id, number, group=group)


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    """Housekeeping with an agent that may go away meanwhile; its loss is reported elsewhere, once."""
    try:
        await work
    except ContainerBroken:
        return
