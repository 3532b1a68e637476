"""A process in a container, with asyncio: output, input, end. The same promises as the blocking `Process`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import calls, convert
from garden_py.client.address import CHUNK_BYTES
from garden_py.client.aio.link import AsyncExchange, AsyncLink
from garden_py.client.errors import FailedPrecondition, GardenError, Unavailable
from garden_py.client.follow import Follower, StdinJournal, require_success, stdin_is_closed
from garden_py.client.retry import Patience, RetryPolicy
from garden_py.client.values import ExitStatus, Output, OutputChunk, ProcessInfo, Stream, Tty

# A server answers WaitProcess when its timeout has passed; the call's own deadline leaves it time to say so.
_ANSWER_MARGIN_S: Final = 10.0


class AsyncProcessStdin:
    """The process's standard input. Writes wait while the process does not read."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process

    async def write(self, data: bytes) -> None:
        """Feed data, all of it, in order.

        Raises:
            FailedPrecondition: stdin is closed or the process has ended (code STDIN_CLOSED).
            Unavailable: the connection is lost for good.
        """
        view = memoryview(data)
        for begin in range(0, len(view), CHUNK_BYTES):
            await self._process._feed_stdin(bytes(view[begin : begin + CHUNK_BYTES]))

    async def close(self) -> None:
        """The process reads end of file after what was written. Safe twice and after the process's end."""
        await self._process._close_stdin()


