"""An event loop whose clock jumps: a timer of an hour is over as soon as nothing else is left to do.

For tests of grace times and retries. Only for code that waits by the loop's timers; real I/O does not advance it.
"""

from __future__ import annotations

import asyncio
import inspect
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")


class _JumpingSelector(selectors.SelectSelector):
    """Never waits; says instead how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "the test waits for something that nothing will bring about"
            self.now_s += max(0.0, timeout)
        return found


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop that starts at 0 s and is as late as its last timer."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a VirtualClockLoop."""

    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.run(test(*args, **kwargs))

    # Name, docstring and arguments, but not functools.wraps: pytest would find the coroutine function behind it.
    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def settle() -> None:
    """Let every callback that is ready run, without letting time pass."""
    for _ in range(20):
        await asyncio.sleep(0)
