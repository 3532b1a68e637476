"""The control connection of Run and Attach, from the first message to the last. Source: Garden HTTP protocol §6."""

from __future__ import annotations

import asyncio
import select
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import structlog

from garden_py.api.http.attachments import Attachment, Attachments
from garden_py.api.http.messages import (
    Garbage,
    GardenSignal,
    MessageDecoder,
    Resize,
    SignalProcess,
    StdinData,
    StdinEnd,
    encode_message,
)
from garden_py.model.errors import ContainerNotFound, GardenError
from garden_py.observe.metrics import Metrics, Stream
from garden_py.service.ports import RunningProcess
from garden_py.service.processes import Processes

log = structlog.get_logger()
_INPUTS_WAITING: Final = 4  # messages of a client that wait for the process to read; then the client waits
_READ_BYTES: Final = 256 << 10
# A client may still be sending input when its process ends; a close with unread input would reset away what was said.
_LINGER_S: Final = 1.0
_SIGNALS: Final = {GardenSignal.TERMINATE: 15, GardenSignal.KILL: 9}  # SIGTERM, SIGKILL of signal(7)


@dataclass(frozen=True, slots=True)
class _Left:
    """The client has gone."""


_Input: TypeAlias = StdinData | StdinEnd | _Left


@dataclass(slots=True)
class _Feeders:
    """Who may still feed a process.

    Attributes:
        clients: those that have not ended their input.
        of_run: one of them has been the Run that started the process.
    """

    clients: set[Attachment] = field(default_factory=set)
    of_run: bool = False


