"""The streaming half of Run and Attach: output of both streams, exit and closes as one series of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import ClassVar

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc import convert
from garden_py.api.grpc.chunks import Encoded, encode_chunk, encode_output
from garden_py.model.errors import GardenError, InvalidField, ProcessExited
from garden_py.model.process import OutputStream
from garden_py.observe.metrics import Metrics, Stream
from garden_py.service.ports import OutputLog, OutputReader, RunningProcess

# Throughput of python gRPC streams rises up to about this size and memory with it (benchmarks/streams).
CHUNK_BYTES = 256 << 10
_EXIT_FOLLOWS_S = 0.003
_AHEAD_MOST = 64  # chunks that are read ahead of all callers: what a thousand slow ones hold is bounded


class _Chunks:
    """The chunks of one stream in their wire form, each from where the one before has ended.

    grpc asks for a chunk when the one before is with its own threads, and lets the loop wait meanwhile: that is when
    the next one is read, if all of it is there already (a tenth more bytes a second).

    Args:
        reader: owned from here on.
        encode: makes a message of an offset and the data from there.
        metrics: where the output is counted.
        end: the offset to stop at; None: the stream's end.
    """

    _held: ClassVar[int] = 0
    """Read ahead and not taken yet, by all."""

    def __init__(
        self,
        reader: OutputReader,
        encode: Callable[[int, bytes], Encoded],
        metrics: Metrics,
        end: int | None = None,
    ) -> None:
        self._reader = reader
        self._encode = encode
        self._metrics = metrics
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._ready: Encoded | None = None
        self._ahead: asyncio.Handle | None = None
        self.offset = reader.offset
        """Behind what was taken."""

    def take(self) -> Encoded | None:
        """The next chunk; None if nothing is there now, and at the end."""
        self._stop_reading_ahead()
        if self._ready is not None:
            _Chunks._held -= 1
        elif room := self._room():
            self._make_ready(self._reader.read_nowait(room))
        return self._hand_out()

    async def take_later(self) -> Encoded | None:
        """The next chunk, when it is there; None at the end."""
        if (chunk := self.take()) is None and (room := self._room()):
            self._make_ready(await self._reader.read(room))
            chunk = self._hand_out()
        return chunk

    def _room(self) -> int:
        return CHUNK_BYTES if self._end is None else min(CHUNK_BYTES, self._end - self._reader.offset)

    def _make_ready(self, data: bytes) -> None:
        if data:
            self._metrics.streamed(Stream.OUTPUT, len(data))
            self._ready = self._encode(self._reader.offset - len(data), data)

    def _hand_out(self) -> Encoded | None:
        chunk, self._ready = self._ready, None
        if chunk is not None:
            self.offset = self._reader.offset
            self._ahead = self._loop.call_soon(self._read_ahead)
        return chunk

    def _read_ahead(self) -> None:
        room = self._room()
        if not room or _Chunks._held >= _AHEAD_MOST:
            return
        with suppress(GardenError):  # whoever takes it tries again, and is told
            span = self._reader.span(room)
            # A piece of a chunk may be all of it by the time that it is asked for.
            if span is not None and span.count == room:
                self._make_ready(self._reader.read_nowait(room))
        if self._ready is not None:
            _Chunks._held += 1

    def _stop_reading_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()  # it has mostly run
            self._ahead = None

    def close(self) -> None:
        """Stop holding the stream back; twice is fine."""
        self._stop_reading_ahead()  # or it would open the closed reader's file again
        if self._ready is not None:
            self._ready = None
            _Chunks._held -= 1
        self._reader.close()


async def read_chunks(
    log: OutputLog, request: pb.ReadOutputRequest, metrics: Metrics
) -> AsyncGenerator[Encoded, None]:
    """What the caller of ReadOutput is told.

    Args:
        log: of the process and the stream that the request names.
        request: says from where, how much, and whether to wait for more until the stream is closed.
        metrics: where the output is counted.

    Raises:
        OffsetOutOfRange: the log does not have that offset, or has it no more.
    """
    end = request.offset + request.limit_bytes if request.limit_bytes else None
    encode = partial(encode_chunk, request.stream)
    chunks = _Chunks(log.open_reader(request.offset), encode, metrics, end)
    try:
        while (chunk := await chunks.take_later() if request.follow else chunks.take()) is not None:
            yield chunk
    finally:
        chunks.close()


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
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._chunks: dict[OutputStream, _Chunks] = {}
        try:
            for stream, offset in offsets.items():
                log = process.output(stream)
                reader = log.open_reader(log.end_offset if offset is None else offset, self._wake)
                encode = partial(encode_output, convert.STREAMS_OUT[stream])
                self._chunks[stream] = _Chunks(reader, encode, metrics)
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncGenerator[pb.ProcessEvent | Encoded, None]:
        """Output from each offset, `exited` once, `closed` per stream; ends when all have been said.

        Output that was written before the exit is sent before it. Nothing is buffered for a slow consumer: the rest
        stays in the process's logs.
        """
        exit_sent = False
        unclosed = dict(self._chunks)
        ends: dict[OutputStream, int] | None = None
        while unclosed or not exit_sent:
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            idle = True
            for chunks in unclosed.values():
                if (chunk := chunks.take()) is not None:
                    idle = False
                    yield chunk
            if not exit_sent and (status := self._process.exit) is not None:
                ends = ends or {stream: self._process.output(stream).end_offset for stream in self._chunks}
                if all(chunks.offset >= ends[stream] for stream, chunks in self._chunks.items()):
                    exit_sent, idle = True, False
                    yield pb.ProcessEvent(exited=convert.exit_to(status))
            at_end = [stream for stream in unclosed if self._is_at_end(stream)]
            if at_end and not exit_sent and await self._exit_follows():
                continue
            for stream in at_end:
                del unclosed[stream]
                idle = False
                yield _closed(stream, self._chunks[stream].offset)
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
        return log.closed and self._chunks[stream].offset >= log.end_offset

    def fail(self, error: Exception) -> None:
        """End the events with this error: the caller's input was bad."""
        self._failure = error
        self._wake.set()

    def close(self) -> None:
        """Stop holding the streams back; twice is fine."""
        for chunks in self._chunks.values():
            chunks.close()


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
    offset = message.offset if message.HasField("offset") else None
    if message.data:
        await process.write_stdin(message.data, offset)
    if message.close:
        await process.close_stdin(None if offset is None else offset + len(message.data))


async def _signal(process: RunningProcess, message: pb.Signal) -> None:
    number, group = convert.signal_from(message)
    await process.signal(number, group=group)