class AsyncProcess:
    """One reader of a process; made by `AsyncContainer.run` and `AsyncContainer.attach`. See `Process`."""

    def __init__(
        self,
        link: AsyncLink,
        follower: Follower,
        opened: AsyncExchange,
        retry: RetryPolicy,
        request_type: type[pb.RunProcessRequest] | type[pb.AttachProcessRequest],
    ) -> None:
        self.id = follower.process_id
        self.handle = follower.handle
        self.stdin = AsyncProcessStdin(self)
        self._link = link
        self._follower = follower
        self._journal = StdinJournal(addressed=request_type is pb.RunProcessRequest)
        self._retry = retry
        self._patience = Patience(retry)
        self._exchange: AsyncExchange | None = opened
        self._request_type = request_type
        self._window: pb.ProcessInput | None = None
        self._closed = False
        self._reading = asyncio.Lock()  # held while an answer is received
        self._writing = asyncio.Lock()  # held while input is handed over, so that offsets stay in order
        self._opening = asyncio.Lock()  # held while a broken stream is replaced

    @classmethod
    async def _run(
        cls, link: AsyncLink, process_id: str, handle: str, first: pb.RunProcessRequest, retry: RetryPolicy
    ) -> Self:
        follower = Follower(handle, process_id, {Stream.STDOUT: 0, Stream.STDERR: 0})
        process = cls(link, follower, link.run(first), retry, pb.RunProcessRequest)
        await process._await_start()
        return process

    @classmethod
    async def _attach(
        cls, link: AsyncLink, handle: str, process_id: str, offsets: dict[Stream, int], retry: RetryPolicy
    ) -> Self:
        follower = Follower(handle, process_id, offsets)
        exchange = link.attach(follower.attach_request(), [])
        process = cls(link, follower, exchange, retry, pb.AttachProcessRequest)
        await process._await_start()
        return process

    def __repr__(self) -> str:
        return f"<AsyncProcess {self.handle}/{self.id}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def started(self) -> ProcessInfo:
        """The process as the server described it when this reader joined."""
        if self._follower.info is None:  # _await_start has seen to it
            raise AssertionError("an AsyncProcess is only given out after `started`")
        return self._follower.info

    @property
    def offsets(self) -> dict[Stream, int]:
        """The offset after the last byte given out per stream: where another reader can go on."""
        return self._follower.offsets

    @property
    def exit(self) -> ExitStatus | None:
        """How the process ended, if this reader has been told; asks nobody."""
        return self._follower.exit

    @property
    def ended(self) -> bool:
        """Whether everything has been said: the process has exited and both streams are closed."""
        return self._follower.ended

    async def events(self) -> AsyncIterator[OutputChunk | ExitStatus]:
        """Output chunks and, once, the exit status as soon as it is known.

        Output can follow the exit status: a background child may hold the streams open.
        """
        while (event := await self._next_event()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        async for event in self.events():
            if isinstance(event, OutputChunk):
                yield event

    async def output(self, *, check: bool = False) -> Output:
        """Read all that is left and wait for the end; `check`: ProcessFailed unless it is exit code 0."""
        parts: dict[Stream, list[bytes]] = {Stream.STDOUT: [], Stream.STDERR: []}
        async for chunk in self:
            parts[chunk.stream].append(chunk.data)
        status = await self.wait()
        output = Output(b"".join(parts[Stream.STDOUT]), b"".join(parts[Stream.STDERR]), status)
        if check:
            require_success(self.id, output)
        return output

    async def wait(
        self,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - the server measures it
    ) -> ExitStatus:
        """Wait until the process has exited; any number of times. Unread output can still be read afterwards.

        Raises:
            TimeoutError: it still runs.
        """
        if self._follower.exit is None and not self._reading.locked():
            async with self._reading:
                if timeout is None:
                    await self._receive_until_exit()
                elif not self._journal.used:
                    # An attached reader that does not read would hold the process up once retention is full. With
                    # input on its way we stay all the same: leaving would drop what has not been sent yet.
                    self._leave_exchange()
        known = self.exit
        return known if known is not None else await self._ask_for_exit(timeout)

    async def signal(self, which: int | str, *, group: bool = False) -> bool:
        """Send a signal by number or name; False: the process had exited."""
        message = calls.signal_message(which, group=group)
        return await self._link.unary(calls.signal(self.handle, self.id, message))

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the process's terminal its new size in character cells."""
        async with self._writing:
            self._window = pb.ProcessInput(window=convert.tty_to_pb(Tty(rows, columns)))
            await self._send_input(self._window)

    def close(self) -> None:
        """Leave the process. It goes on; iterating tasks see the end. Safe twice."""
        self._closed = True
        self._leave_exchange()

    async def _await_start(self) -> None:
        exchange = self._exchange
        if exchange is None:
            raise AssertionError("a new AsyncProcess has an open stream")
        try:
            while self._follower.info is None:
                event = await exchange.receive()
                if event is None:
                    raise Unavailable("the server ended the stream before the process was started")
                self._follower.on_event(event)
        except BaseException:
            exchange.cancel()
            raise

    async def _next_event(self) -> OutputChunk | ExitStatus | None:
        async with self._reading:
            if self._follower.must_rewind():
                self._leave_exchange()
                self._follower.rewind()
            while (event := self._follower.take()) is None:
                if self._follower.ended or self._closed or not await self._receive():
                    return None
            return event

    async def _receive(self) -> bool:
        """Take in one more answer, over a new stream if need be; False: there is no more."""
        async with self._opening:
            exchange = self._exchange or self._open_again()
        try:
            event = await exchange.receive()
        except GardenError as error:
            if self._closed:
                return False
            await self._reopen_after(exchange, error)
            return True
        except asyncio.CancelledError:
            # gRPC has cancelled the call together with this task; another task may read on over a new one.
            self._leave_exchange()
            raise
        if event is None:
            if self._follower.on_end_of_stream():
                return False
            early = Unavailable("the server ended the stream before the process's end")
            await self._reopen_after(exchange, early)
            return True
        # Not at `started`: a server that dies of every attach must run out of patience with it.
        if not event.HasField("started"):
            self._patience.restore()
        self._follower.on_event(event)
        return True

    async def _receive_until_exit(self) -> None:
        while self._follower.exit is None and await self._receive():
            self._follower.let_go_if_large()

    def _open_again(self) -> AsyncExchange:
        replay = self._journal.replay()
        if self._window is not None:
            replay.insert(0, self._window)
        self._request_type = pb.AttachProcessRequest
        self._exchange = self._link.attach(self._follower.attach_request(), replay)
        return self._exchange

    async def _reopen_after(self, broken: AsyncExchange, error: GardenError) -> None:
        """Replace a broken stream, after a delay; raises error when there is nothing more to try."""
        async with self._opening:
            if self._exchange is not broken:
                return  # the other side of the stream (reader or writer) was first
            if not self._journal.give_up(error):
                await asyncio.sleep(self._patience.next_delay_s(error))
            if not self._closed:
                self._open_again()

    def _leave_exchange(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    async def _feed_stdin(self, data: bytes) -> None:
        async with self._writing:
            if self._journal.closed:
                raise stdin_is_closed(self.id)
            await self._send_input(self._journal.write(data))

    async def _close_stdin(self) -> None:
        async with self._writing:
            if self._journal.closed:
                return
            try:
                await self._send_input(self._journal.close())
            except FailedPrecondition:
                return  # the process is gone; its stdin is as closed as it can be

    async def _send_input(self, message: pb.ProcessInput) -> None:
        """Hand over input; over a new stream if need be, to which the server compares offsets."""
        while True:
            async with self._opening:
                if self._follower.ended or self._closed or self._journal.given_up:
                    raise stdin_is_closed(self.id)
                exchange = self._exchange or self._open_again()
                request = self._request_type(input=message)
            if await exchange.send(request):
                return
            failure = await exchange.failure()
            if failure is None or self._closed or self._follower.exit is not None:
                raise stdin_is_closed(self.id)
            await self._reopen_after(exchange, failure)

    async def _ask_for_exit(
        self,
        timeout: timedelta | None,  # noqa: ASYNC109 - the server measures it
    ) -> ExitStatus:
        patience = Patience(self._retry)
        deadline_s = None if timeout is None else time.monotonic() + timeout.total_seconds()
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            left = None if left_s is None else timedelta(seconds=left_s)
            try:
                status = await self._link.unary(
                    calls.wait(self.handle, self.id, left),
                    timeout_s=None if left_s is None else left_s + _ANSWER_MARGIN_S,
                )
            except GardenError as error:
                await asyncio.sleep(patience.next_delay_s(error))
                continue
            if status is not None:
                self._follower.exit = status
                return status
            if left_s == 0:
                raise TimeoutError(f"process {self.id} still runs")