class _Incoming:
    """What a client sends, and whether it has gone, which is seen also while nothing of it is read.

    Attributes:
        gone: is done when it has gone while its input waits for the process, or has waited before.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._socket: socket.socket = writer.get_extra_info("socket")
        self._hangup: select.epoll | None = None

    async def put(self, inputs: asyncio.Queue[_Input], message: _Input) -> None:
        """Hand on an input when there is room for it."""
        if inputs.full() and self._hangup is None and self._socket.fileno() >= 0:
            # The end of a connection is behind what it still holds; only epoll(7) tells of it before that is read.
            self._hangup = select.epoll()
            self._hangup.register(self._socket, select.EPOLLRDHUP)
            asyncio.get_running_loop().add_reader(self._hangup, self._note_end)
        await inputs.put(message)

    def _note_end(self) -> None:
        self.close()
        if not self.gone.done():
            self.gone.set_result(None)

    def close(self) -> None:
        """Look for its end no more."""
        if self._hangup is not None and not self._hangup.closed:
            asyncio.get_running_loop().remove_reader(self._hangup)
            self._hangup.close()


class Controls:
    """All control connections of one door.

    Several clients may feed one process: its stdin ends when the last of them has ended its own. That it ends also when
    the last of them has just gone is so only for processes that a Run of this door has started: others may be fed
    through other doors.
    """

    def __init__(self, processes: Processes, attachments: Attachments, metrics: Metrics) -> None:
        self._processes = processes
        self._metrics = metrics
        self._attachments = attachments
        self._feeders: dict[tuple[str, str], _Feeders] = {}
        self._tasks: set[asyncio.Future[None]] = set()
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
        feeders = self._feeders.setdefault((attachment.handle, process.id), _Feeders())
        feeders.clients.add(attachment)
        feeders.of_run |= attachment.is_run
        inputs: asyncio.Queue[_Input] = asyncio.Queue(_INPUTS_WAITING)
        # Beside the listening: a process that reads nothing does not keep its client's signals from it.
        feeding = asyncio.ensure_future(self._feed(attachment, inputs))
        incoming = _Incoming(reader, writer)
        listening = asyncio.ensure_future(self._listen(attachment, incoming, inputs))
        ending = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            with self._processes.use(attachment.handle):
                writer.write(encode_message(process_id=process.id, stream_id=attachment.id))
                await writer.drain()
                ends: list[asyncio.Future[Any]] = [listening, incoming.gone, ending, stopping]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if incoming.gone.done():
                # What it has sent is still fed, as far as the process reads it.
                self._attachments.drop(attachment)
                await asyncio.wait([listening, ending, stopping], return_when=asyncio.FIRST_COMPLETED)
            elif ending.done():
                await self._tell_end(process, writer)
            elif listening.done() and (complaint := listening.result()):
                await self._tell(writer, process_id=process.id, error=complaint)
        except (ConnectionError, ContainerNotFound):
            pass  # the client has left, which is the same as when it closes; or the container has
        finally:
            for task in (listening, ending, stopping):
                task.cancel()
            done = not ending.cancelled() and ending.done()
            await asyncio.wait([listening, ending, stopping])
            incoming.close()
            if done or self._stopping.is_set():
                feeding.cancel()
                self._leave(attachment)
                self._attachments.retire(attachment)
            else:
                self._attachments.drop(attachment)
                rest = asyncio.ensure_future(self._feed_rest(attachment, inputs, feeding))
                self._tasks.add(rest)
                rest.add_done_callback(self._tasks.discard)

    async def _tell_end(self, process: RunningProcess, writer: asyncio.StreamWriter) -> None:
        status = process.exit
        assert status is not None
        await self._tell(writer, process_id=process.id, exit_status=status.shell_code())

    async def _tell(self, writer: asyncio.StreamWriter, **fields: Any) -> None:
        """Say the last message."""
        writer.write(encode_message(**fields))
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    # --- stdin

    async def _feed_rest(
        self, attachment: Attachment, inputs: asyncio.Queue[_Input], feeding: asyncio.Future[None]
    ) -> None:
        """The client has gone: what it has sent is still fed, unless the process ends before or the server stops."""

        async def finish() -> None:
            await inputs.put(_Left())
            await feeding

        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(finish()),
            asyncio.ensure_future(attachment.process.wait()),
            asyncio.ensure_future(self._stopping.wait()),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        ends.append(feeding)
        for each in ends:
            each.cancel()
        await asyncio.wait(ends)
        self._leave(attachment)

    async def _feed(self, attachment: Attachment, inputs: asyncio.Queue[_Input]) -> None:
        process = attachment.process
        while True:
            try:
                match await inputs.get():
                    case StdinData(data):
                        if data:
                            await process.write_stdin(data, None)
                            self._metrics.streamed(Stream.STDIN, len(data))
                    case StdinEnd():
                        if self._leave(attachment):
                            await process.close_stdin()
                    case _Left():
                        # A connection that breaks is no ^D: that would end the shell that somebody comes back to.
                        feeders = self._leave(attachment)
                        if feeders and feeders.of_run and process.spec.tty is None:
                            await process.close_stdin()
                        return
            except GardenError as error:  # the protocol has no answer for it (§6.4, statement 22)
                log.info("garden.input_refused", process_id=process.id, code=error.code, error=str(error))

    def _leave(self, attachment: Attachment) -> _Feeders | None:
        """Feed no more; those who fed, if it was the last of them."""
        key = (attachment.handle, attachment.process.id)
        feeders = self._feeders.get(key)
        if feeders is None or attachment not in feeders.clients:
            return None
        feeders.clients.discard(attachment)
        return None if feeders.clients else self._feeders.pop(key)

    # --- everything else

    async def _listen(
        self, attachment: Attachment, incoming: _Incoming, inputs: asyncio.Queue[_Input]
    ) -> str:
        """Do what the client says until it leaves, or says what nobody can understand; the complaint about that.

        After its last input it may still signal and resize.
        """
        decoder = MessageDecoder()
        with suppress(OSError):  # also ETIMEDOUT and the like, of a peer that keep-alive has found to be gone
            while data := await incoming.reader.read(_READ_BYTES):
                try:
                    for message in decoder.feed(data):
                        if isinstance(message, StdinData | StdinEnd):
                            await incoming.put(inputs, message)
                        else:
                            await self._apply(attachment.process, message)
                except Garbage as error:
                    log.info("garden.garbage", process_id=attachment.process.id, error=str(error))
                    return str(error)
        return ""

    async def _apply(self, process: RunningProcess, message: Resize | SignalProcess) -> None:
        try:
            match message:
                case Resize(size):
                    if size is not None:
                        await process.resize(size)
                case SignalProcess(signal):
                    await process.signal(_SIGNALS[signal], group=False)
        except GardenError as error:  # the protocol has no answer for it (§6.4, statement 22)
            log.info("garden.message_refused", process_id=process.id, code=error.code, error=str(error))


async def linger(reader: asyncio.StreamReader) -> None:
    """Read on for a moment after the last message, until the client closes."""
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(_LINGER_S):
            while await reader.read(_READ_BYTES):
                pass
