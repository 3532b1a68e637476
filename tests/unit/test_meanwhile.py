"""Something short that is done while others are at work."""

from __future__ import annotations

import asyncio

import pytest

from garden_py.service.meanwhile import meanwhile


async def test_what_is_prepared_comes_after_the_work_has_begun() -> None:
    """Others shall be at work by then; and both results arrive."""
    steps: list[str] = []
    prepared = asyncio.Event()

    async def work() -> str:
        steps.append("handed over")
        await prepared.wait()
        return "done"

    def prepare() -> int:
        steps.append("prepared")
        prepared.set()
        return 7

    assert await meanwhile(work(), prepare) == ("done", 7)
    assert steps == ["handed over", "prepared"]


async def test_failures_are_the_callers() -> None:
    """Of the work, which may have failed before anything was prepared, and of what prepares, which undoes the work."""

    async def fail() -> None:
        raise KeyError("work")

    with pytest.raises(KeyError):
        await meanwhile(fail(), lambda: None)
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(ZeroDivisionError):
        await meanwhile(wait(), lambda: 1 // 0)
    assert ended.is_set()


async def test_who_is_cancelled_leaves_no_work_behind() -> None:
    """As if the caller had awaited it itself: what has to go on shields itself."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    for is_late in (False, True):  # before and after something is prepared
        begun.clear()
        ended.clear()
        prepared = asyncio.Event()
        asking = asyncio.ensure_future(meanwhile(wait(), prepared.set))
        await (prepared if is_late else begun).wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert ended.is_set()
