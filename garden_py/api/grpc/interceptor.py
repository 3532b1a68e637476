"""The one place where errors become statuses and where a finished call is logged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import structlog

from garden_py.api.grpc.chunks import pass_encoded
from garden_py.api.grpc.drain import Drain
from garden_py.api.grpc.outcome import Outcome, counted
from garden_py.api.grpc.status import status_of
from garden_py.model.errors import GardenError, HostFault
from garden_py.observe.calls import REQUEST_ID_HEADER, TRACE_HEADERS, begin_call
from garden_py.observe.metrics import Metrics

log = structlog.get_logger()
_OURS = "/garden.v1.Garden/"
_HEADERS = {REQUEST_ID_HEADER, *TRACE_HEADERS}
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps every method of ours: a GardenError becomes its status, anything else is our bug and becomes INTERNAL.

    Args:
        wait_for: waits until a restarted server knows the container of a handle; see service/recovery.py.
    """

    def __init__(self, wait_for: Callable[[str], Awaitable[None]], drain: Drain, metrics: Metrics) -> None:
        self._wait_for = wait_for
        self._drain = drain
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:  # an unknown method; grpc answers UNIMPLEMENTED
            return handler  # type: ignore[unreachable]
        method = str(handler_call_details.method)
        if not method.startswith(_OURS):  # health and reflection have manners of their own
            return handler
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        inner = getattr(handler, make.removesuffix("_rpc_method_handler"))
        factory: Callable[..., Handler] = getattr(grpc, make)
        guarded = (self._guard_stream if handler.response_streaming else self._guard_single)(inner, method)
        serializer = pass_encoded(handler.response_serializer)
        return factory(guarded, handler.request_deserializer, serializer)

    def _guard_single(
        self, inner: Callable[[Any, Context], Any], method: str
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            request_id = _begin(context, request)
            with counted(self._metrics, _short(method)) as outcome:
                try:
                    with self._drain.call(method):
                        await self._wait_for(getattr(request, "handle", ""))
                        answer = await inner(request, context)
                except Exception as error:
                    await _abort(error, context, method, outcome, request_id)
                    raise AssertionError("abort raises") from error
                outcome.answered()
                log.debug("rpc.done", method=method, took_ms=outcome.took_ms)
                return answer

        return call

    def _guard_stream(
        self, inner: Callable[[Any, Context], AsyncIterator[Any]], method: str
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            request_id = _begin(context, request)
            with counted(self._metrics, _short(method)) as outcome:
                try:
                    with self._drain.call(method):
                        await self._wait_for(getattr(request, "handle", ""))
                        async for answer in inner(request, context):
                            outcome.answered()
                            yield answer
                except Exception as error:  # noqa: BLE001 - turned into a status below
                    await _abort(error, context, method, outcome, request_id)
                log.debug("rpc.done", method=method, took_ms=outcome.took_ms)

        return call


def _begin(context: Context, request: Any) -> str:
    """Name the call in the log and to its caller; grpc runs each call in a task of its own."""
    given = {key: str(value) for key, value in context.invocation_metadata() or () if key in _HEADERS}
    request_id = begin_call(given.pop(REQUEST_ID_HEADER, ""), getattr(request, "handle", ""), given)
    context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
    return request_id


async def _abort(error: Exception, context: Context, method: str, outcome: Outcome, request_id: str) -> None:
    outcome.failed(error)
    if isinstance(error, grpc.aio.AbortError | grpc.aio.BaseError):
        raise error
    if isinstance(error, GardenError):
        report = log.warning if isinstance(error, HostFault) else log.debug
        report("rpc.refused", method=method, code=error.code, error=str(error), took_ms=outcome.took_ms)
        status = status_of(error)
        trailing = (*(status.trailing_metadata or ()), (REQUEST_ID_HEADER, request_id))
        await context.abort(status.code, status.details, trailing)
    log.error("rpc.failed", method=method, took_ms=outcome.took_ms, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error of the server: {type(error).__name__}")


def _short(method: str) -> str:
    return method.rpartition("/")[2]


_MAKERS: dict[tuple[bool, bool], str] = {
    (False, False): "unary_unary_rpc_method_handler",
    (True, False): "stream_unary_rpc_method_handler",
    (False, True): "unary_stream_rpc_method_handler",
    (True, True): "stream_stream_rpc_method_handler",
}
