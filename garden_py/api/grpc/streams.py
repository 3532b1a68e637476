"""The streaming half of Run and Attach: output of both streams, exit and closes as one series of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc import convert
from garden_py.api.grpc.chunks import Encoded, encode_chunk, encode_output
from garden_py.model.errors import GardenError, InvalidField, ProcessExited
from garden_py.model.process import OutputStream
from garden_py.observe.metrics import Metrics, Stream
from garden_py.service.ports import OutputReader, RunningProcess

# Throughput of python gRPC streams rises up to about this size and memory with it (benchmarks/streams).
CHUNK_BYTES = 256 << 10
_EXIT_FOLLOWS_S = 0.003


async def read_chunks(
    reader: OutputReader, stream: pb.Stream.ValueType, end: int | None, metrics: Metrics, *, follow: bool
) -> AsyncGenerator[Encoded, None]:
    """What one reader is told: the chunks of a stream from its offset on.

    grpc asks for a chunk when the one before is with its own threads, and lets the loop wait meanwhile: that is when
    the next one is read, if there is more already (a tenth more bytes a second).

    Args:
        reader: its place in the stream; it is not closed.
        stream: which one it is of.
        end: the offset to stop at; None: the stream's end.
        metrics: where the output is counted.
        follow: wait for more until the stream is closed.
    """
    loop = asyncio.get_running_loop()
    ready: Encoded | None = None

    def encode(data: bytes) -> Encoded:
        metrics.streamed(Stream.OUTPUT, len(data))
        return encode_chunk(stream, reader.offset - len(data), data)

    def most() -> int:
        return CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - reader.offset)

    def read_ahead() -> None:
        nonlocal ready
        with suppress(GardenError):  # whoever asks for the chunk tries again, and is told
            if (room := most()) > 0 and (data := reader.read_nowait(room)):
                ready = encode(data)

    while True:
        if ready is None:
            if most() <= 0:
                return
            data = await reader.read(most()) if follow else reader.read_nowait(most())
            if not data:
                return
            ready = encode(data)
        chunk, ready = ready, None
        ahead = loop.call_soon(read_ahead)
        try:
            yield chunk
        finally:
            ahead.cancel()  # it has mostly run


class ProcessFeed:
    """What a caller of Run or Attach is told about a process, as one series of events.

    Args:
        offsets: where to begin in each stream; None: at its end.
        metrics: where the output is counted.
    """

    def __init__(
        self, process: RunningProcess, offsets: dict[OutputStream, int | None], metrics: Metrics
    ) -> None:
        self._process = process
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._readers: dict[OutputStream, OutputReader] = {}
        try:
            for stream, offset in offsets.items():
                log = process.output(stream)
                self._readers[stream] = log.open_reader(
                    log.end_offset if offset is None else offset, self._wake
                )
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncGenerator[pb.ProcessEvent | Encoded, None]:
        """Output from each offset, `exited` once, `closed` per stream; ends when all have been said.

        Output that was written before the exit is sent before it. Nothing is buffered for a slow consumer: the rest
        stays in the process's logs.
        """
        exit_sent = False
        unclosed = dict(self._readers)
        ends: dict[OutputStream, int] | None = None
        while unclosed or not exit_sent:
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            idle = True
            for stream, reader in unclosed.items():
                if data := reader.read_nowait(CHUNK_BYTES):
                    idle = False
                    self._metrics.streamed(Stream.OUTPUT, len(data))
                    yield encode_output(convert.STREAMS_OUT[stream], reader.offset - len(data), data)
            if not exit_sent and (status := self._process.exit) is not None:
                ends = ends or {stream: self._process.output(stream).end_offset for stream in self._readers}
                if all(reader.offset >= ends[stream] for stream, reader in self._readers.items()):
                    exit_sent, idle = True, False
                    yield pb.ProcessEvent(exited=convert.exit_to(status))
            at_end = [stream for stream in unclosed if self._is_at_end(stream)]
            if at_end and not exit_sent and await self._exit_follows():
                continue
            for stream in at_end:
                del unclosed[stream]
                idle = False
                yield _closed(stream, self._readers[stream].offset)
            if idle:
                await self._wake.wait()

    async def _exit_follows(self) -> bool:
        """Whether the exit comes within moments of a stream's end, as it mostly does; then it is told first."""
        try:
            async with asyncio.timeout(_EXIT_FOLLOWS_S):
                while self._process.exit is None:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            self._wake.set()  # what woke us may have been more output
            return False
        return True

    def _is_at_end(self, stream: OutputStream) -> bool:
        log = self._process.output(stream)
        return log.closed and self._readers[stream].offset >= log.end_offset

    def fail(self, error: Exception) -> None:
        """End the events with this error: the caller's input was bad."""
        self._failure = error
        self._wake.set()

    def close(self) -> None:
        """Stop holding the streams back; twice is fine."""
        for reader in self._readers.values():
            reader.close()


def _closed(stream: OutputStream, length: int) -> pb.ProcessEvent:
    return pb.ProcessEvent(closed=pb.StreamClosed(stream=convert.STREAMS_OUT[stream], length=length))


async def feed_input(
    process: RunningProcess,
    inputs: AsyncIterator[pb.ProcessInput | None],
    on_error: Callable[[Exception], None],
    metrics: Metrics,
) -> None:
    """Apply a client's input to a process until the client sends no more.

    Args:
        process: to feed.
        inputs: None stands for a message that is no input.
        on_error: told of the first error; nothing is applied after it.
        metrics: where the input is counted.
    """
    try:
        async for message in inputs:
            if message is None:
                raise InvalidField("start", "only the first message of the stream may be this one")
            await _apply(process, message)
            metrics.streamed(Stream.STDIN, len(message.stdin.data))
    except Exception as error:  # noqa: BLE001 - handed to the caller's status, see servicer
        on_error(error)


async def _apply(process: RunningProcess, message: pb.ProcessInput) -> None:
    actions: dict[str, Callable[[], Awaitable[object]]] = {
        "stdin": lambda: _feed_stdin(process, message.stdin),
        "window": lambda: process.resize(convert.window_from(message.window)),
        "signal": lambda: _signal(process, message.signal),
    }
    kind = message.WhichOneof("input")
    if kind is None:
        raise InvalidField("input", "must be stdin, window or signal")
    try:
        await actions[kind]()
    except ProcessExited:
        return  # the client could not know; it will see the exit


async def _feed_stdin(process: RunningProcess, message: pb.Stdin) -> None:
    if message.data:
        await process.write_stdin(message.data, message.offset if message.HasField("offset") else None)
    if message.close:
        await process.close_stdin()


async def _signal(process: RunningProcess, message: pb.Signal) -> None:
    number, group = convert.signal_from(message)
    await process.signal(number, group=group)
