"""The server's side of running external programs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import structlog

from garden_py.backend.launcher.client import Launcher
from garden_py.backend.plugin.program import Ended
from garden_py.model.errors import HostFault

log = structlog.get_logger()
PLACE = "plugins"
"""Beside the directory that the other launcher mounts in; this one's lock is named after it."""
_WORKERS = 8
_GRACE_S = 10.0  # for the worker's answer, after the program's own deadline
_SAID_MAX = 2000


class PluginCaller:
    """Runs programs, `_WORKERS` at a time. Nothing is started before the first one is asked for.

    Args:
        run_dir: of the server.
    """

    def __init__(self, run_dir: Path) -> None:
        # Programs of a server before this one end with it; this one's launcher waits until they have.
        self._launcher = Launcher(run_dir / PLACE, workers=_WORKERS, host_mounts=True)
        self._starting = asyncio.Lock()

    @property
    def launcher_pid(self) -> int | None:
        """Of the launcher, which leads the session that it and its workers are in; None without one."""
        return self._launcher.pid

    async def run(
        self,
        argv: Sequence[str],
        *,
        call: str,
        step: str,
        stdin: bytes = b"",
        timeout_s: float,
        secrets: Sequence[str] = (),
    ) -> Ended:
        """Run a program to its end. Cancelled, it is killed, and gone when the cancellation goes on.

        Args:
            argv: with the program's path first.
            call: what it is run for, in the log.
            step: likewise in errors.
            stdin: what it reads from its standard input.
            timeout_s: seconds until it is killed.
            secrets: that the log must not have.

        Raises:
            HostFault: it could not be started, or was killed.
        """
        await self._start()
        began = time.monotonic()
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            with _as_file(stdin) as file:
                job = asyncio.ensure_future(
                    self._launcher.run(
                        "plugin.run",
                        {"argv": list(argv), "timeout_ms": round(timeout_s * 1000)},
                        [file.fileno(), reading],
                        timeout_s=timeout_s + _GRACE_S,
                    )
                )
                try:
                    answer = await asyncio.shield(job)
                except asyncio.CancelledError:
                    os.close(writing)
                    writing = -1
                    await asyncio.wait([job])
                    raise
        except HostFault as fault:
            raise HostFault(step, str(fault)) from fault
        finally:
            os.close(reading)
            if writing >= 0:
                os.close(writing)
        ended = Ended(**answer)
        _tell(argv[0], call, ended, time.monotonic() - began, secrets)
        if ended.gave_up:
            raise HostFault(step, f"{argv[0]} was killed: {ended.gave_up}{said(ended.stderr)}")
        return ended

    async def _start(self) -> None:
        async with self._starting:
            if self._launcher.pid is None:
                await self._launcher.start()

    async def close(self) -> None:
        """End the launcher, if there is one."""
        await self._launcher.close()


def _as_file(content: bytes) -> FileIO:
    """A file to read from its beginning. Source: memfd_create(2)."""
    file = FileIO(os.memfd_create("plugin-stdin", os.MFD_CLOEXEC), "r+")
    file.write(content)
    file.seek(0)
    return file


def said(text: str) -> str:
    """The last line of what a program has said, to be put behind a sentence; empty if it has said nothing."""
    lines = text.strip().splitlines()
    return f": {lines[-1][:_SAID_MAX]}" if lines else ""


def _tell(program: str, call: str, ended: Ended, took_s: float, secrets: Sequence[str]) -> None:
    stderr = ended.stderr[-_SAID_MAX:]
    for secret in filter(None, secrets):
        stderr = stderr.replace(secret, "***")
    say = log.debug if ended.status == 0 and not ended.gave_up else log.warning
    say(
        "plugin.ended",
        program=program,
        call=call,
        status=ended.status,
        gave_up=ended.gave_up,
        stderr=stderr,
        took_ms=round(took_s * 1000, 1),
    )
