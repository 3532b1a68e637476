"""Work that blocks, beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

from garden_py.model.errors import HostFault

_SPARE_MAX = 32
Result = TypeVar("Result")
Args = ParamSpec("Args")


async def in_thread(work: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
    """As asyncio.to_thread, but returns only when the thread has, also when it is cancelled.

    For work whose result somebody is going to undo, or whose descriptors somebody is going to close.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


_spare: set[threading.Thread] = set()


async def in_spare_thread(work: Callable[[], Result]) -> Result:
    """As asyncio.to_thread, for work that may hang in the kernel: whoever is cancelled leaves the thread behind.

    Its threads are none of the event loop's, which has few, and waits for them when it ends.

    Raises:
        HostFault: too many earlier ones hang.
    """
    hanging = len(_spare)
    if hanging >= _SPARE_MAX:
        raise HostFault("read", f"{hanging} earlier readers hang in the kernel")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(results: list[Result], failure: Exception | None) -> None:
        _spare.discard(thread)
        if done.done():
            return
        if failure is None:
            done.set_result(results[0])
        else:
            done.set_exception(failure)

    def run() -> None:
        results: list[Result] = []
        failure = None
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - told in the event loop
            failure = error
        with suppress(RuntimeError):  # the event loop has ended meanwhile
            loop.call_soon_threadsafe(settle, results, failure)

    thread = threading.Thread(target=run, name="spare", daemon=True)
    _spare.add(thread)
    thread.start()
    return await done
