"""Doors that only show something: GET of a few pages over HTTP/1.1, on the server's own event loop.

`metrics_door` is for Prometheus, `debug_door` for people and for monitors of the reference server.

Numbers are read where they are written, so no lock and no thread is needed. One request per connection, read and
answered within a deadline; whoever is slower, or says more than a scraper does, is cut off.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from garden_py.api.address import check_page
from garden_py.config import Config
from garden_py.model.errors import HostFault
from garden_py.observe.metrics import CONTENT_TYPE, Metrics
from garden_py.observe.tasks import describe_tasks

_HEAD_MAX_BYTES = 8192
_DEADLINE_S = 10.0


# A page's type and a function that writes it anew for each request.
Page: TypeAlias = tuple[str, Callable[[], bytes]]


def metrics_door(metrics: Metrics, config: Config) -> PagesDoor:
    """Serves /metrics on `config.metrics`."""
    pages = {b"/metrics": (CONTENT_TYPE, metrics.render)}
    return PagesDoor(config, "metrics", pages)


def debug_door(config: Config) -> PagesDoor:
    """Serves /debug/vars and /debug/tasks on `config.debug`; they tell command lines, so on loopback only."""
    started = time.monotonic()
    pages: dict[bytes, Page] = {
        b"/debug/vars": ("application/json", lambda: _describe_process(started)),
        b"/debug/tasks": ("text/plain; charset=utf-8", _describe_work),
    }
    return PagesDoor(config, "debug", pages)


def _describe_process(started: float) -> bytes:
    """Memory and more in the shape of Go's expvar, which monitors of the reference read; bytes, as Linux counts them.

    `Alloc` and its like stand for private memory that is in use; this server has no heap of Go's to tell of.
    """
    rollup = _read_table(Path("/proc/self/smaps_rollup"))
    status = _read_table(Path("/proc/self/status"))
    private = (rollup.get("Private_Dirty", 0) + rollup.get("Private_Clean", 0)) << 10
    memory = {
        "Alloc": private,
        "HeapAlloc": private,
        "HeapInuse": private,
        "Sys": status.get("VmRSS", 0) << 10,
        "NumGC": sum(generation["collections"] for generation in gc.get_stats()),
        "HeapObjects": len(gc.get_objects()),
    }
    value = {
        "cmdline": sys.orig_argv,
        "memstats": memory,
        "numGoRoutines": len(asyncio.all_tasks()) + threading.active_count(),
        "uptime_s": round(time.monotonic() - started, 3),
    }
    return json.dumps(value).encode() + b"\n"


def _read_table(path: Path) -> dict[str, int]:
    """`Name: number kB` lines of a file of proc(5)."""
    words = (line.split() for line in path.read_text().splitlines())
    return {each[0].rstrip(":"): int(each[1]) for each in words if len(each) == 3 and each[2] == "kB"}


def _describe_work() -> bytes:
    """Where every task and every thread is, innermost frame last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [describe_tasks()]
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}\n")
        lines += [
            f"  {place.filename}:{place.lineno} {place.name}\n" for place in traceback.extract_stack(frame)
        ]
    return "".join(lines).encode()


class PagesDoor:
    """Serves pages, if it has an address.

    Args:
        config: of the server.
        setting: of it, HOST:PORT; empty: nowhere.
        pages: by path.
    """

    def __init__(self, config: Config, setting: str, pages: Mapping[bytes, Page]) -> None:
        self._config = config
        self._setting = setting
        self._pages = pages
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind and serve; does nothing without an address.

        Raises:
            InvalidField: it is not HOST:PORT, or others can reach it and nobody said they may.
            HostFault: it cannot be bound.
        """
        address = getattr(self._config, self._setting)
        if not address:
            return
        check_page(self._config, self._setting)
        host, _, port = address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._serve, host.strip("[]"), int(port), limit=_HEAD_MAX_BYTES
            )
        except OSError as error:
            raise HostFault("listen", f"cannot bind {address} for {self._setting}: {error}") from error

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
        kind = "text/plain"
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", b"only GET\n"
        elif path not in self._pages:
            status, body = "404 Not Found", b"only " + b", ".join(self._pages) + b"\n"
        else:
            kind, write = self._pages[path]
            status, body = "200 OK", write()
        allow = "Allow: GET, HEAD\r\n" if status.startswith("405") else ""
        lines = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{allow}"
        lines += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return lines.encode() + (b"" if method == b"HEAD" else body)
