"""Copies whose container goes away under them."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from garden_py.backend.linux import copying
from garden_py.backend.streams.agent_replies import AgentExit, Spawned
from garden_py.model.errors import ContainerBroken, CopyFailed


class LostLink:
    """A link whose agent dies of whatever it is asked."""

    async def signal(self, *_: object, **__: object) -> bool:
        raise ContainerBroken("box", "its agent is gone (closed)")


async def test_end_of_a_copy_whose_agent_is_gone_is_quiet() -> None:
    """It may run on after its caller has left, so nobody would take its error: the loop would complain of it."""
    container: Any = SimpleNamespace(link=LostLink(), broken_because="")
    exited = asyncio.get_running_loop().create_future()
    await copying._end(container, ".copy-1", exited)
    assert not exited.done()


@pytest.mark.parametrize(
    ("number", "cause"), [(signal.SIGKILL, "memory limit"), (signal.SIGTERM, "by a stop of it")]
)
async def test_a_copy_ended_by_a_signal_names_what_sends_that_one(number: int, cause: str) -> None:
    """The kernel kills for want of memory, a stop asks first."""
    reading, writing = os.pipe()
    os.close(writing)
    exited: asyncio.Future[AgentExit] = asyncio.get_running_loop().create_future()
    exited.set_result(AgentExit("c", int(number), 0))
    helper = copying._Helper("c", Spawned(1, {"stderr": reading}), exited)
    with pytest.raises(CopyFailed, match=cause):
        await helper.finish()
    helper.close()
