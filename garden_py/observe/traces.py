"""OpenTelemetry traces, an extra: each create and each destroy is a span with its steps as spans below it.

It is a trace of its own, or a part of its caller's trace where that one tells of it (calls.TRACE_HEADERS).

The SDK is loaded only when traces are wanted. It sends in a thread of its own, and drops what the collector does not
take: nobody waits for it. Source: opentelemetry.io/docs/specs/otlp, §OTLP/HTTP.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from structlog.contextvars import get_contextvars

from garden_py.model.errors import InvalidField
from garden_py.observe.calls import trace_of_caller
from garden_py.observe.steps import Operation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = structlog.get_logger()
FIELD = "otel_endpoint"
_TRACES_PATH = "/v1/traces"
_SEND_TIMEOUT_S = 2.0
_PROBLEM_MAX = 500
_SEND_EVERY_MS = 1000.0


class Tracing:
    """Turns operations into spans and has them sent."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("garden_py")

    def operation_ended(self, operation: Operation) -> None:
        """A `steps.Listener`; the spans get the times that were taken then."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes = {"garden.handle": operation.handle}
        if request_id := get_contextvars().get("request_id"):
            attributes["garden.request_id"] = request_id
        caller = TraceContextTextMapPropagator().extract(trace_of_caller(), Context())
        whole = self._tracer.start_span(
            operation.name, context=caller, attributes=attributes, start_time=operation.began_ns
        )
        inside = set_span_in_context(whole, caller)
        for step in operation.steps:
            span = self._tracer.start_span(step.step.value, context=inside, start_time=step.began_ns)
            if step.failure:
                span.set_status(Status(StatusCode.ERROR, step.failure))
            span.end(step.began_ns + step.took_ns)
        if operation.failure:
            whole.set_status(Status(StatusCode.ERROR, operation.failure))
        whole.end(operation.began_ns + operation.took_ns)

    def close(self) -> None:
        """Send what is left. Blocks for as long as the collector takes, at most some seconds."""
        self._provider.shutdown()


class _Forward(logging.Handler):
    """What the SDK has to say goes into the server's log, in its form."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("traces.trouble", problem=record.getMessage()[:_PROBLEM_MAX])


def open_tracing(endpoint: str, *, version: str, instance: str) -> Tracing | None:
    """Traces to a collector; None without one.

    Args:
        endpoint: its URL for OTLP over HTTP; without a path the usual one is meant.
        version: of the server.
        instance: what tells it from other servers.

    Raises:
        InvalidField: that is no such URL, or the extra is not installed.
    """
    if not endpoint:
        return None
    url = collector_url(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidField(
            FIELD, f"needs an extra that is not installed: pip install 'garden-py[otel]' ({error})"
        ) from error
    sdk = logging.getLogger("opentelemetry")
    sdk.handlers, sdk.propagate = [_Forward(logging.WARNING)], False
    names = {"service.name": "garden", "service.version": version, "service.instance.id": instance}
    # The server's end is the wiring's affair; atexit would come after its event loop.
    provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=url, timeout=_SEND_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS))
    return Tracing(provider)


def collector_url(endpoint: str) -> str:
    """The URL that traces are sent to.

    Raises:
        InvalidField: not http:// or https:// with a host.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidField(FIELD, f"{endpoint!r} is not a URL such as http://127.0.0.1:4318")
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + _TRACES_PATH
