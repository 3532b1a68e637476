"""The event hub: nothing is missed, nobody is waited for."""

from __future__ import annotations

import asyncio

import pytest

from garden_py.model.errors import OffsetOutOfRange
from garden_py.service.events import KEPT_EVENTS, EventHub, EventKind


async def test_watcher_sees_what_was_and_what_comes() -> None:
    """A cursor continues without gap between the kept and the new."""
    hub = EventHub()
    hub.publish(EventKind.CONTAINER_CREATED, "a")
    hub.publish(EventKind.CONTAINER_CREATED, "b")
    watch = aiter(hub.watch(1))
    assert (await anext(watch)).handle == "b"
    coming = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    hub.publish(EventKind.CONTAINER_DESTROYED, "c", why="test")
    event = await asyncio.wait_for(coming, 5)
    assert (event.cursor, event.handle, event.details) == (3, "c", {"why": "test"})


async def test_two_watchers_see_the_same() -> None:
    """Watching takes nothing away."""
    hub = EventHub()
    watches = [aiter(hub.watch(0)) for _ in range(2)]
    coming = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0)
    hub.publish(EventKind.CONTAINER_CREATED, "a")
    first, second = await asyncio.wait_for(asyncio.gather(*coming), 5)
    assert first is second


@pytest.mark.parametrize("cursor", [-1, 5, 1 << 60])
async def test_cursor_of_the_future_is_refused(cursor: int) -> None:
    """And so is one of an earlier server's life, which would skip events silently."""
    with pytest.raises(OffsetOutOfRange):
        await anext(aiter(EventHub(first_cursor=1 << 40).watch(1000)))
    hub = EventHub()
    for _ in range(4):
        hub.publish(EventKind.CONTAINER_CREATED, "a")
    with pytest.raises(OffsetOutOfRange, match="cursor") as refused:
        await anext(aiter(hub.watch(cursor)))
    assert "offset" not in str(refused.value), "that would be of bytes"


async def test_slow_watcher_is_told_that_it_missed_events() -> None:
    """Memory is bounded, and a gap is never silent."""
    hub = EventHub()
    hub.publish(EventKind.CONTAINER_CREATED, "first")
    watch = aiter(hub.watch(0))
    await anext(watch)
    for _ in range(KEPT_EVENTS + 1):
        hub.publish(EventKind.CONTAINER_CREATED, "more")
    with pytest.raises(OffsetOutOfRange) as missed:
        await anext(watch)
    assert missed.value.first_offset == 2
    hub.check_cursor(2)
