"""The control connection of Run and Attach, from the first message to the last. Source: Garden HTTP protocol §6."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from typing import Final

import structlog

from garden_py.api.http.attachments import Attachment, Attachments
from garden_py.api.http.messages import (
    Garbage,
    GardenSignal,
    Message,
    MessageDecoder,
    Resize,
    SignalProcess,
    StdinData,
    StdinEnd,
    encode_message,
)
from garden_py.model.errors import GardenError
from garden_py.service.ports import RunningProcess
from garden_py.service.processes import Processes

log = structlog.get_logger()
_READ_BYTES: Final = 256 << 10
# A client may still be sending input when its process ends; a close with unread input would reset away what was said.
_LINGER_S: Final = 1.0
_SIGNALS: Final = {GardenSignal.TERMINATE: 15, GardenSignal.KILL: 9}  # SIGTERM, SIGKILL of signal(7)


class Controls:
    """All control connections of one door.

    Several clients may feed one process: its stdin ends when the last of them has ended its own, or has gone.
    """

    def __init__(self, processes: Processes, attachments: Attachments) -> None:
        self._processes = processes
        self._attachments = attachments
        self._feeding: defaultdict[tuple[str, str], set[Attachment]] = defaultdict(set)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End every connection without a last message, as a server that goes away; no stdin ends with it."""
        self._stopping.set()

    async def converse(
        self, attachment: Attachment, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Talk with a client until its process has ended, it leaves, or the server stops.

        The container is in use for so long (§7, statement 4).
        """
        process = attachment.process
        feeding = self._feeding[attachment.handle, process.id]
        feeding.add(attachment)
        listening = asyncio.ensure_future(self._listen(attachment, reader))
        ending = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            with self._processes.use(attachment.handle):
                writer.write(encode_message(process_id=process.id, stream_id=attachment.id))
                await writer.drain()
                await asyncio.wait([listening, ending, stopping], return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                await self._tell_end(process, writer)
        except ConnectionError:
            pass  # it has left; the same as when it closes
        finally:
            await self._end(attachment, gone=not ending.done() and not stopping.done())
            for task in (listening, ending, stopping):
                task.cancel()
            await asyncio.wait([listening, ending, stopping])

    async def _tell_end(self, process: RunningProcess, writer: asyncio.StreamWriter) -> None:
        status = process.exit
        assert status is not None
        writer.write(encode_message(process_id=process.id, exit_status=status.shell_code()))
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _end(self, attachment: Attachment, *, gone: bool) -> None:
        if not gone:
            self._feeding_no_more(attachment)
            self._attachments.retire(attachment)
            return
        self._attachments.drop(attachment)
        # A connection that breaks is no ^D: that would end the shell that somebody comes back to.
        if self._feeding_no_more(attachment) and attachment.process.spec.tty is None:
            await _quietly_close(attachment.process)

    def _feeding_no_more(self, attachment: Attachment) -> bool:
        """Whether it was feeding, and was the last one that did."""
        key = (attachment.handle, attachment.process.id)
        feeding = self._feeding.get(key)
        if feeding is None or attachment not in feeding:
            return False
        feeding.discard(attachment)
        if feeding:
            return False
        del self._feeding[key]
        return True

    async def _listen(self, attachment: Attachment, reader: asyncio.StreamReader) -> None:
        """Do what the client says until it leaves. After its last input it may still signal and resize."""
        decoder: MessageDecoder | None = MessageDecoder()
        with suppress(ConnectionError):
            while data := await reader.read(_READ_BYTES):
                if decoder is None:
                    continue
                try:
                    messages = decoder.feed(data)
                except Garbage as error:
                    log.info("garden.garbage", process_id=attachment.process.id, error=str(error))
                    decoder = (
                        None  # nothing more of it can be understood; that it leaves can still be noticed
                    )
                    continue
                for message in messages:
                    await self._apply(attachment, message)

    async def _apply(self, attachment: Attachment, message: Message) -> None:
        process = attachment.process
        try:
            match message:
                case StdinData(data):
                    if data:
                        await process.write_stdin(data, None)
                case StdinEnd():
                    if self._feeding_no_more(attachment):
                        await process.close_stdin()
                case Resize(size):
                    if size is not None:
                        await process.resize(size)
                case SignalProcess(signal):
                    await process.signal(_SIGNALS[signal], group=False)
        except GardenError as error:  # the protocol has no answer for it (§6.4, statement 22)
            log.info("garden.input_refused", process_id=process.id, code=error.code, error=str(error))


async def linger(reader: asyncio.StreamReader) -> None:
    """Read on for a moment after the last message, until the client closes."""
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(_LINGER_S):
            while await reader.read(_READ_BYTES):
                pass


async def _quietly_close(process: RunningProcess) -> None:
    with suppress(GardenError):
        await process.close_stdin()
