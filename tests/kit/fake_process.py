"""Processes of the fake backend: coroutines in place of programs, byte arrays in place of segment files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from garden_py.model.errors import NoTty, OffsetOutOfRange, ProcessExited, StdinClosed
from garden_py.model.process import ExitStatus, OutputStream, ProcessSpec, WindowSize, signal_name


class FakeLog:
    """An output stream in memory; the same promises as backend/streams/segments.py, without retention."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.closed = False
        self.delivered = 0
        self.readers: set[FakeReader] = set()

    @property
    def first_offset(self) -> int:
        return 0

    @property
    def end_offset(self) -> int:
        return len(self.data)

    def write(self, data: bytes) -> None:
        self.data += data
        self.wake()

    def close(self) -> None:
        self.closed = True
        self.wake()

    def wake(self) -> None:
        for reader in self.readers:
            reader.wake.set()

    def open_reader(self, offset: int, wake: asyncio.Event | None = None) -> FakeReader:
        if not 0 <= offset <= self.end_offset:
            raise OffsetOutOfRange(offset, 0, self.end_offset)
        reader = FakeReader(self, offset, wake or asyncio.Event())
        self.readers.add(reader)
        return reader


class FakeReader:
    """One reader's place in a FakeLog."""

    def __init__(self, log: FakeLog, offset: int, wake: asyncio.Event) -> None:
        self._log = log
        self.offset = offset
        self.wake = wake

    def read_nowait(self, max_bytes: int) -> bytes:
        data = bytes(self._log.data[self.offset : self.offset + max_bytes])
        self.offset += len(data)
        return data

    def span(self, max_bytes: int) -> None:
        return None

    def skip(self, count: int) -> None:
        raise AssertionError("there was no span")

    async def read(self, max_bytes: int) -> bytes:
        while True:
            self.wake.clear()
            data = self.read_nowait(max_bytes)
            if data or self._log.closed:
                return data
            await self.wake.wait()

    def close(self) -> None:
        self._log.readers.discard(self)


@dataclass
class Stdio:
    """What a scripted program has in its hands."""

    spec: ProcessSpec
    env: dict[str, str]
    stdout: FakeLog = field(default_factory=FakeLog)
    stderr: FakeLog = field(default_factory=FakeLog)
    stdin: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    out_of_memory: Callable[[], None] = lambda: None


# Returns the exit code, or raises Killed.
Program = Callable[[Stdio], Awaitable[int]]


class Killed(Exception):
    """The program ends by a signal."""

    def __init__(self, number: int, *, out_of_memory: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.out_of_memory = out_of_memory


async def _true(io: Stdio) -> int:
    return 0


async def _echo(io: Stdio) -> int:
    io.stdout.write(" ".join(io.spec.args).encode() + b"\n")
    return 0


async def _cat(io: Stdio) -> int:
    while (data := await io.stdin.get()) is not None:
        io.stdout.write(data)
    return 0


async def _sleep(io: Stdio) -> int:
    await asyncio.Event().wait()
    return 0


async def _env(io: Stdio) -> int:
    io.stdout.write("".join(f"{name}={value}\n" for name, value in io.env.items()).encode())
    return 0


async def _hog(io: Stdio) -> int:
    io.out_of_memory()
    raise Killed(9, out_of_memory=True)


async def _exit_7(io: Stdio) -> int:
    return 7


async def _both_streams(io: Stdio) -> int:
    io.stdout.write(b"to stdout\n")
    io.stderr.write(b"to stderr\n")
    return 0


async def _say_then_sleep(io: Stdio) -> int:
    io.stdout.write(b"ready\n")
    return await _sleep(io)


async def _say_then_read(io: Stdio) -> int:
    io.stdout.write(b"first\n")
    await io.stdin.get()
    io.stdout.write(b"second\n")
    return 5


# By path, or by the script of `sh -c`: what each does in a busybox container, and no more than the tests need.
PROGRAMS: dict[str, Program] = {
    "true": _true,
    "echo": _echo,
    "cat": _cat,
    "sleep": _sleep,
    "env": _env,
    "tail": _hog,
    "exit 7": _exit_7,
    "echo to stdout; echo to stderr >&2": _both_streams,
    "echo ready; exec sleep 1000": _say_then_sleep,
    "echo first; read x; echo second; exit 5": _say_then_read,
}


def find_program(spec: ProcessSpec) -> Program | None:
    """The program that a spec names."""
    if spec.path == "sh" and spec.args[:1] == ("-c",):
        return PROGRAMS.get(spec.args[1])
    return PROGRAMS.get(spec.path)


class FakeProcess:
    """A scripted process; implements service.ports.RunningProcess."""

    def __init__(
        self, spec: ProcessSpec, pid: int, io: Stdio, program: Program, on_exit: Callable[[FakeProcess], None]
    ) -> None:
        self.spec = spec
        self.pid = pid
        self.started_ns = time.time_ns()
        self.exit: ExitStatus | None = None
        self.on_exit = on_exit
        self.window = spec.tty
        self.recorded = 0
        self._io = io
        self._accepted = 0
        self._stdin_closed = False
        self._exited = asyncio.Event()
        self._task = asyncio.ensure_future(self._run(program))

    @property
    def id(self) -> str:
        return self.spec.id

    async def _run(self, program: Program) -> None:
        try:
            self.finish(code=await program(self._io))
        except Killed as killed:
            self.finish(signal=killed.number, out_of_memory=killed.out_of_memory)

    def finish(
        self, *, code: int | None = None, signal: int | None = None, out_of_memory: bool = False
    ) -> None:
        """End it once: the exit is known, the streams are closed, and whoever listens is told."""
        if self.exit is not None:
            return
        reason = "" if signal is None else f"ended by {signal_name(signal)}"
        reason = "killed: out of memory" if out_of_memory else reason
        self.exit = ExitStatus(code, signal, out_of_memory, time.time_ns(), reason)
        self._task.cancel()
        self._exited.set()
        for log in (self._io.stdout, self._io.stderr):
            log.close()
        self.on_exit(self)

    def output(self, stream: OutputStream) -> FakeLog:
        return self._io.stdout if stream is OutputStream.STDOUT else self._io.stderr

    async def wait(self) -> ExitStatus:
        await self._exited.wait()
        assert self.exit is not None
        return self.exit

    @property
    def stdin_bytes(self) -> int | None:
        return self._accepted

    async def write_stdin(self, data: bytes, offset: int | None) -> None:
        if self._stdin_closed:
            raise StdinClosed(self.id)
        if offset is not None:
            if offset > self._accepted:
                raise OffsetOutOfRange(offset, 0, self._accepted)
            data = data[self._accepted - offset :]
        self._accepted += len(data)
        if data:
            self._io.stdin.put_nowait(data)

    async def close_stdin(self, offset: int | None = None) -> None:
        if offset is not None and offset > self._accepted and not self._stdin_closed:
            raise OffsetOutOfRange(offset, 0, self._accepted)
        self._stdin_closed = True
        self._io.stdin.put_nowait(None)

    async def resize(self, size: WindowSize) -> None:
        if self.spec.tty is None:
            raise NoTty(self.id)
        if self.exit is not None:
            raise ProcessExited(self.id)
        self.window = size

    async def signal(self, number: int, *, group: bool) -> bool:
        if self.exit is not None:
            return False
        self.finish(signal=number)
        return True

    def exit_recorded(self) -> None:
        self.recorded += 1
