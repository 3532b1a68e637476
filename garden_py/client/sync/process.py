"""A process in a container, blocking: its output, input, end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import calls, convert
from garden_py.client.address import CHUNK_BYTES
from garden_py.client.errors import (
    FailedPrecondition,
    GardenError,
    Unavailable,
    error_from_rpc,
)
from garden_py.client.follow import Follower, StdinJournal, require_success, stdin_is_closed
from garden_py.client.retry import Patience, RetryPolicy
from garden_py.client.sync.link import Exchange, Link
from garden_py.client.values import ExitStatus, Output, OutputChunk, ProcessInfo, Stream, Tty

# A server answers WaitProcess when its timeout has passed; the call's own deadline leaves it time to say so.
_ANSWER_MARGIN_S: Final = 10.0


class ProcessStdin:
    """The process's standard input. Writes block while the process does not read."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def write(self, data: bytes) -> None:
        """Feed data, all of it, in order.

        Over a broken connection each byte is still fed once if this reader started the process (`run`), and at
        most once if it joined it (`attach`).

        Raises:
            FailedPrecondition: stdin is closed or the process has ended (code STDIN_CLOSED).
            Unavailable: the connection is lost for good.
        """
        view = memoryview(data)
        for begin in range(0, len(view), CHUNK_BYTES):
            self._process._feed_stdin(bytes(view[begin : begin + CHUNK_BYTES]))

    def close(self) -> None:
        """The process reads end of file after what was written. Safe twice and after the process's end."""
        self._process._close_stdin()


