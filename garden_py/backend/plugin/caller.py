"""The server's side of running external programs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from garden_py.backend.launcher.client import Launcher
from garden_py.backend.plugin.program import Ended
from garden_py.model.errors import HostFault

log = structlog.get_logger()
PLACE = "plugins"
"""Beside the directory that the other launcher mounts in; this one's lock is named after it."""
_GRACE_S = 10.0  # for the worker's answer, after the program's own deadline
_SAID_MAX = 2000


class Lane(Enum):
    """What programs are run for. Those that take long or answer nothing keep no others waiting."""

    MAKE = "make"
    ASK = "ask"
    CHANGE = "change"
    REMOVE = "remove"


AT_ONCE = {Lane.MAKE: 8, Lane.ASK: 4, Lane.CHANGE: 8, Lane.REMOVE: 8}


class PluginCaller:
    """Runs programs, several at a time. Nothing is started before the first one is asked for.

    Args:
        run_dir: of the server.
    """

    def __init__(self, run_dir: Path) -> None:
        # Programs of a server before this one end with it; this one's launcher waits until they have.
        self._launcher = Launcher(run_dir / PLACE, workers=sum(AT_ONCE.values()), host_mounts=True)
        self._lanes = {lane: asyncio.Semaphore(count) for lane, count in AT_ONCE.items()}
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
        lane: Lane = Lane.CHANGE,
        secrets: Sequence[str] = (),
    ) -> Ended:
        """Run a program to its end. Cancelled, it is killed, and gone when the cancellation goes on.

        One that SIGKILL does not end, for it is in a system call that hangs, is waited for 10 s longer, then left.

        Args:
            argv: with the program's path first.
            call: what it is run for, in the log.
            step: likewise in errors.
            stdin: what it reads from its standard input.
            timeout_s: seconds until it is killed.
            lane: whose turn it has to wait for.
            secrets: taken out of what it says: all but the standard output of a success, which is an answer.

        Raises:
            HostFault: it could not be started, was killed, or should have been.
        """
        async with self._lanes[lane]:
            began = time.monotonic()
            try:
                await self._start()
                answer = await self._run(argv, stdin, timeout_s)
            except HostFault as fault:
                raise HostFault(step, str(fault)) from fault
            except TimeoutError as error:
                raise HostFault(step, f"{argv[0]} was killed, and has not ended") from error
        ended = _without(secrets, Ended(**answer))
        _tell(argv[0], call, ended, time.monotonic() - began)
        if ended.gave_up:
            raise HostFault(step, f"{argv[0]} was killed: {ended.gave_up}{said(ended.stderr)}")
        return ended

    async def _run(self, argv: Sequence[str], stdin: bytes, timeout_s: float) -> dict[str, Any]:
        with ExitStack() as held:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            caller, leaving = (
                held.enter_context(FileIO(fd, mode)) for fd, mode in ((reading, "r"), (writing, "w"))
            )
            file = held.enter_context(_as_file(stdin))
            params = {"argv": list(argv), "timeout_ms": round(timeout_s * 1000)}
            fds = [file.fileno(), caller.fileno()]
            job = asyncio.ensure_future(
                self._launcher.run("plugin.run", params, fds, timeout_s=timeout_s + _GRACE_S)
            )
            # Not before: a job that still waits for its worker would send whatever has these numbers by then.
            job.add_done_callback(partial(_finished, held.pop_all()))
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            leaving.close()
            await asyncio.wait([job], timeout=_GRACE_S)
            raise

    async def _start(self) -> None:
        async with self._starting:
            if self._launcher.pid is not None:
                return
            starting = asyncio.ensure_future(self._launcher.start())
            try:
                await asyncio.shield(starting)
            except asyncio.CancelledError:
                # Threads are at it, which go on; the next caller must not find a launcher that is half there.
                await asyncio.wait([starting])
                raise

    async def close(self) -> None:
        """End the launcher, if there is one."""
        async with self._starting:
            await self._launcher.close()


def _finished(held: ExitStack, job: asyncio.Future[Any]) -> None:
    held.close()
    if not job.cancelled():
        job.exception()  # seen, also when the caller has left


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


def first_problem(error: ValidationError) -> str:
    """What is wrong with an answer, and where in it, if it is JSON at all."""
    first = error.errors()[0]
    where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (where, what)))


def _without(secrets: Sequence[str], ended: Ended) -> Ended:
    for secret in filter(None, secrets):
        ended = replace(ended, stderr=ended.stderr.replace(secret, "***"))
        if ended.status != 0:  # an answer is told to nobody, and a path in it may hold the same letters
            ended = replace(ended, stdout=ended.stdout.replace(secret, "***"))
    return ended


def _tell(program: str, call: str, ended: Ended, took_s: float) -> None:
    say = log.debug if ended.status == 0 and not ended.gave_up else log.warning
    say(
        "plugin.ended",
        program=program,
        call=call,
        status=ended.status,
        gave_up=ended.gave_up,
        stderr=ended.stderr[-_SAID_MAX:],
        took_ms=round(took_s * 1000, 1),
    )
