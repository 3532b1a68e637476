"""Performs calls over one gRPC channel, blocking, and turns their failures into typed errors."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import calls
from garden_py.client.address import CHUNK_BYTES, Tls, channel_options, read_tls_files, resolve_target
from garden_py.client.errors import error_from_rpc

Value = TypeVar("Value")

# Requests that may wait for the network per stream: with chunks of 256 KiB, 1 MiB of input in flight.
_MAX_QUEUED_REQUESTS: Final = 4


class RequestFeed(Iterator[Message]):
    """The requests of one stream: a writer puts, gRPC's sending thread takes.

    `put` blocks while the network is slower than the writer, so input is never piled up in memory.
    """

    def __init__(self, first: Iterable[Message]) -> None:
        self._queue: deque[Message] = deque(first)
        self._closed = False
        self._changed = threading.Condition()

    def put(self, request: Message) -> bool:
        """Hand over a request; False: the stream is over and the request was not sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._queue) < _MAX_QUEUED_REQUESTS)
            if self._closed:
                return False
            self._queue.append(request)
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """The stream is over: wakes the writer and ends gRPC's sending thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __next__(self) -> Message:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._queue))
            if self._closed:
                raise StopIteration
            request = self._queue.popleft()
            self._changed.notify_all()
            return request


class Exchange:
    """One bidirectional stream of process input and process events."""

    def __init__(self, call: Any, feed: RequestFeed) -> None:
        self._call = call
        self._feed = feed
        # gRPC's sending thread waits in the feed; without this it would outlive the call.
        if not call.add_callback(feed.close):
            feed.close()

    def send(self, request: Message) -> bool:
        """Hand over a request; False: the stream is over."""
        return self._feed.put(request)

    def receive(self) -> pb.ProcessEvent | None:
        """The next answer; None: the server ended the stream in good order.

        Raises:
            GardenError: the stream broke.
        """
        try:
            event: pb.ProcessEvent = next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as failure:
            raise error_from_rpc(failure) from None
        return event

    def failure(self) -> grpc.RpcError | None:
        """How the stream ended, once it has; None: in good order."""
        if self._call.code() is grpc.StatusCode.OK:
            return None
        failure: grpc.RpcError = self._call
        return failure

    def cancel(self) -> None:
        """Leave. Safe at any time and twice."""
        self._feed.close()
        self._call.cancel()


class Link:
    """A channel with the calls of `garden_py.client.calls` on it."""

    def __init__(self, address: str | None, tls: Tls | None, call_timeout: timedelta) -> None:
        target = resolve_target(address)
        options = channel_options(target, tls)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(*read_tls_files(tls))
            self._channel = grpc.secure_channel(target, credentials, options=options)
        self._timeout_s = call_timeout.total_seconds()
        self.target = target

    def close(self) -> None:
        """Ends all calls and the connection. Safe twice."""
        self._channel.close()

    def unary(self, call: calls.Call[Value], *, timeout_s: float | None = None) -> Value:
        """The value of a call with one answer.

        Args:
            call: what to ask.
            timeout_s: limit of this call; None: the client's default, or no limit if the call may wait.

        Raises:
            GardenError: the call failed.
        """
        if timeout_s is None and not call.waits:
            timeout_s = self._timeout_s
        method = self._channel.unary_unary(
            calls.method_path(call.rpc),
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply_type.FromString,
        )
        try:
            reply = method(call.request, timeout=timeout_s)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure) from None
        return call.decode(reply)

    def answers(self, call: calls.Call[Value]) -> Iterator[Value]:
        """The values of a call with a stream of answers. Leaving the iterator early ends the call.

        Raises:
            GardenError: the stream broke; the values before it were given.
        """
        method = self._channel.unary_stream(
            calls.method_path(call.rpc),
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply_type.FromString,
        )
        stream: Any = method(call.request)
        try:
            for reply in stream:
                yield call.decode(reply)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure) from None
        finally:
            stream.cancel()

    def upload(self, call: calls.Upload[Value], chunks: Iterable[bytes]) -> Value:
        """Send bytes in pieces of at most CHUNK_BYTES; the answer.

        Raises:
            GardenError: the server refused.
            Exception: whatever the iterable raised; the call has been cancelled then.
        """
        source_failures: list[BaseException] = []

        def requests() -> Iterator[Message | bytes]:
            yield call.first
            try:
                for chunk in chunks:
                    yield from call.pieces(chunk, CHUNK_BYTES)
            except Exception as failure:  # noqa: BLE001 - kept for the caller's thread
                source_failures.append(failure)
                stream.cancel()

        method = self._channel.stream_unary(
            calls.method_path(call.rpc),
            request_serializer=calls.serialize,
            response_deserializer=call.reply_type.FromString,
        )
        started = threading.Event()

        def begin() -> Iterator[Message | bytes]:
            # gRPC's sending thread may run before `stream` is bound; the first request must not.
            started.wait()
            yield from requests()

        stream: Any = method.future(begin())
        started.set()
        try:
            return call.decode(stream.result())
        except (grpc.RpcError, grpc.FutureCancelledError) as failure:
            if source_failures:
                raise source_failures[0] from None
            raise error_from_rpc(failure) from None

    def run(self, first: pb.RunProcessRequest) -> Exchange:
        """Open RunProcess."""
        return self._exchange("RunProcess", pb.RunProcessRequest, [first])

    def attach(self, first: pb.AttachProcessRequest, replay: Iterable[pb.ProcessInput]) -> Exchange:
        """Open AttachProcess and say again what a broken stream may have lost."""
        inputs = (pb.AttachProcessRequest(input=each) for each in replay)
        return self._exchange("AttachProcess", pb.AttachProcessRequest, [first, *inputs])

    def _exchange(self, rpc: str, request_type: Any, first: Iterable[Message]) -> Exchange:
        feed = RequestFeed(first)
        method = self._channel.stream_stream(
            calls.method_path(rpc),
            request_serializer=request_type.SerializeToString,
            response_deserializer=pb.ProcessEvent.FromString,
        )
        return Exchange(method(feed), feed)