class Process:
    """One reader of a process; made by `Container.run` and `Container.attach`.

    Iterating gives output chunks in order until both streams are closed. If the connection breaks, the reader
    asks again from the offset it has reached, within the client's RetryPolicy: no byte is lost or given
    twice. Leaving (`close`, the end of `with`) never ends the process. Any thread may call any method; chunks
    go to whichever thread asks.
    """

    def __init__(
        self,
        link: Link,
        follower: Follower,
        opened: Exchange,
        retry: RetryPolicy,
        request_type: type[pb.RunProcessRequest] | type[pb.AttachProcessRequest],
    ) -> None:
        self.id = follower.process_id
        self.handle = follower.handle
        self.stdin = ProcessStdin(self)
        self._link = link
        self._follower = follower
        self._journal = StdinJournal(addressed=request_type is pb.RunProcessRequest)
        self._retry = retry
        self._patience = Patience(retry)
        self._exchange: Exchange | None = opened
        self._request_type = request_type
        self._window: pb.ProcessInput | None = None
        self._closed = False
        self._reading = threading.Lock()  # held while an answer is received
        self._writing = threading.Lock()  # held while input is handed over, so that offsets stay in order
        self._opening = threading.RLock()  # guards _exchange, _window and the journal

    @classmethod
    def _run(
        cls, link: Link, process_id: str, handle: str, first: pb.RunProcessRequest, retry: RetryPolicy
    ) -> Self:
        follower = Follower(handle, process_id, {Stream.STDOUT: 0, Stream.STDERR: 0})
        process = cls(link, follower, link.run(first), retry, pb.RunProcessRequest)
        process._await_start()
        return process

    @classmethod
    def _attach(
        cls, link: Link, handle: str, process_id: str, offsets: dict[Stream, int], retry: RetryPolicy
    ) -> Self:
        follower = Follower(handle, process_id, offsets)
        exchange = link.attach(follower.attach_request(), [])
        process = cls(link, follower, exchange, retry, pb.AttachProcessRequest)
        process._await_start()
        return process

    def __repr__(self) -> str:
        return f"<Process {self.handle}/{self.id}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def started(self) -> ProcessInfo:
        """The process as the server described it when this reader joined."""
        if self._follower.info is None:  # _await_start has seen to it
            raise AssertionError("a Process is only given out after `started`")
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

    def events(self) -> Iterator[OutputChunk | ExitStatus]:
        """Output chunks and, once, the exit status as soon as it is known.

        Output can follow the exit status: a background child may hold the streams open.
        """
        while (event := self._next_event()) is not None:
            yield event

    def __iter__(self) -> Iterator[OutputChunk]:
        for event in self.events():
            if isinstance(event, OutputChunk):
                yield event

    def output(self, *, check: bool = False) -> Output:
        """Read all that is left and wait for the end.

        Raises:
            ProcessFailed: with `check`, the process did not exit with code 0.
        """
        parts: dict[Stream, list[bytes]] = {Stream.STDOUT: [], Stream.STDERR: []}
        for chunk in self:
            parts[chunk.stream].append(chunk.data)
        output = Output(b"".join(parts[Stream.STDOUT]), b"".join(parts[Stream.STDERR]), self.wait())
        if check:
            require_success(self.id, output)
        return output

    def wait(self, timeout: timedelta | None = None) -> ExitStatus:
        """Wait until the process has exited; any number of times. Unread output can still be read afterwards.

        Raises:
            TimeoutError: it still runs.
        """
        if self._follower.exit is None and self._reading.acquire(blocking=False):
            try:
                if timeout is None:
                    self._receive_until_exit()
                elif not self._journal.used:
                    # An attached reader that does not read would hold the process up once retention is full. With
                    # input on its way we stay all the same: leaving would drop what has not been sent yet.
                    self._leave_exchange()
            finally:
                self._reading.release()
        known = self.exit
        return known if known is not None else self._ask_for_exit(timeout)

    def signal(self, which: int | str, *, group: bool = False) -> bool:
        """Send a signal by number or name ("TERM", "SIGTERM"); `group`: to the whole process group.

        Returns:
            False: the process had exited.
        """
        message = calls.signal_message(which, group=group)
        return self._link.unary(calls.signal(self.handle, self.id, message))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the process's terminal its new size in character cells."""
        window = pb.ProcessInput(window=convert.tty_to_pb(Tty(rows, columns)))
        with self._writing:
            with self._opening:
                self._window = window
            self._send_input(window)

    def close(self) -> None:
        """Leave the process. It goes on; iterating threads see the end. Safe twice."""
        self._closed = True
        self._leave_exchange()

    def _await_start(self) -> None:
        exchange = self._exchange
        if exchange is None:
            raise AssertionError("a new Process has an open stream")
        try:
            while self._follower.info is None:
                event = exchange.receive()
                if event is None:
                    raise Unavailable("the server ended the stream before the process was started")
                self._follower.on_event(event)
        except BaseException:
            exchange.cancel()
            raise

    def _next_event(self) -> OutputChunk | ExitStatus | None:
        with self._reading:
            if self._follower.must_rewind():
                self._leave_exchange()
                self._follower.rewind()
            while (event := self._follower.take()) is None:
                if self._follower.ended or self._closed or not self._receive():
                    return None
            return event

    def _receive(self) -> bool:
        """Take in one more answer, over a new stream if need be; False: there is no more."""
        with self._opening:
            exchange = self._exchange or self._open_again()
        try:
            event = exchange.receive()
        except GardenError as error:
            if self._closed:
                return False
            self._reopen_after(exchange, error)
            return True
        if event is None:
            if self._follower.on_end_of_stream():
                return False
            self._reopen_after(exchange, Unavailable("the server ended the stream before the process's end"))
            return True
        # Not at `started`: a server that dies of every attach must run out of patience with it.
        if not event.HasField("started"):
            self._patience.restore()
        self._follower.on_event(event)
        return True

    def _receive_until_exit(self) -> None:
        while self._follower.exit is None and self._receive():
            self._follower.let_go_if_large()

    def _open_again(self) -> Exchange:
        replay = self._journal.replay()
        if self._window is not None:
            replay.insert(0, self._window)
        self._request_type = pb.AttachProcessRequest
        self._exchange = self._link.attach(self._follower.attach_request(), replay)
        return self._exchange

    def _reopen_after(self, broken: Exchange, error: GardenError) -> None:
        """Replace a broken stream, after a delay; raises error when there is nothing more to try."""
        with self._opening:
            if self._exchange is not broken:
                return  # the other side of the stream (reader or writer) was first
            if not self._journal.give_up(error):
                time.sleep(self._patience.next_delay_s(error))
            if not self._closed:
                self._open_again()

    def _leave_exchange(self) -> None:
        with self._opening:
            exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def _feed_stdin(self, data: bytes) -> None:
        with self._writing:
            with self._opening:
                if self._journal.closed:
                    raise stdin_is_closed(self.id)
                message = self._journal.write(data)
            self._send_input(message)

    def _close_stdin(self) -> None:
        with self._writing:
            with self._opening:
                if self._journal.closed:
                    return
                message = self._journal.close()
            try:
                self._send_input(message)
            except FailedPrecondition:
                return  # the process is gone; its stdin is as closed as it can be

    def _send_input(self, message: pb.ProcessInput) -> None:
        """Hand over input; over a new stream if need be, to which the server compares offsets."""
        while True:
            with self._opening:
                if self._follower.ended or self._closed or self._journal.given_up:
                    raise stdin_is_closed(self.id)
                exchange = self._exchange or self._open_again()
                request = self._request_type(input=message)
            if exchange.send(request):
                return
            failure = exchange.failure()
            if failure is None or self._closed or self._follower.exit is not None:
                raise stdin_is_closed(self.id)
            self._reopen_after(exchange, error_from_rpc(failure))

    def _ask_for_exit(self, timeout: timedelta | None) -> ExitStatus:
        patience = Patience(self._retry)
        deadline_s = None if timeout is None else time.monotonic() + timeout.total_seconds()
        while True:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            left = None if left_s is None else timedelta(seconds=left_s)
            try:
                status = self._link.unary(
                    calls.wait(self.handle, self.id, left),
                    timeout_s=None if left_s is None else left_s + _ANSWER_MARGIN_S,
                )
            except GardenError as error:
                time.sleep(patience.next_delay_s(error))
                continue
            if status is not None:
                self._follower.exit = status
                return status
            if left_s == 0:
                raise TimeoutError(f"process {self.id} still runs")
