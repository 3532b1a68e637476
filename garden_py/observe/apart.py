"""What a call sets going, and what goes on without it. Who logs nothing need not load structlog for it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Result = TypeVar("Result")


def apart(function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
    """Call a function so that what it sets going belongs to no call; see calls.py."""
    return Context().run(function, *args, **kwargs)
