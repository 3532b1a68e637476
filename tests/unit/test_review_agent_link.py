"""The conversation with an agent that does not keep to it, and with a server that fails while it listens."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from garden_py import wire
from garden_py.backend.host.framed import FramedLink
from garden_py.backend.streams.agent_link import AgentLink
from garden_py.backend.streams.agent_replies import AgentExit
from garden_py.backend.streams.stdin import StdinFeed
from garden_py.model.errors import ContainerBroken


@pytest.fixture
async def sockets() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """Our end and the agent's."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    yield ours, theirs
    theirs.close()


async def answer_next(agent: socket.socket, *frames: tuple[int, dict[str, Any]], fds: list[int]) -> None:
    """Wait for one request; answer with frames in one message, the descriptors going with the last one."""
    loop = asyncio.get_running_loop()
    (request,) = wire.Decoder().feed(await loop.sock_recv(agent, 1 << 16))
    data = b"".join(
        wire.encode_frame(
            kind, 0 if kind == wire.EVENT else request.id, value, len(fds) * (i == len(frames) - 1)
        )
        for i, (kind, value) in enumerate(frames)
    )
    socket.send_fds(agent, [data], fds)


async def test_an_event_that_cannot_be_handled_does_not_cost_the_reply_behind_it(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """An exit that the journal could not take must not shift later replies' descriptors to other processes."""
    ours, agent = sockets
    failures: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, c: failures.append(str(c["exception"])))

    def fail(_: dict[str, Any]) -> None:
        raise RuntimeError("the disk is full")

    link = FramedLink(ours, on_event=fail)
    reading, writing = os.pipe()
    asking = asyncio.ensure_future(link.request({"op": "spawn"}, timeout_s=1))
    await answer_next(agent, (wire.EVENT, {"event": "exited"}), (wire.REPLY, {"pid": 7}), fds=[reading])
    reply = await asking
    assert reply.value == {"pid": 7}
    assert os.fstat(reply.fds[0]).st_ino == os.fstat(reading).st_ino
    assert failures == ["the disk is full"]
    assert link.is_open
    reply.close_fds()
    link.close()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("question", ["hello", "attach"])
async def test_an_agent_that_refuses_what_it_must_not_refuse_is_a_broken_container(
    sockets: tuple[socket.socket, socket.socket], question: str
) -> None:
    """Both are asked while a server starts: an untyped error there would keep every other container from its server."""
    ours, agent = sockets
    link = AgentLink("c", ours, patience_s=1, on_exit=_nobody, on_lost=lambda _: None)
    asking = asyncio.ensure_future(
        link.hello(server="t", timeout_s=1) if question == "hello" else link.attach("p", is_tty=False)
    )
    await answer_next(agent, (wire.ERROR, {"code": "no", "message": "I\x1bwill not"}), fds=[])
    with pytest.raises(ContainerBroken, match=r"I\?will not"):
        await asking
    link.close()


async def test_stdin_that_is_made_blocking_from_inside_does_not_hold_the_server(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """The agent has the same open file description, so it can clear O_NONBLOCK at any time (fcntl(2), F_SETFL)."""
    ours, agent = sockets
    link = AgentLink("c", ours, patience_s=1, on_exit=_nobody, on_lost=lambda _: None)
    reading, writing = os.pipe()
    asking = asyncio.ensure_future(link.attach("p", is_tty=False))
    await answer_next(agent, (wire.REPLY, {"pid": 7, "fds": ["stdin"]}), fds=[writing])
    feed = StdinFeed("p", (await asking).fds["stdin"], is_tty=False)
    os.set_blocking(writing, True)
    with pytest.raises(TimeoutError):  # more than any pipe holds, and nobody reads
        await asyncio.wait_for(feed.write(b"x" * (4 << 20), None), timeout=0.2)
    feed.release()
    link.close()
    os.close(reading)
    os.close(writing)


def _nobody(_: AgentExit) -> None:
    raise AssertionError("no exit was told")
