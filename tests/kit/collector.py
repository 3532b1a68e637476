"""An OpenTelemetry collector on loopback: takes traces by OTLP over HTTP and keeps their spans."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Collector:
    """What has come; `path` is that of the last request."""

    endpoint: str = ""
    spans: list[Any] = field(default_factory=list)
    resource: dict[str, str] = field(default_factory=dict)
    path: str = ""

    def traces(self, name: str) -> list[list[Any]]:
        """The traces whose root span has this name: the root, then its children in the order of their begin."""
        roots = [span for span in self.spans if not span.parent_span_id and span.name == name]
        return [[root, *self._below(root)] for root in roots]

    def _below(self, root: Any) -> list[Any]:
        children = [span for span in self.spans if span.parent_span_id == root.span_id]
        assert all(span.trace_id == root.trace_id for span in children)
        return sorted(children, key=lambda span: span.start_time_unix_nano)

    def take(self, path: str, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for each in request.resource_spans:
            self.resource |= {pair.key: pair.value.string_value for pair in each.resource.attributes}
            self.spans += [span for scope in each.scope_spans for span in scope.spans]
        self.path = path


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            collector.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attributes_of(span: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in span.attributes}
