"""What the server makes of an agent that is older, newer, deaf, mute or too loud; a socket stands for the agent."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from garden_py import wire
from garden_py.backend.streams import agent_link
from garden_py.backend.streams.agent_link import AgentLink, NoUpgrade
from garden_py.backend.streams.agent_replies import AgentExit
from garden_py.model.errors import ContainerBroken, ProcessStartFailed
from garden_py.model.process import ProcessSpec, WindowSize

Answer = Callable[[wire.Frame], bytes | None]
TRUE = ProcessSpec(path="true", id="p")


class FakeAgent:
    """The other end of a link: answers each request as it is told, and remembers all of them."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.asked: list[dict[str, Any]] = []
        self.lost: list[str] = []
        self.exits: list[AgentExit] = []
        self.link = AgentLink(
            "box", ours, patience_s=0.2, on_exit=self.exits.append, on_lost=self.lost.append
        )
        self.answers: dict[str, Answer] = {}
        self._decoder = wire.Decoder()
        asyncio.get_running_loop().add_reader(self.socket, self._read)

    def _read(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, wire.MAX_FDS)
        for fd in fds:
            os.close(fd)
        if not data:
            asyncio.get_running_loop().remove_reader(self.socket)
        for request in self._decoder.feed(data):
            self.asked.append(request.value)
            answer = self.answers.get(str(request.value["op"]), reply({}))(request)
            if answer is not None:
                self.socket.send(answer)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.socket)
        self.socket.close()
        self.link.close()


def reply(value: dict[str, Any]) -> Answer:
    return lambda request: wire.encode_frame(wire.REPLY, request.id, value)


def refusal(code: str, message: str = "no") -> Answer:
    return lambda request: wire.encode_frame(wire.ERROR, request.id, {"code": code, "message": message})


def silence(request: wire.Frame) -> None:
    """No answer."""


@pytest.fixture
async def agent() -> AsyncIterator[FakeAgent]:
    agent = FakeAgent()
    yield agent
    agent.close()


async def hello(agent: FakeAgent) -> None:
    await agent.link.hello(server="test", timeout_s=0.2)


async def test_greeting_asks_for_this_and_the_previous_version(agent: FakeAgent) -> None:
    """And takes what the agent says about itself only so far as it makes sense."""
    records = [{"id": "a", "exited": True, "status": 9, "ended_ns": 5}, {"id": "b"}, {"id": 3}, 7]
    agent.answers["hello"] = reply({"wire": 2, "build": "b\x1b" * 100, "processes": records})
    greeting = await agent.link.hello(server="test", timeout_s=1)
    assert agent.asked[0]["wire"] == [wire.VERSION - 1, wire.VERSION]
    assert greeting.processes == {"a": AgentExit("a", 9, 5), "b": None}
    assert (agent.link.wire, agent.link.build) == (2, "b?" * 32)


@pytest.mark.parametrize(
    ("answer", "reason", "lost"),
    [
        (reply({"wire": wire.VERSION + 1, "processes": []}), "another release", False),
        (refusal("unsupported_wire", "I speak 9 only"), "I speak 9 only", False),
        (refusal("whatever"), "refuses", True),
        (reply({}), "misbehaves", True),
        (reply({"wire": "2"}), "misbehaves", True),
        (reply({"wire": 2, "build": 3}), "misbehaves", True),
        (silence, "does not answer", True),
    ],
    ids=["newer", "refused", "refuses", "empty", "wrong type", "wrong build", "mute"],
)
async def test_greeting_that_cannot_be_accepted(
    agent: FakeAgent, answer: Answer, reason: str, lost: bool
) -> None:
    """An agent of another release is left alone; one that misbehaves is given up, with the reason."""
    agent.answers["hello"] = answer
    with pytest.raises(ContainerBroken, match=reason):
        await hello(agent)
    assert not agent.link.is_open
    assert [reason in told for told in agent.lost] == [True] * lost


async def test_version_1_is_spoken_as_it_was(agent: FakeAgent) -> None:
    """No gate: what is not recorded must not run; no cancel, no upgrade; a refused ping is an answer."""
    agent.answers |= {"hello": reply({"wire": 1, "processes": []}), "ping": refusal("invalid_request")}
    await hello(agent)
    assert agent.link.build == ""
    await agent.link.ping()
    await agent.link.cancel("p")
    assert agent.asked[-1] == {"op": "signal", "id": "p", "signal": 9, "group": True}
    with pytest.raises(NoUpgrade, match="version 1"):
        await agent.link.upgrade("b", ["/x"], ())
    happened: list[str] = []
    agent.answers["spawn"] = lambda request: happened.append("asked") or refusal("spawn_failed")(request)
    with pytest.raises(ProcessStartFailed):
        await agent.link.spawn(TRUE, (), [], bounding=None, before_exec=lambda: happened.append("recorded"))
    assert happened == ["recorded", "asked"]
    assert agent.asked[-1]["gated"] is False


