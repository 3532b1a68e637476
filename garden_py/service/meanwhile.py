"""Something short that is done while others are at work, instead of after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_HEAD_START_S = 0.001
"""In which work that waits for another process has usually been handed over."""

Result = TypeVar("Result")
Prepared = TypeVar("Prepared")


async def meanwhile(
    work: Coroutine[Any, Any, Result], prepare: Callable[[], Prepared]
) -> tuple[Result, Prepared]:
    """Both results. `prepare` depends on nothing that `work` does, and nobody sees what it has made if that fails.

    Args:
        work: begun first; cancelled with the caller.
        prepare: takes the event loop for some milliseconds at most.
    """
    working = asyncio.ensure_future(work)
    try:
        for _ in range(2):  # the first may pass while the event loop is taken by what the work begins with
            await asyncio.wait([working], timeout=_HEAD_START_S)
        prepared = prepare()
    except BaseException:
        working.cancel()
        await asyncio.wait([working])
        raise
    return await working, prepared
