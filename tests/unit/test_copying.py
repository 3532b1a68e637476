"""Copies whose container goes away under them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from garden_py.backend.linux import copying
from garden_py.model.errors import ContainerBroken


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
