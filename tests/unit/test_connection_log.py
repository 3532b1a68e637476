"""The sockets that the network's rules tell on."""

from __future__ import annotations

import asyncio
import socket

import pytest
from structlog.contextvars import get_contextvars

from garden_py.backend.linux import connections
from garden_py.backend.linux.connections import ConnectionLog
from garden_py.backend.net.nflog import LoggedPacket
from garden_py.model.connection import Connection, Flow
from garden_py.model.netrule import AddressRange, DefaultAction, EgressPolicy
from garden_py.observe.calls import begin_call


async def test_what_is_heard_later_belongs_to_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's socket is opened by its create, and has nothing to do with that one's request id any more."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    packet = LoggedPacket(prefix="", mark=1, in_index=0, payload=b"")
    monkeypatch.setattr(connections, "_open_in", lambda path: ours)
    monkeypatch.setattr(connections, "parse_messages", lambda data: [packet])
    monkeypatch.setattr(connections, "parse_flow", lambda payload: Flow("tcp", "10.0.0.1", "10.0.0.2"))
    heard: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()

    def report(handle: str, connection: Connection) -> None:
        heard.set_result(get_contextvars())

    told = ConnectionLog(report, lambda link: "")
    begin_call("of-the-create", "")
    denied: list[AddressRange] = []
    await told.watch("box", "/proc/1/ns/net", EgressPolicy(DefaultAction.DENY), denied)
    kernel.send(b"x")
    assert await heard == {}
    told.close()
    kernel.close()
