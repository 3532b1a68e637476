"""Threads for work that may hang in the kernel."""

from __future__ import annotations

import asyncio
import threading

import pytest

from garden_py.backend.host.threads import in_spare_thread
from garden_py.model.errors import HostFault


async def test_results_and_errors_come_back() -> None:
    def fail() -> None:
        raise OSError(5, "input/output error")

    assert await in_spare_thread(lambda: 7) == 7
    with pytest.raises(OSError, match="input/output"):
        await in_spare_thread(fail)


async def test_who_is_cancelled_leaves_a_hanging_thread_behind_and_too_many_are_refused() -> None:
    """So a container that is diagnosed again and again while it hangs does not fill the server with threads."""
    let_go = threading.Event()
    try:
        waiting = [asyncio.ensure_future(in_spare_thread(lambda: let_go.wait(60))) for _ in range(32)]
        await asyncio.sleep(0)
        with pytest.raises(HostFault, match="32 earlier readers hang"):
            await in_spare_thread(lambda: 7)
        for each in waiting:
            each.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError)
            for each in await asyncio.gather(*waiting, return_exceptions=True)
        )
    finally:
        let_go.set()
    for thread in threading.enumerate():
        if thread.name == "spare":
            await asyncio.to_thread(thread.join)
    await asyncio.sleep(0)  # they settle in the event loop
    assert await in_spare_thread(lambda: 7) == 7
