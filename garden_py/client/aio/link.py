"""Performs calls over one gRPC channel with asyncio, and turns their failures into typed errors."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from datetime import timedelta
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import calls
from garden_py.client.address import CHUNK_BYTES, Tls, channel_options, read_tls_files, resolve_target
from garden_py.client.errors import Cancelled, GardenError, Unavailable, error_from_rpc, make_error

Value = TypeVar("Value")

# As in the blocking client: with chunks of 256 KiB, 1 MiB of input in flight.
_MAX_QUEUED_REQUESTS: Final = 4

_FAILED_WRITE: Final = "Internal error from Core"


class AsyncRequestFeed(AsyncIterator[Message]):
    """The requests of one stream: a writer puts, gRPC's sending task takes."""

    def __init__(self, first: Iterable[Message]) -> None:
        self._queue: deque[Message] = deque(first)
        self._closed = False
        self._changed = asyncio.Event()

    async def put(self, request: Message) -> bool:
        """Hand over a request; False: the stream is over and the request was not sent."""
        while not self._closed and len(self._queue) >= _MAX_QUEUED_REQUESTS:
            await self._wait_for_change()
        if self._closed:
            return False
        self._queue.append(request)
        self._changed.set()
        return True

    def close(self) -> None:
        """The stream is over: wakes the writer and ends gRPC's sending task."""
        self._closed = True
        self._changed.set()

    async def __anext__(self) -> Message:
        while not self._closed and not self._queue:
            await self._wait_for_change()
        if self._closed:
            raise StopAsyncIteration
        request = self._queue.popleft()
        self._changed.set()
        return request

    async def _wait_for_change(self) -> None:
        # Both sides may wait at once: set() wakes all present waiters, each of which looks again.
        self._changed.clear()
        await self._changed.wait()


def _stream_error(failure: grpc.aio.AioRpcError) -> GardenError:
    """The typed error of a stream that the client writes to and that broke.

    When a write fails before the status has been read, grpc.aio puts INTERNAL in the status's place
    (`_StreamRequestMixin._write`). All that is known then is that the stream broke; the next try learns why.
    """
    return _make_stream_error(failure.code(), failure.details(), failure.trailing_metadata())


def _make_stream_error(
    code: grpc.StatusCode, message: str | None, trailing: Iterable[Any] | None
) -> GardenError:
    if code is grpc.StatusCode.INTERNAL and message == _FAILED_WRITE:
        return Unavailable("the stream broke while it was written to")
    return make_error(code, message, trailing)


class AsyncExchange:
    """One bidirectional stream of process input and process events."""

    def __init__(self, call: Any, feed: AsyncRequestFeed) -> None:
        self._call = call
        self._feed = feed
        call.add_done_callback(lambda _: feed.close())

    async def send(self, request: Message) -> bool:
        """Hand over a request; False: the stream is over."""
        return await self._feed.put(request)

    async def receive(self) -> pb.ProcessEvent | None:
        """The next answer; None: the server ended the stream in good order.

        Raises:
            GardenError: the stream broke, or was left by another task (Cancelled).
        """
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise _stream_error(failure) from None
        except asyncio.CancelledError:
            # gRPC raises this both for a cancelled task and for a call that was cancelled under the reader.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the stream was left") from None
        # The end is told by a marker object, grpc.aio.EOF.
        return event if isinstance(event, pb.ProcessEvent) else None

    async def failure(self) -> GardenError | None:
        """How the stream ended, once it has; None: in good order."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return None
        details, trailing = await self._call.details(), await self._call.trailing_metadata()
        return _make_stream_error(code, details, trailing)

    def cancel(self) -> None:
        """Leave. Safe at any time and twice."""
        self._feed.close()
        self._call.cancel()


class AsyncLink:
    """A channel with the calls of `garden_py.client.calls` on it."""

    def __init__(self, address: str | None, tls: Tls | None, call_timeout: timedelta) -> None:
        target = resolve_target(address)
        options = channel_options(target, tls)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(*read_tls_files(tls))
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._timeout_s = call_timeout.total_seconds()
        self.target = target

    async def close(self) -> None:
        """Ends all calls and the connection. Safe twice."""
        await self._channel.close(None)

    async def unary(self, call: calls.Call[Value], *, timeout_s: float | None = None) -> Value:
        """The value of a call with one answer; arguments and errors as in the blocking client."""
        if timeout_s is None and not call.waits:
            timeout_s = self._timeout_s
        method: Any = self._channel.unary_unary(
            calls.method_path(call.rpc),
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply_type.FromString,
        )
        try:
            reply = await method(call.request, timeout=timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from None
        return call.decode(reply)

    async def answers(self, call: calls.Call[Value]) -> AsyncIterator[Value]:
        """The values of a call with a stream of answers. Closing the iterator early ends the call."""
        method: Any = self._channel.unary_stream(
            calls.method_path(call.rpc),
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply_type.FromString,
        )
        stream = method(call.request)
        try:
            async for reply in stream:
                yield call.decode(reply)
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from None
        finally:
            stream.cancel()

    async def upload(self, call: calls.Upload[Value], chunks: AsyncIterable[bytes]) -> Value:
        """Send bytes in pieces of at most CHUNK_BYTES; the answer. What the iterable raises reaches the caller."""
        method: Any = self._channel.stream_unary(
            calls.method_path(call.rpc),
            request_serializer=calls.serialize,
            response_deserializer=call.reply_type.FromString,
        )
        stream = method()
        try:
            await stream.write(call.first)
            async for chunk in chunks:
                for request in call.pieces(chunk, CHUNK_BYTES):
                    await stream.write(request)
            await stream.done_writing()
            return call.decode(await stream)
        except asyncio.InvalidStateError:
            return call.decode(await self._end_of(stream))
        except grpc.aio.AioRpcError as failure:
            raise _stream_error(failure) from None
        finally:
            stream.cancel()

    async def _end_of(self, stream: Any) -> Any:
        """A write found the call finished: the server answered before it had read everything."""
        try:
            return await stream
        except grpc.aio.AioRpcError as failure:
            raise _stream_error(failure) from None

    def run(self, first: pb.RunProcessRequest) -> AsyncExchange:
        """Open RunProcess."""
        return self._exchange("RunProcess", pb.RunProcessRequest, [first])

    def attach(self, first: pb.AttachProcessRequest, replay: Iterable[pb.ProcessInput]) -> AsyncExchange:
        """Open AttachProcess and say again what a broken stream may have lost."""
        inputs = (pb.AttachProcessRequest(input=each) for each in replay)
        return self._exchange("AttachProcess", pb.AttachProcessRequest, [first, *inputs])

    def _exchange(self, rpc: str, request_type: Any, first: Iterable[Message]) -> AsyncExchange:
        feed = AsyncRequestFeed(first)
        method: Any = self._channel.stream_stream(
            calls.method_path(rpc),
            request_serializer=request_type.SerializeToString,
            response_deserializer=pb.ProcessEvent.FromString,
        )
        return AsyncExchange(method(feed), feed)
