"""Attachments: what a client of Run or Attach reads, and the side connections that carry it.

A stream id names the place in both outputs from which a client reads on. Nothing is buffered for it: the bytes lie in
the process's stored streams, and go from there to the socket by sendfile(2). While a side connection is open, a full
stream waits for its reader; for one that may still come it waits SIDE_WAIT_S, for one that never comes no longer.

Where a client's reading has got to is remembered with the process (`OutputLog.delivered`): who attaches again without
saying from where goes on there. Source: Garden HTTP protocol §6.3.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import itertools
import os
import socket
import termios
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import structlog

from garden_py.model.errors import GardenError, OffsetOutOfRange
from garden_py.model.process import OutputStream
from garden_py.observe.metrics import Metrics, Stream
from garden_py.service.ports import OutputLog, OutputReader, RunningProcess

log = structlog.get_logger()
LATE_S: Final = 60.0  # so long after the process's end a side connection may still come (§6.3, statement 15)
# Side connections are opened one after the other, behind an answer that has to get to the client first.
SIDE_WAIT_S: Final = 5.0
_CLOSE_S: Final = 10.0
_PIECE_BYTES: Final = 64 << 10
_SENDFILE_BYTES: Final = 8 << 20
_Key = tuple[str, str, OutputStream]


@dataclass(slots=True, eq=False)
class Attachment:
    """One Run or Attach.

    Attributes:
        offsets: of the next byte of each stream that its client has not been sent.
        is_run: of a Run; the process was started for it.
        sides: its open side connections.
        held: readers for side connections that may still come.
    """

    id: str
    handle: str
    process: RunningProcess
    offsets: dict[OutputStream, int]
    is_run: bool
    sides: set[asyncio.StreamWriter] = field(default_factory=set)
    held: dict[OutputStream, _Held] = field(default_factory=dict)

    def let_go(self) -> None:
        """Hold nothing back for side connections that have not come."""
        while self.held:
            self.held.popitem()[1].reader.close()


@dataclass(slots=True, eq=False)
class _Held:
    """A reader at the place where a side connection will begin."""

    reader: OutputReader
    wake: asyncio.Event


@dataclass(slots=True, eq=False)
class _Side:
    """A side connection that is open: what of it has arrived for certain."""

    writer: asyncio.StreamWriter
    reader: OutputReader

    def acknowledged(self) -> int:
        """The offset up to which the client's host has the bytes."""
        return self.reader.offset - _unacknowledged(self.writer)


