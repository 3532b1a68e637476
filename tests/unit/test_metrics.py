"""The metrics door: what it serves, to whom, and what it makes of bad manners."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from kit.core import Server

from garden_py.api.pages import PagesDoor, debug_door, metrics_door
from garden_py.config import load_config
from garden_py.model.errors import HostFault, InvalidField
from garden_py.model.spec import ContainerSpec
from garden_py.observe.metrics import Metrics


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def door_on(address: str, metrics: Metrics | None = None, **settings: str) -> PagesDoor:
    return metrics_door(metrics or Metrics(), load_config({"metrics": address, **settings}, environ={}))


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_containers_are_counted_by_state() -> None:
    """Also states that no container is in, so that an alarm can be set on `unkillable`."""
    server, port = Server(), free_port()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="web"))
    await core.containers.create(ContainerSpec(handle="gone"))
    await core.containers.destroy("gone")
    server.backend.create_failure = HostFault("mount", "no")
    with pytest.raises(HostFault):
        await core.containers.create(ContainerSpec())
    server.backend.destroy_failures = [HostFault("cgroup", "busy")]
    with pytest.raises(HostFault):
        await core.containers.destroy("web")
    door = door_on(f"127.0.0.1:{port}", core.metrics)
    await door.start()
    answer = (await ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).decode()
    await door.stop()
    await core.close()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
    assert f"Content-Length: {len(body)}" in head
    assert {
        'garden_containers{state="active"} 0.0',
        'garden_containers{state="unkillable"} 1.0',
        "garden_creates_total 2.0",
        "garden_destroys_total 1.0",
        'garden_create_failures_total{code="host_fault"} 1.0',
        'garden_destroy_failures_total{code="host_fault"} 1.0',
    } <= set(body.splitlines())


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics?x=y HTTP/1.0\r\n\r\n", b"200"),
    ],
)
async def test_other_requests(request_text: bytes, status: bytes) -> None:
    """Only one thing can be asked for."""
    port = free_port()
    door = door_on(f"127.0.0.1:{port}")
    await door.start()
    answer = await ask(port, request_text)
    await door.stop()
    assert answer.split(b" ")[1] == status
    if request_text.startswith(b"HEAD"):
        assert answer.endswith(b"\r\n\r\n")


async def test_endless_head_is_cut_off() -> None:
    """Nobody can make the server keep more than a head's worth of bytes; others are served meanwhile."""
    port = free_port()
    door = door_on(f"127.0.0.1:{port}")
    await door.start()
    answer = await asyncio.gather(ask(port, b"GET /" + b"x" * 1_000_000), return_exceptions=True)
    assert answer == [b""] or isinstance(answer[0], ConnectionError)
    assert b"200 OK" in await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
    await door.stop()


@pytest.mark.parametrize("address", ["0.0.0.0:9100", "example.org:9100", "[::]:9100"])
async def test_address_that_others_can_reach_has_to_be_wanted(address: str) -> None:
    """There is no password."""
    with pytest.raises(InvalidField, match="metrics-insecure"):
        await door_on(address).start()


async def test_any_address_with_the_flag() -> None:
    """For who has a firewall."""
    port = free_port()
    door = door_on(f"0.0.0.0:{port}", metrics_insecure="true")
    await door.start()
    assert b"garden_creates_total" in await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
    await door.stop()


async def test_bad_and_taken_addresses_are_named() -> None:
    """As the server's other doors do."""
    with pytest.raises(InvalidField, match="HOST:PORT"):
        await door_on("9100").start()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(HostFault, match="cannot bind"):
            await door_on(f"127.0.0.1:{sock.getsockname()[1]}").start()


async def test_no_address_no_door() -> None:
    """Off unless asked for."""
    door = door_on("")
    await door.start()
    await door.stop()


async def test_debug_pages_tell_of_memory_and_of_everything_under_way() -> None:
    """In the shape that monitors of the reference server read; private memory of this very process."""
    port = free_port()
    door = debug_door(load_config({"debug": f"127.0.0.1:{port}"}, environ={}))
    await door.start()
    waiting = asyncio.ensure_future(asyncio.sleep(60))
    try:
        head, _, body = (await ask(port, b"GET /debug/vars HTTP/1.1\r\n\r\n")).partition(b"\r\n\r\n")
        assert b"200 OK" in head
        memory = json.loads(body)["memstats"]
        assert 1 << 20 < memory["Alloc"] <= memory["Sys"]
        tasks = (await ask(port, b"GET /debug/tasks HTTP/1.1\r\n\r\n")).decode()
        assert "sleep" in tasks
        assert "thread MainThread" in tasks
        assert b"404" in await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
    finally:
        waiting.cancel()
        await door.stop()


async def test_debug_pages_are_for_this_host_only() -> None:
    """They tell handles and command lines, and no flag opens them to others."""
    with pytest.raises(InvalidField, match="debug"):
        await debug_door(load_config({"debug": "0.0.0.0:17013"}, environ={})).start()
