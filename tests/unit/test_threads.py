"""Threads for work that may hang in the kernel."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest

from garden_py.backend.host import threads
from garden_py.backend.host.threads import in_spare_thread
from garden_py.model.errors import HostFault


async def test_results_and_errors_come_back() -> None:
    def fail() -> None:
        raise OSError(5, "input/output error")

    assert await in_spare_thread(lambda: 7) == 7
    with pytest.raises(OSError, match="input/output"):
        await in_spare_thread(fail)


async def test_who_is_cancelled_leaves_a_hanging_thread_behind_and_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a container that is diagnosed again and again while it hangs does not fill the server with threads."""
    monkeypatch.setattr(threads, "_spare", set())  # another test may have left one behind
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
    await eventually_free()
    assert await in_spare_thread(lambda: 7) == 7


async def eventually_free() -> None:
    """Until the last of them has ended, and has settled in the event loop."""
    for _ in range(1000):
        with suppress(HostFault):
            return await in_spare_thread(lambda: None)
        await asyncio.sleep(0.01)
    raise AssertionError("they still hang")
