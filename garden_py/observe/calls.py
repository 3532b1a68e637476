"""Who asked for what is going on: the id of a request and the container it names, on every line that it causes.

A call of a door begins with `begin_call`; whatever it awaits or starts from then on logs under its id (contextvars:
a task begins with a copy of its maker's). What only happens to begin during a call, and goes on by itself, such as
listening to an agent or a timer, is begun `apart` (apart.py), or it would speak in the name of a call long gone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar

from structlog.contextvars import bind_contextvars, clear_contextvars

REQUEST_ID_HEADER = "x-request-id"
"""Of gRPC metadata and HTTP headers, both ways."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""Likewise, by which a call is part of a trace of its caller's. Source: W3C Trace Context, §3.2, §3.3."""

_NO_TRACE: Mapping[str, str] = {}
_trace: ContextVar[Mapping[str, str]] = ContextVar("trace", default=_NO_TRACE)
_SANE = re.compile(r"[A-Za-z0-9._:/@+=-]{1,128}")
_HANDLE_SHOWN = 128  # of what may be anything: it is checked after it was logged


def choose_request_id(given: str) -> str:
    """The caller's own id if it is 1 to 128 plain characters, else a new one: 16 hex digits."""
    return given if _SANE.fullmatch(given) else secrets.token_hex(8)


def begin_call(given: str, handle: str = "", trace: Mapping[str, str] = _NO_TRACE) -> str:
    """Begin a call in this task; the id it has.

    Args:
        given: the id that the caller sent; empty: none.
        handle: the container it names; empty: none, or not known yet.
        trace: what the caller sent of TRACE_HEADERS.
    """
    request_id = choose_request_id(given)
    clear_contextvars()
    _trace.set(trace)
    bind_contextvars(request_id=request_id)
    name_container(handle)
    return request_id


def name_container(handle: str) -> None:
    """From here on the call is about this container; empty: nothing is known."""
    if handle:
        bind_contextvars(handle=handle[:_HANDLE_SHOWN])


def trace_of_caller() -> Mapping[str, str]:
    """What the caller of this call sent of TRACE_HEADERS, as it came."""
    return _trace.get()
