"""What one reader of one process has seen and what it must ask for next. Sans-I/O: both clients drive it.

    RunProcess ──► started ──► output* ──► exited, closed(stdout), closed(stderr) ──► end of stream
         └── connection breaks ──► AttachProcess from the offsets arrived ──► started ──► output* …

Two positions are kept per stream. `arrived` is the offset after the last byte received; a new stream is asked
to begin there. `taken` is the offset after the last byte given to the caller. They differ by what is
buffered, or, after a `wait` that had to let go of much unread output, by what must be asked for again.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import convert
from garden_py.client.errors import DataLoss, ErrorDetails, FailedPrecondition, GardenError, ProcessFailed
from garden_py.client.values import ExitStatus, Output, OutputChunk, ProcessInfo, Stream

# Unread output kept while somebody only waits for the exit. Beyond it the chunks are let go and asked for
# again when somebody reads: the server has them, and a waiting caller must not grow without bound.
_MAX_BUFFERED_BYTES: Final = 4 << 20

# Input kept for a replay after a broken connection. What the server has not accepted is at most what fits
# into HTTP/2 flow control and the server's own buffers; if ever more is missing, the server answers
# OUT_OF_RANGE.
_MAX_REPLAY_BYTES: Final = 8 << 20

STDIN_CLOSED: Final = "STDIN_CLOSED"
"""Code of the error for input that no process will read."""


class Follower:
    """The state of one reader.

    Args:
        handle: the container.
        process_id: the process, chosen before it was started.
        from_offsets: where to begin per stream; a stream left out begins at its end.
    """

    def __init__(self, handle: str, process_id: str, from_offsets: dict[Stream, int]) -> None:
        self.handle = handle
        self.process_id = process_id
        self.info: ProcessInfo | None = None
        self.exit: ExitStatus | None = None
        self.ended = False
        self._arrived: dict[Stream, int] = dict(from_offsets)
        self._taken: dict[Stream, int] = dict(from_offsets)
        self._buffer: deque[OutputChunk] = deque()
        self._buffered_bytes = 0
        self._behind = False
        self._exit_taken = False

    @property
    def offsets(self) -> dict[Stream, int]:
        """The offset after the last byte given to the caller, per stream that has a known position."""
        return dict(self._taken)

    def attach_request(self) -> pb.AttachProcessRequest:
        """The first message of a stream that goes on where the last one broke."""
        attach = pb.AttachProcessRequest.Attach(handle=self.handle, process_id=self.process_id)
        if Stream.STDOUT in self._arrived:
            attach.stdout_offset = self._arrived[Stream.STDOUT]
        if Stream.STDERR in self._arrived:
            attach.stderr_offset = self._arrived[Stream.STDERR]
        return pb.AttachProcessRequest(attach=attach)

    def on_event(self, event: pb.ProcessEvent) -> None:
        """Take in one answer.

        Raises:
            DataLoss: the server skipped bytes without saying so.
        """
        match event.WhichOneof("event"):
            case "output":
                self._on_output(convert.chunk_from_pb(event.output))
            case "exited":
                self.exit = convert.exit_from_pb(event.exited)
            case "started":
                self._on_started(convert.process_from_pb(event.started))
            case _:
                pass  # `closed` adds nothing to the end of the stream; unknown events are a newer server's

    def on_end_of_stream(self) -> bool:
        """The server ended the stream in good order. True: everything has been said; False: ask again."""
        self.ended = self.exit is not None
        return self.ended

    def take(self) -> OutputChunk | ExitStatus | None:
        """The next thing for the caller: a chunk, once the exit status; None: receive more first."""
        if not self._buffer:
            if self.exit is None or self._exit_taken or self._behind:
                return None
            self._exit_taken = True
            return self.exit
        chunk = self._buffer.popleft()
        self._buffered_bytes -= len(chunk.data)
        self._taken[chunk.stream] = chunk.offset + len(chunk.data)
        return chunk

    def must_rewind(self) -> bool:
        """Whether unread output was let go, so that reading needs a new stream from an earlier offset."""
        return self._behind

    def rewind(self) -> None:
        """Begin again after the last byte the caller took; the next stream must be a new one."""
        self._drop_buffer()
        self._arrived = dict(self._taken)
        self._behind = False
        self.ended = False

    def _on_started(self, info: ProcessInfo) -> None:
        self.info = info
        # A reader "from the end" learns here where that was; if the connection breaks before the first chunk
        # it can still ask for everything since.
        for stream, length in ((Stream.STDOUT, info.stdout_bytes), (Stream.STDERR, info.stderr_bytes)):
            if stream not in self._arrived:
                self._arrived[stream] = self._taken[stream] = length

    def _on_output(self, chunk: OutputChunk) -> None:
        expected = self._arrived.get(chunk.stream, chunk.offset)
        if chunk.offset > expected:
            name = chunk.stream.name.lower()
            raise DataLoss(f"bytes {expected} to {chunk.offset} of {name} are missing from the stream")
        data = chunk.data[expected - chunk.offset :]
        if not data:
            return
        self._arrived[chunk.stream] = expected + len(data)
        if self._behind:
            return
        self._buffer.append(OutputChunk(chunk.stream, expected, data))
        self._buffered_bytes += len(data)

    def let_go_if_large(self) -> None:
        """Called while nobody reads: keep memory bounded by forgetting what the server can send again."""
        if self._buffered_bytes > _MAX_BUFFERED_BYTES:
            self._drop_buffer()
            self._behind = True

    def _drop_buffer(self) -> None:
        self._buffer.clear()
        self._buffered_bytes = 0


class StdinJournal:
    """What was written to a process's stdin, by offset, with the end of it kept for a replay.

    Args:
        addressed: we write the process's stdin from its first byte on, so our offsets are the server's. A reader
            that joined later does not know how much others have written: its input has no offsets and is not
            replayed, so it arrives at most once.
    """

    def __init__(self, *, addressed: bool) -> None:
        self.closed = False
        self.used = False
        self._addressed = addressed
        self.given_up = False
        self._offset = 0
        self._tail: deque[pb.Stdin] = deque()
        self._tail_bytes = 0

    def write(self, data: bytes) -> pb.ProcessInput:
        """The message that carries data, which the caller has cut to a fitting size."""
        self.used = True
        if not self._addressed:
            return pb.ProcessInput(stdin=pb.Stdin(data=data))
        stdin = pb.Stdin(data=data, offset=self._offset)
        self._offset += len(data)
        self._tail.append(stdin)
        self._tail_bytes += len(data)
        while self._tail_bytes > _MAX_REPLAY_BYTES:
            self._tail_bytes -= len(self._tail.popleft().data)
        return pb.ProcessInput(stdin=stdin)

    def close(self) -> pb.ProcessInput:
        """The message that closes stdin."""
        self.closed = self.used = True
        return pb.ProcessInput(stdin=self._closing())

    def give_up(self, error: GardenError) -> bool:
        """Whether the stream broke only because stdin is closed; then nothing more is sent or replayed.

        That ends a stream for a reason that does not concern its output, which can be read on over a new one.
        """
        if error.code != STDIN_CLOSED or self.given_up:
            return False
        self.closed = self.given_up = True
        self._tail.clear()
        return True

    def replay(self) -> list[pb.ProcessInput]:
        """What a new stream must be told: the server skips the bytes that it has already accepted."""
        messages = [pb.ProcessInput(stdin=stdin) for stdin in self._tail]
        if self.closed and not self.given_up:
            messages.append(pb.ProcessInput(stdin=self._closing()))
        return messages

    def _closing(self) -> pb.Stdin:
        return pb.Stdin(close=True, offset=self._offset) if self._addressed else pb.Stdin(close=True)


def stdin_is_closed(process_id: str) -> FailedPrecondition:
    """The error of a write that no process will read."""
    return FailedPrecondition(f"stdin of process {process_id} is closed", ErrorDetails(code=STDIN_CLOSED))


def require_success(process_id: str, output: Output) -> None:
    """Refuse any end but exit code 0.

    Raises:
        ProcessFailed: with the reason and the end of stderr.
    """
    if output.exit.code == 0:
        return
    how = output.exit.reason or f"exit {output.exit.shell_code}"
    tail = output.stderr.decode(errors="replace").strip()[-2000:]
    raise ProcessFailed(f"process {process_id}: {how}" + (f": {tail}" if tail else ""))
