"""Processes whose every byte and exit is known beforehand, or told by themselves over another way."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from functools import cache

from chaos.board import Board, Failure, InputLost, Subject
from chaos.patience import persist
from chaos.plan import MOST, Step
from garden_py.client import (
    AsyncContainer,
    AsyncProcess,
    BindMount,
    ExitStatus,
    MountMode,
    OutOfRange,
    OutputChunk,
    ProcessSpec,
    Sidecar,
    Stream,
    Tty,
)

TIGHT_BYTES = 64 << 10
NOTES = "/notes"
"""Where a container has Board.notes: what is in there tells what ran."""

AGAIN_IN = 4
"""So seldom an exit is asked for again at once; all are compared at the end of the life."""

_SCRIPTS = {
    "count": "seq 1 {size}; echo done >&2; exit {code}",
    "blob": "head -c {size} /dev/urandom >/dev/shm/$0; sha256sum </dev/shm/$0 >&2; cat /dev/shm/$0; "
    "rm /dev/shm/$0; exit {code}",
    "crash": "echo before; echo oh >&2; kill -SEGV $$; echo never",
    "trap": 'trap "echo caught; exit {code}" TERM; echo up; sleep 1000 >/dev/null 2>&1 & wait',
    "stdin": "sha256sum; exit {code}",
    "late": "(sleep 0.3; echo late) & echo early; exit {code}",
    "terminal": "seq 1 {lines}; exit {code}",
    # Much more than is kept: with a reader attached it is held back.
    "tight": "seq 1 {size}; echo done >&2; exit {code}",
    # Over restarts of the server.
    "long": "i=0; while [ $i -lt {lines} ]; do i=$((i+1)); echo $i; sleep 0.1; done; exit {code}",
}


@dataclass(slots=True)
class Seen:
    """What a reader has got: hashes by stream, lengths, and the ends of it.

    Attributes:
        begun: the first bytes have come.
        skipped: bytes that were no longer kept, as the server has said; then there is nothing to compare.
    """

    digests: dict[Stream, hashlib._Hash] = field(
        default_factory=lambda: {stream: hashlib.sha256() for stream in Stream}
    )
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    lengths: dict[Stream, int] = field(default_factory=lambda: dict.fromkeys(Stream, 0))
    tails: dict[Stream, bytes] = field(default_factory=lambda: dict.fromkeys(Stream, b""))
    skipped: int = 0

    def add(self, chunk: OutputChunk) -> None:
        """Take in a chunk; it must follow the last one."""
        if chunk.offset != self.lengths[chunk.stream]:
            raise Failure(f"{chunk.stream.name} goes on at {chunk.offset}, not {self.lengths[chunk.stream]}")
        self.begun.set()
        self.digests[chunk.stream].update(chunk.data)
        self.lengths[chunk.stream] += len(chunk.data)
        self.tails[chunk.stream] = (self.tails[chunk.stream] + chunk.data)[-200:]


class Work:
    """One process of a step: starts it, reads it in the step's style, judges it."""

    def __init__(
        self, board: Board, subject: Subject, container: AsyncContainer, step: Step, process_id: str
    ) -> None:
        self._board = board
        self._subject = subject
        self._container = container
        self._step = step
        self._id = process_id
        self._input = hashlib.sha256(process_id.encode()).digest() * (step.size // 32 + 1)
        self._lines = step.size % (20 if step.kind == "long" else 500)
        script = f"echo $0 >>{NOTES}/{subject.handle}; " + _SCRIPTS[step.kind].format(
            size=step.size, lines=self._lines, code=step.code
        )
        self._spec = ProcessSpec(
            "sh",
            ("-c", script, process_id),
            id=process_id,
            tty=Tty() if step.kind == "terminal" else None,
            output_retention_bytes=TIGHT_BYTES if step.kind == "tight" else 0,
            sidecar=self._sidecar() if step.sidecar else None,
        )

    def _sidecar(self) -> Sidecar:
        return Sidecar(str(self._board.image), (notes_mount(self._board),))

    async def begin(self) -> None:
        """Start it and leave it alone; `finish` judges it."""
        self._subject.ran.append(self._id)
        await self._start()

    async def finish(self) -> None:
        """Read what it has written meanwhile, and go on to its end."""
        seen = Seen()
        await self._conclude(seen, await self._follow(await self._attach(seen), seen))

    async def perform(self) -> None:
        """From start to judgement."""
        self._subject.ran.append(self._id)
        seen = Seen()
        try:
            status = await getattr(self, "_" + self._style())(seen)
        except InputLost:
            await self._ask("kill", lambda: self._container.signal(self._id, "KILL"))
            self._subject.exits[self._id] = await self._ask("wait", lambda: self._container.wait(self._id))
            return
        await self._conclude(seen, status)

    async def _conclude(self, seen: Seen, status: ExitStatus) -> None:
        self._judge(seen, status)
        self._subject.exits[self._id] = status
        if self._step.size % AGAIN_IN == 0:
            again = await self._ask("wait again", lambda: self._container.wait(self._id))
            if again is None or (again.code, again.signal) != (status.code, status.signal):
                raise Failure(f"{self._what()}: its exit was {status}, and is now {again}")
        self._board.processes += 1
        self._board.bytes_checked += sum(seen.lengths.values())

    def _style(self) -> str:
        """A process that needs something from its client is stayed with."""
        return "run" if self._step.kind in ("stdin", "trap", "tight") else self._step.style

    def _what(self) -> str:
        return f"{self._step.kind}/{self._style()} {self._id}"

    async def _ask(self, what, act):
        return await persist(self._board, self._subject, f"{self._what()}: {what}", act)

    # --- styles

    async def _open(self, seen: Seen) -> AsyncProcess:
        async def run() -> AsyncProcess:
            try:
                return await self._container.run(self._spec, request_id=self._id)
            except OutOfRange as error:
                # An earlier try was heard, its answer was lost, and while nobody was attached more came than is kept.
                self._skip(seen, error)
                return await self._container.attach(
                    self._id, stdout_offset=seen.lengths[Stream.STDOUT], stderr_offset=0
                )

        return await self._ask("run", run)

    def _skip(self, seen: Seen, error: OutOfRange) -> None:
        if self._step.kind != "tight" or error.first_offset is None:
            raise error
        seen.skipped += error.first_offset - seen.lengths[Stream.STDOUT]
        seen.lengths[Stream.STDOUT] = error.first_offset

    async def _attach(self, seen: Seen) -> AsyncProcess:
        return await self._ask(
            "attach",
            lambda: self._container.attach(
                self._id, stdout_offset=seen.lengths[Stream.STDOUT], stderr_offset=seen.lengths[Stream.STDERR]
            ),
        )

    async def _start(self) -> None:
        await self._ask("start", lambda: self._container.start(self._spec, request_id=self._id))

    async def _run(self, seen: Seen) -> ExitStatus:
        process = await self._open(seen)
        helper = asyncio.ensure_future(self._help(process, seen))
        try:
            return await self._follow(process, seen)
        finally:
            helper.cancel()
            await asyncio.wait([helper])
            process.close()

    async def _slow(self, seen: Seen) -> ExitStatus:
        process = await self._open(seen)
        try:
            return await self._follow(process, seen, pause_s=0.05)
        finally:
            process.close()

    async def _vanish(self, seen: Seen) -> ExitStatus:
        """Readers that leave in the middle; each next one begins where the last one left."""
        process = await self._open(seen)
        for _ in range(2):
            await self._follow(process, seen, leave_at=int(self._step.size * 4 * self._step.fraction))
            process.close()
            process = await self._attach(seen)
        try:
            return await self._follow(process, seen)
        finally:
            process.close()

    async def _detached(self, seen: Seen) -> ExitStatus:
        """Nobody reads while it runs."""
        await self._start()
        status = await self._ask("wait", lambda: self._container.wait(self._id))
        for stream in Stream:
            await self._read(seen, stream)
        assert status is not None
        return status

    async def _read(self, seen: Seen, stream: Stream) -> None:
        async def read() -> None:
            async for chunk in self._container.read_output(
                self._id, stream, offset=seen.lengths[stream], follow=True
            ):
                seen.add(chunk)

        await self._ask(f"read {stream.name}", read)

    async def _twice(self, seen: Seen) -> ExitStatus:
        """Two requests with one id at the same time are one process."""
        await asyncio.gather(self._start(), self._start())
        return await self._follow(await self._attach(seen), seen)

    async def _crowd(self, seen: Seen) -> ExitStatus:
        """Several readers at once, one of them slow; each gets everything."""
        await self._start()
        others = [Seen(), Seen()]

        async def read(own: Seen, pause_s: float) -> ExitStatus:
            process = await self._attach(own)
            try:
                return await self._follow(process, own, pause_s=pause_s)
            finally:
                process.close()

        statuses = await asyncio.gather(read(seen, 0), read(others[0], 0), read(others[1], 0.03))
        for other, status in zip(others, statuses[1:], strict=True):
            self._judge(other, status)
        return statuses[0]

    async def _follow(
        self, process: AsyncProcess, seen: Seen, *, pause_s: float = 0, leave_at: int | None = None
    ) -> ExitStatus | None:
        """Read on; to the end, or until leave_at bytes have come."""
        current = process

        async def follow() -> ExitStatus | None:
            nonlocal current
            if current is None:
                current = await self._attach(seen)
            try:
                async for chunk in current:
                    seen.add(chunk)
                    if leave_at is not None and sum(seen.lengths.values()) >= leave_at:
                        return None
                    await asyncio.sleep(pause_s)
                return await current.wait()
            except OutOfRange as error:
                # While the server was away nobody was attached, and more came than is kept.
                self._skip(seen, error)
                current.close()
                current = None
                return await follow()
            except BaseException:
                current.close()
                current = None
                raise

        return await self._ask("follow", follow)

    async def _help(self, process: AsyncProcess, seen: Seen) -> None:
        """Give a process what it waits for."""
        if self._step.kind == "stdin":
            for begin in range(0, len(self._input), 10_000):
                await process.stdin.write(self._input[begin : begin + 10_000])
            await process.stdin.close()
        if self._step.kind == "trap":
            await seen.begun.wait()  # it says "up" once it is ready to be signalled
            await self._ask("signal", lambda: self._container.signal(self._id, "TERM"))

    # --- judgement

    def _judge(self, seen: Seen, status: ExitStatus) -> None:
        step = self._step
        if self._subject.hurt:
            return
        expected_exit = (None, 11) if step.kind == "crash" else (step.code, None)
        if (status.code, status.signal) != expected_exit:
            raise Failure(f"{self._what()}: ended with {status}, not {expected_exit}; said {seen.tails}")
        if seen.skipped:
            return
        out, err = self._expected(seen)
        for stream, digest in ((Stream.STDOUT, out), (Stream.STDERR, err)):
            found = seen.digests[stream].hexdigest()
            if found != digest:
                raise Failure(
                    f"{self._what()}: {stream.name} is not what was written: {seen.lengths[stream]} bytes, "
                    f"ending in {seen.tails[stream]!r}"
                )

    def _expected(self, seen: Seen) -> tuple[str, str]:
        step = self._step
        match step.kind:
            case "count" | "tight":
                return sha256(count(step.size)), sha256(b"done\n")
            case "long":
                return sha256(count(self._lines)), sha256(b"")
            case "blob":
                told = seen.tails[Stream.STDERR].split()[0].decode() if seen.tails[Stream.STDERR] else ""
                if seen.lengths[Stream.STDOUT] != step.size:
                    raise Failure(f"{self._what()}: {seen.lengths[Stream.STDOUT]} bytes of {step.size} came")
                return told, sha256(f"{told}  -\n".encode())
            case "crash":
                return sha256(b"before\n"), sha256(b"oh\n")
            case "trap":
                return sha256(b"up\ncaught\n"), sha256(b"")
            case "stdin":
                return sha256(f"{sha256(self._input)}  -\n".encode()), sha256(b"")
            case "late":
                return sha256(b"early\nlate\n"), sha256(b"")
            case _:
                return sha256(count(self._lines).replace(b"\n", b"\r\n")), sha256(b"")


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def notes_mount(board: Board) -> BindMount:
    """For containers and sidecars alike."""
    return BindMount(str(board.notes), NOTES, MountMode.READ_WRITE)


def count(to: int) -> bytes:
    """What `seq 1 to` writes."""
    digits = len(str(to))
    shorter = sum((size + 1) * 9 * 10 ** (size - 1) for size in range(1, digits))
    return _counted()[: shorter + (digits + 1) * (to - 10 ** (digits - 1) + 1)]


@cache
def _counted() -> bytes:
    """All that `count` can be asked for: it would take more time than the container."""
    return b"".join(b"%d\n" % number for number in range(1, MOST + 1))
