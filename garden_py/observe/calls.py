"""Who asked for what is going on: the id of a request and the container it names, on every line that it causes.

A call of a door begins with `begin_call`; whatever it awaits or starts from then on logs under its id (contextvars:
a task begins with a copy of its maker's). What only happens to begin during a call, and goes on by itself, such as
listening to an agent or a timer, is begun `apart` (apart.py), or it would speak in the name of a call long gone.
"""

from __future__ import annotations

import re
import secrets

from structlog.contextvars import bind_contextvars, clear_contextvars

REQUEST_ID_HEADER = "x-request-id"
"""Of gRPC metadata and HTTP headers, both ways."""

_SANE = re.compile(r"[A-Za-z0-9._:/@+=-]{1,128}")
_HANDLE_SHOWN = 128  # of what may be anything: it is checked after it was logged


def choose_request_id(given: str) -> str:
    """The caller's own id if it is 1 to 128 plain characters, else a new one: 16 hex digits."""
    return given if _SANE.fullmatch(given) else secrets.token_hex(8)


def begin_call(given: str, handle: str = "") -> str:
    """Begin a call in this task; the id it has.

    Args:
        given: the id that the caller sent; empty: none.
        handle: the container it names; empty: none, or not known yet.
    """
    request_id = choose_request_id(given)
    clear_contextvars()
    bind_contextvars(request_id=request_id)
    name_container(handle)
    return request_id


def name_container(handle: str) -> None:
    """From here on the call is about this container; empty: nothing is known."""
    if handle:
        bind_contextvars(handle=handle[:_HANDLE_SHOWN])
