"""The metrics door: GET /metrics over HTTP/1.1, for Prometheus, on the server's own event loop.

Numbers are read where they are written, so no lock and no thread is needed. One request per connection, read and
answered within a deadline; whoever is slower, or says more than a scraper does, is cut off.
"""

from __future__ import annotations

import asyncio

from garden_py.api.address import is_loopback
from garden_py.config import Config
from garden_py.model.errors import HostFault, InvalidField
from garden_py.observe.metrics import CONTENT_TYPE, Metrics

_HEAD_MAX_BYTES = 8192
_DEADLINE_S = 10.0


class MetricsDoor:
    """Serves one Metrics on `config.metrics`, if that is set."""

    def __init__(self, metrics: Metrics, config: Config) -> None:
        self._metrics = metrics
        self._config = config
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind and serve; does nothing without an address.

        Raises:
            InvalidField: it is not HOST:PORT, or not a loopback address and metrics_insecure is not set.
            HostFault: it cannot be bound.
        """
        address = self._config.metrics
        if not address:
            return
        if not is_loopback(address, field="metrics") and not self._config.metrics_insecure:
            raise InvalidField(
                "metrics",
                f"{address}: whoever reaches it can read it; use a loopback address, or say --metrics-insecure",
            )
        host, _, port = address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._serve, host.strip("[]"), int(port), limit=_HEAD_MAX_BYTES
            )
        except OSError as error:
            raise HostFault("listen", f"cannot bind {address} for metrics: {error}") from error

    async def stop(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_DEADLINE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            writer.transport.abort()  # nobody is there to be answered, or nobody who speaks HTTP
        finally:
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        """The whole response to a request's head. Source: RFC 9112 §2.1, RFC 9110 §15.5."""
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", b"only GET\n"
        elif path != b"/metrics":
            status, body = "404 Not Found", b"only /metrics\n"
        else:
            status, body = "200 OK", self._metrics.render()
        kind = CONTENT_TYPE if status.startswith("200") else "text/plain"
        allow = "Allow: GET, HEAD\r\n" if status.startswith("405") else ""
        lines = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{allow}"
        lines += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return lines.encode() + (b"" if method == b"HEAD" else body)
