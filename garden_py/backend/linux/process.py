"""A process in a container, from its start to long after its end; implements service.ports.RunningProcess."""

from __future__ import annotations

import asyncio
import os
import signal as _signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from garden_py.backend.streams.agent_link import AgentExit, AgentLink, Spawned
from garden_py.backend.streams.pump import Pump
from garden_py.backend.streams.segments import SegmentLog
from garden_py.backend.streams.stdin import StdinFeed
from garden_py.model.errors import ContainerBroken, NoTty, ProcessExited
from garden_py.model.process import ExitStatus, OutputStream, ProcessSpec, WindowSize, signal_name

_SIGKILL_SHELL_CODE = 128 + _signal.SIGKILL


class LinuxProcess:
    """One process. The pumps run from the start; exit and end of output are two facts.

    Args:
        spec: with id filled in.
        pid: as the container numbers it.
        directory: of its segment files.
        oom_kills: reads how many tasks of its cgroup were ended by the OOM killer so far.
        describe_oom: a sentence about the limit that was hit.
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
        oom_kills: Callable[[], int],
        describe_oom: Callable[[], str],
    ) -> None:
        self.spec = spec
        self.pid = pid
        self.started_ns = started_ns
        self.exit: ExitStatus | None = None
        self.own_group = not spec.limits.empty()
        self._link = link
        self._oom_kills = oom_kills
        self._describe_oom = describe_oom
        self._oom_before = oom_kills() if link is not None else 0
        self._exited = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stdin = StdinFeed(spec.id, -1, is_tty=spec.tty is not None)
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

    def connect(self, spawned: Spawned, on_error: Callable[[str], None]) -> None:
        """Take over the process's stream descriptors; streams without one are closed."""
        self._stdin = StdinFeed(self.spec.id, spawned.fds.get("stdin", -1), is_tty=self.spec.tty is not None)
        for stream, log in self.logs.items():
            fd = spawned.fds.get(stream.value)
            if fd is None:
                log.close()
            else:
                self._pumps[stream] = Pump(fd, log, on_end=self._ended(stream), on_error=on_error)

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

    def finish(self, status: ExitStatus) -> None:
        """Set the exit status and wake everybody who waits for it."""
        self.exit = status
        self._stdin.release()
        self._exited.set()
        for log in self.logs.values():
            log.wake_readers()

    def exit_recorded(self) -> None:
        """The exit is in the journal: the agent may forget the process once its output has been read."""
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
        if killed and self._oom_kills() > self._oom_before:
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

    async def close_stdin(self) -> None:
        """End stdin."""
        if await self._stdin.close() and self.spec.tty is None and self._link is not None:
            await self._link.close_stdin(self.id)

    async def resize(self, size: WindowSize) -> None:
        """Set the terminal's size."""
        if self.spec.tty is None:
            raise NoTty(self.id)
        if self.exit is not None:
            raise ProcessExited(self.id)
        self._stdin.resize(size)

    async def signal(self, number: int, *, group: bool) -> bool:
        """Send a signal; False if the process had exited."""
        if self.exit is not None or self._link is None:
            return False
        return await self._link.signal(self.id, number, group=group)


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    """Housekeeping with an agent that may go away meanwhile; its loss is reported elsewhere, once."""
    try:
        await work
    except ContainerBroken:
        return