@pytest.mark.parametrize(
    "call",
    [
        lambda link: link.ping(),
        lambda link: link.signal("p", 15, group=False),
        lambda link: link.attach("p", is_tty=False),
        lambda link: link.resize("p", WindowSize(1, 1)),
        lambda link: link.release("p"),
    ],
    ids=["ping", "signal", "attach", "resize", "release"],
)
async def test_no_answer_is_the_end_of_the_link(
    agent: FakeAgent, call: Callable[[AgentLink], Awaitable[Any]]
) -> None:
    """All these are answered at once by an agent that is well; the reason is told once."""
    agent.answers = dict.fromkeys(("ping", "signal", "attach", "resize", "release"), silence)
    results = await asyncio.gather(*(call(agent.link) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [ContainerBroken] * 3
    assert agent.lost == ["its agent does not answer (for 0.2 s)"]
    assert {result.reason for result in results if isinstance(result, ContainerBroken)} == set(agent.lost)


async def test_agent_that_reads_nothing_costs_its_askers_only_their_patience(agent: FakeAgent) -> None:
    """Their requests are more than the socket takes; the loop goes on."""
    asyncio.get_running_loop().remove_reader(agent.socket)
    spec = ProcessSpec(path="true", id="p", args=("x" * 100_000,))
    agent_link_timeout, agent_link.SPAWN_TIMEOUT_S = agent_link.SPAWN_TIMEOUT_S, 0.2
    try:
        asked = [agent.link.spawn(spec, (), [], bounding=None) for _ in range(10)]
        results = await asyncio.gather(*asked, return_exceptions=True)
    finally:
        agent_link.SPAWN_TIMEOUT_S = agent_link_timeout
    assert {type(result) for result in results} == {ContainerBroken}
    assert len(agent.lost) == 1


async def test_start_that_takes_too_long_is_cancelled(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent is well, so the container is; but nobody would know of a process that starts later."""
    monkeypatch.setattr(agent_link, "SPAWN_TIMEOUT_S", 0.1)
    agent.answers |= {"spawn": silence, "cancel": reply({"found": True})}
    with pytest.raises(ProcessStartFailed, match="did not start"):
        await agent.link.spawn(TRUE, (), [], bounding=None)
    assert agent.asked[-1] == {"op": "cancel", "id": "p"}
    assert agent.lost == []
    late = wire.encode_frame(wire.REPLY, 1, {"pid": 7, "fds": []})
    agent.socket.send(late)  # and its answer, should it come after all, is no offence
    await agent.link.ping()


async def test_upgrade_without_an_answer_leaves_the_link_if_the_agent_is_well(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that hangs is the agent's to end."""
    monkeypatch.setattr(agent_link, "UPGRADE_TIMEOUT_S", 0.1)
    agent.answers["upgrade"] = silence
    with pytest.raises(NoUpgrade, match="no answer"):
        await agent.link.upgrade("b", ["/x"], ())
    assert agent.link.is_open
    agent.answers["upgrade"] = reply({"wire": 2, "build": "b"})
    await agent.link.upgrade("b", ["/x"], ())
    assert agent.link.build == "b"


async def test_as_many_exits_as_an_agent_may_hold_processes_are_no_flood(agent: FakeAgent) -> None:
    """They may all end in one moment. More than can be meant is one, and ends the link."""
    agent.link._patience_s = 30  # this is not about time
    event = wire.encode_frame(wire.EVENT, 0, {"event": "exited", "process": "p", "status": 0, "ended_ns": 1})
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(agent.socket, event * 2048)
    await agent.link.ping()
    assert len(agent.exits) == 2048
    assert agent.lost == []
    with suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(1000):
            await loop.sock_sendall(agent.socket, event * 100)
    assert "more frames than anybody asked for" in agent.lost[0]
    assert len(agent.exits) < 5000


async def test_events_are_small_and_answers_not_much_larger(agent: FakeAgent) -> None:
    """Decoding a million values would hold up everybody for most of a second."""
    agent.link._patience_s = 30  # this is not about time
    agent.answers["signal"] = reply({"x": [None] * 100_000})
    with pytest.raises(ContainerBroken, match="exceeds"):
        await agent.link.signal("p", 15, group=False)


async def test_start_that_meets_a_mute_agent_finds_that_out_before_its_own_time_is_over(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start may take long, an agent may not: it is asked meanwhile."""
    monkeypatch.setattr(agent_link, "_WONDER_AFTER_S", 0.05)
    agent.answers |= {"spawn": silence, "ping": silence}
    with pytest.raises(ContainerBroken, match="does not answer"):
        await agent.link.spawn(TRUE, (), [], bounding=None)
    assert "cancel" not in [request["op"] for request in agent.asked]
    assert len(agent.lost) == 1


async def test_start_that_takes_long_in_an_agent_that_is_well_goes_on(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program may be on a file system that takes its time."""
    monkeypatch.setattr(agent_link, "_WONDER_AFTER_S", 0.05)
    held: list[wire.Frame] = []

    def hold(request: wire.Frame) -> None:
        held.append(request)

    def answer_ping(request: wire.Frame) -> bytes | None:
        late = wire.encode_frame(wire.ERROR, held[0].id, {"code": "spawn_failed", "message": "late"})
        return wire.encode_frame(wire.REPLY, request.id, {}) + late

    agent.answers |= {"spawn": hold, "ping": answer_ping}
    with pytest.raises(ProcessStartFailed, match="late"):
        await agent.link.spawn(TRUE, (), [], bounding=None)
    assert agent.link.is_open


async def test_a_request_that_a_destroy_cuts_off_is_told_of_it(agent: FakeAgent) -> None:
    """Not that its agent is gone, as if something had gone wrong."""
    asked = asyncio.Event()
    agent.answers["spawn"] = lambda _: asked.set()
    starting = asyncio.ensure_future(agent.link.spawn(TRUE, (), [], bounding=None))
    await asked.wait()
    agent.link.expect_end("it is being destroyed")
    agent.socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ContainerBroken) as caught:
        await starting
    assert caught.value.reason == "it is being destroyed"
