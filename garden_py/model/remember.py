"""Results of pure functions that are asked for the same small things again and again."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

REMEMBERED = 4096
SHORT = 512
"""So long a text or a message may be to be remembered; with that all of a function's memory stays within some MiB."""

P = ParamSpec("P")
R = TypeVar("R")


def remembered(is_small: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep the last REMEMBERED results of a function.

    Args:
        is_small: whether arguments are to be remembered: what callers choose may be megabytes.

    The arguments are hashable. The results are shared by all who ask; nobody may change them.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kept = lru_cache(maxsize=REMEMBERED)(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return kept(*args, **kwargs) if is_small(*args, **kwargs) else function(*args, **kwargs)  # type: ignore[arg-type]  # hashable

        return call

    return decorate


def is_short(item: str | bytes) -> bool:
    """The usual measure of what `remembered` takes."""
    return len(item) <= SHORT
