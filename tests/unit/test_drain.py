"""Ending the calls of a server that stops."""

from __future__ import annotations

import asyncio

import pytest
from kit.virtual_clock import in_virtual_time, settle

from garden_py.api.grpc.drain import Drain
from garden_py.model.errors import ShuttingDown


async def call(drain: Drain, method: str) -> None:
    with drain.call(f"/garden.v1.Garden/{method}"):
        await asyncio.sleep(1000)


@in_virtual_time
async def test_calls_that_last_are_ended_first_and_say_why() -> None:
    """The others are given the time to end by themselves."""
    drain = Drain()
    lasting = asyncio.ensure_future(call(drain, "WaitProcess"))
    short = asyncio.ensure_future(call(drain, "CreateContainer"))
    await settle()
    drain.refuse()
    with pytest.raises(ShuttingDown):
        await call(drain, "Ping")
    drain.end_lasting()
    with pytest.raises(ShuttingDown):
        await lasting
    assert not short.done()
    idle = asyncio.ensure_future(drain.wait_until_idle(and_then_s=1))
    await settle()
    assert not idle.done()
    drain.end_all()
    drain.end_all()
    with pytest.raises(ShuttingDown):
        await short
    await idle


@in_virtual_time
async def test_caller_that_leaves_is_not_told_that_the_server_stops() -> None:
    """Its cancellation is its own."""
    drain = Drain()
    task = asyncio.ensure_future(call(drain, "CreateContainer"))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await drain.wait_until_idle(and_then_s=0)