class Attachments:
    """All attachments of one door.

    Args:
        remember: whether a client that does not say where to begin goes on where the last one stopped.
        metrics: where the output is counted.
    """

    def __init__(self, *, remember: bool, metrics: Metrics) -> None:
        self._remember = remember
        self._metrics = metrics
        self._by_id: dict[str, Attachment] = {}
        self._numbers = itertools.count(1)
        self._open: defaultdict[_Key, set[_Side]] = defaultdict(set)

    def begin(
        self, handle: str, process: RunningProcess, given: dict[OutputStream, int | None], *, fresh: bool
    ) -> Attachment:
        """A new attachment.

        Args:
            handle: of the container.
            process: that is read.
            given: offsets that the client asked for.
            fresh: the process was started for it, so it reads from the beginning.

        Raises:
            OffsetOutOfRange: those bytes are not kept, or not there yet.
        """
        offsets = {}
        for stream in OutputStream:
            wanted = given.get(stream)
            if wanted is None:
                wanted = 0 if fresh else self._place(handle, process, stream)
            offsets[stream] = wanted
        attachment = Attachment(str(next(self._numbers)), handle, process, offsets, fresh)
        try:
            for stream, offset in offsets.items():
                attachment.held[stream] = _hold(
                    process.output(stream), offset, exactly=given.get(stream) is not None
                )
        except OffsetOutOfRange:
            attachment.let_go()
            raise
        self._by_id[attachment.id] = attachment
        asyncio.get_running_loop().call_later(SIDE_WAIT_S, attachment.let_go)
        return attachment

    def _place(self, handle: str, process: RunningProcess, stream: OutputStream) -> int:
        """Where a client that does not say begins: where the last one stopped, or now."""
        stored = process.output(stream)
        if not self._remember:
            return stored.end_offset
        sides = self._open.get((handle, process.id, stream))
        place = max(side.acknowledged() for side in sides) if sides else stored.delivered
        return min(max(place, stored.first_offset), stored.end_offset)

    def find(self, stream_id: str, handle: str, process_id: str) -> Attachment | None:
        """The attachment of a side connection's path; None if there is none, or not any more."""
        found = self._by_id.get(stream_id)
        if found is None or (found.handle, found.process.id) != (handle, process_id):
            return None
        return found

    def retire(self, attachment: Attachment) -> None:
        """The process has ended and the client was told: it may still read for a while."""
        asyncio.get_running_loop().call_later(LATE_S, self._by_id.pop, attachment.id, None)

    def drop(self, attachment: Attachment) -> None:
        """The client has gone: so do its side connections."""
        self._by_id.pop(attachment.id, None)
        attachment.let_go()
        for writer in list(attachment.sides):
            writer.close()

    async def pour(
        self,
        attachment: Attachment,
        stream: OutputStream,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Send a stream from the attachment's place to its end; returns when that is done or the client has gone."""
        stored = attachment.process.output(stream)
        held = attachment.held.pop(stream, None) or _hold(stored, attachment.offsets[stream])
        wake, output = held.wake, held.reader
        if (skipped := output.offset - attachment.offsets[stream]) > 0:
            log.warning(
                "garden.output_skipped", process_id=attachment.process.id, stream=stream.value, bytes=skipped
            )
        side, outlet = _Side(writer, output), _Outlet(writer)
        key = (attachment.handle, attachment.process.id, stream)
        self._open[key].add(side)
        attachment.sides.add(writer)
        left = asyncio.ensure_future(_until_gone(reader))
        left.add_done_callback(lambda _: wake.set())
        try:
            while not left.done():
                wake.clear()
                before = output.offset
                if await outlet.send_some(output):
                    self._metrics.streamed(Stream.OUTPUT, output.offset - before)
                    attachment.offsets[stream] = output.offset
                    stored.delivered = max(stored.delivered, output.offset)
                elif stored.closed and output.offset >= stored.end_offset:
                    writer.write_eof()
                    # It closes when it has read to the end; one that dies before that has not got all of it.
                    await asyncio.wait([left], timeout=_CLOSE_S)
                    return
                else:
                    await wake.wait()
        except (ConnectionError, TimeoutError):
            return
        except GardenError as error:  # the stored bytes are gone, with their container or by hand
            log.warning("garden.output_lost", process_id=attachment.process.id, error=str(error))
        finally:
            if stored.delivered == output.offset:  # else another client is ahead of this one
                stored.delivered = max(0, side.acknowledged())
            left.cancel()
            await asyncio.wait([left])
            outlet.close()
            output.close()
            attachment.sides.discard(writer)
            self._open[key].discard(side)
            if not self._open[key]:
                del self._open[key]


def _hold(stored: OutputLog, offset: int, *, exactly: bool = False) -> _Held:
    """A reader from an offset; unless it shall be there exactly, from the first byte behind it that is kept.

    Raises:
        OffsetOutOfRange: those bytes are not kept, or not there yet.
    """
    wake = asyncio.Event()
    return _Held(stored.open_reader(offset if exactly else max(offset, stored.first_offset), wake), wake)


async def _until_gone(reader: asyncio.StreamReader) -> None:
    """A reader of output sends nothing; whatever comes is ignored until the end comes."""
    with suppress(OSError):
        while await reader.read(_PIECE_BYTES):
            pass


class _Outlet:
    """Sends a stored stream into a connection.

    It has a descriptor of its own for the socket, so that it can wait for room in it beside the connection's transport.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._socket: socket.socket = writer.get_extra_info("socket").dup()

    async def send_some(self, output: OutputReader) -> bool:
        """Send what is there, a bounded amount; whether there was anything. Waits for a slow client."""
        span = output.span(_SENDFILE_BYTES)
        if span is None:
            return await self._copy_some(output)
        if self._writer.transport.get_write_buffer_size():
            await self._writer.drain()  # the head goes first
        while True:
            try:
                output.skip(os.sendfile(self._socket.fileno(), span.fd, span.offset, span.count))
                return True
            except BlockingIOError:
                await self._writable()

    async def _copy_some(self, output: OutputReader) -> bool:
        """Of streams that are in no file."""
        data = output.read_nowait(_PIECE_BYTES)
        if data:
            self._writer.write(data)
            await self._writer.drain()
        return bool(data)

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._socket, _finish, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close the second descriptor."""
        self._socket.close()


def _finish(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _unacknowledged(writer: asyncio.StreamWriter) -> int:
    """Bytes that were sent and have not arrived: in our buffer, and in the kernel's. SIOCOUTQ, tcp(7).

    A unix socket has no such queue: what was sent is in the receiver's buffer at once, and whether it has read it
    cannot be known here.
    """
    waiting = writer.transport.get_write_buffer_size()
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is None or sock.family == socket.AF_UNIX or sock.fileno() < 0:
        return waiting
    queued = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, queued)
    except OSError:
        return waiting
    return waiting + queued[0]
