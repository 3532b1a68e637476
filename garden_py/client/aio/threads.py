"""Bridges between iterables that block (local files) and the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


async def iterate_in_thread(source: Iterable[Item]) -> AsyncIterator[Item]:
    """The items of an iterable whose steps block, each fetched in a worker thread."""
    iterator = iter(source)
    nothing = object()
    while (item := await asyncio.to_thread(next, iterator, nothing)) is not nothing:
        yield item  # type: ignore[misc] # `nothing` is the only object here that is not an Item


async def drain_to_thread(source: AsyncIterator[Item], consume: Callable[[Iterable[Item]], None]) -> None:
    """Run a blocking consumer in a worker thread over the items of an asynchronous iterator."""
    loop = asyncio.get_running_loop()

    async def next_or_none() -> Item | None:
        return await anext(source, None)

    def pull() -> Iterator[Item]:
        while (item := asyncio.run_coroutine_threadsafe(next_or_none(), loop).result()) is not None:
            yield item

    await asyncio.to_thread(consume, pull())
