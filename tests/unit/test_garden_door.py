"""The Garden door over a fake backend: the wire, statement by statement, named after the protocol's sections."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from kit.core import Server
from kit.garden_http import (
    GardenHttp,
    GardenHttpError,
    HttpProcess,
    Reply,
    build_head,
    connect,
    read_head,
    read_reply,
)
from pydantic import ValidationError
from structlog.testing import capture_logs

from garden_py.api.grpc.server import GrpcDoor
from garden_py.api.http.attachments import Attachments
from garden_py.api.http.door import GardenDoor
from garden_py.api.http.exchange import HEAD_MAX_BYTES
from garden_py.api.http.routes import NAMES, Match, NoMatch, match_route
from garden_py.config import Config
from garden_py.model.errors import CopyFailed, HostFault, InvalidField
from garden_py.model.lifecycle import State
from garden_py.model.process import OutputStream, ProcessSpec
from garden_py.model.spec import GRACE_TIME_MAX_S
from garden_py.observe.metrics import Metrics

T = TypeVar("T")
CHUNKED = build_head("POST", "/containers", "Transfer-Encoding: chunked")


class Garden:
    """A door, its service, and a client that is called from a thread of its own."""

    def __init__(self, server: Server, door: GardenDoor, client: GardenHttp) -> None:
        self.server = server
        self.door = door
        self.client = client

    async def do(self, act: Callable[[GardenHttp], T]) -> T:
        """Have the blocking client do something while the door's loop runs."""
        return await asyncio.to_thread(act, self.client)

    async def json(self, method: str, path: str, value: Any = None) -> Any:
        return await self.do(lambda c: c.json(method, path, value))

    async def error(self, method: str, path: str, value: Any = None) -> GardenHttpError:
        with pytest.raises(GardenHttpError) as caught:
            await self.json(method, path, value)
        return caught.value


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task does."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen within 10 s")


async def open_garden(place: Path, **settings: Any) -> Garden:
    server = Server()
    await server.start()
    config = Config(garden_http=f"unix:{place}/garden.sock", state_dir=place, **settings)
    door = GardenDoor(server.core, config)
    return Garden(server, door, GardenHttp(await door.start()))


@pytest.fixture
async def garden(tmp_path: Path) -> AsyncIterator[Garden]:
    garden = await open_garden(tmp_path)
    yield garden
    await garden.door.stop()
    await garden.server.core.close()


# --- §1 transport and routing


async def test_1_2_socket_has_its_mode_and_takes_the_place_of_a_stale_one(tmp_path: Path) -> None:
    """A file that is no socket is left alone."""
    path = tmp_path / "garden.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    garden = await open_garden(tmp_path, garden_http_mode="0600")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await garden.door.stop()
    assert not path.exists()
    path.write_text("precious")
    for door in (
        GardenDoor(garden.server.core, Config(garden_http=f"unix:{path}")),
        GrpcDoor(garden.server.core, Config(listen=f"unix:{path}")),
    ):
        with pytest.raises(InvalidField, match="no socket"):
            await door.start()
        await door.stop()
        assert path.read_text() == "precious"


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:", "127.0.0.1:²", "80"])
async def test_1_2_address_without_a_port_that_can_be_is_refused(tmp_path: Path, address: str) -> None:
    """By the name of the setting."""
    server = Server()
    await server.start()
    with pytest.raises(InvalidField) as caught:
        await GardenDoor(server.core, Config(garden_http=address, state_dir=tmp_path)).start()
    assert caught.value.violations[0].field == "garden_http"


@pytest.mark.parametrize("setting", ["socket_mode", "garden_http_mode"])
def test_mode_of_a_socket_must_be_octal(setting: str) -> None:
    """Told when the configuration is read, not when the door opens."""
    for bad in ("0999", "7777", "rw"):
        with pytest.raises(ValidationError, match=setting):
            Config(**{setting: bad})


async def test_unknown_group_opens_no_door(tmp_path: Path) -> None:
    """Not even for a moment."""
    path = tmp_path / "garden.sock"
    core = await _core()
    with pytest.raises(InvalidField, match="garden_http_group"):
        await GardenDoor(core, Config(garden_http=f"unix:{path}", garden_http_group="no-such")).start()
    grpc_door = GrpcDoor(core, Config(listen=f"unix:{path}", socket_group="no-such"))
    with pytest.raises(InvalidField, match="socket_group"):
        await grpc_door.start()
    await grpc_door.stop()
    assert not path.exists()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:7777", "7777", "localhost"])
async def test_address_that_others_can_reach_needs_a_word(tmp_path: Path, address: str) -> None:
    """The protocol has no authentication."""
    with pytest.raises(InvalidField, match="garden_http"):
        await GardenDoor(await _core(), Config(garden_http=address)).start()


async def _core() -> Any:
    server = Server()
    return await server.start()


async def test_address_in_use_is_a_fault_with_the_address(tmp_path: Path) -> None:
    """The operator learns which door did not open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HostFault, match=address):
            await GardenDoor(await _core(), Config(garden_http=address)).start()


async def test_1_5_connections_are_kept_alive_and_pipelined(garden: Garden) -> None:
    """Concourse's proxying client reuses them."""

    def ask(client: GardenHttp) -> list[int]:
        with connect(client.address) as sock:
            found = []
            for _ in range(3):
                sock.sendall(build_head("GET", "/ping"))
                found.append(read_reply(sock).status)
            sock.sendall(build_head("GET", "/ping") + build_head("GET", "/nope", "Connection: close"))
            data = b""
            while piece := sock.recv(65536):
                data += piece
            return [*found, *(int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:])]

    assert await garden.do(ask) == [200, 200, 200, 200, 404]


@pytest.mark.parametrize(
    ("target", "captures"),
    [
        ("/containers/a%20b/info", {"handle": "a b"}),
        ("/containers/a+b/info", {"handle": "a b"}),
        ("/containers/a%2Fb/info", {"handle": "a/b"}),
        ("http://api/containers/a/info", {"handle": "a"}),  # RFC 9112 §3.2.2: servers must take it
    ],
)
def test_1_9_captures_are_one_segment_and_unescaped(target: str, captures: dict[str, str]) -> None:
    """A slash that is escaped is no separator."""
    found = match_route("GET", target)
    assert isinstance(found, Match)
    assert (found.name, found.captures) == ("info", captures)


@pytest.mark.parametrize("target", ["/ping/", "/containers//info", "/", "", "/containers/a/info/b", "//ping"])
def test_1_10_paths_are_taken_as_they_are(target: str) -> None:
    """No trailing slash, no empty segment."""
    assert match_route("GET", target) == NoMatch()


def test_3_2_first_value_of_a_query_key_counts() -> None:
    """And keys and values are form-encoded."""
    found = match_route("GET", "/containers?x+y=1%262&a=1&a=2&empty=")
    assert isinstance(found, Match)
    assert found.query == {"x y": "1&2", "a": "1", "empty": ""}


def test_every_route_has_a_method() -> None:
    """Nothing in the table leads nowhere."""
    from garden_py.api.http.handlers import GardenHandlers

    assert {name for name in NAMES if not callable(getattr(GardenHandlers, name, None))} == set()
    assert len(NAMES) == 28


async def test_1_11_unknown_paths_and_methods(garden: Garden) -> None:
    """Plain text, as the reference answers."""
    reply = await garden.do(lambda c: c.call("GET", "/nope"))
    assert (reply.status, reply.body) == (404, b"404 page not found\n")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    reply = await garden.do(lambda c: c.call("GET", "/containers/foo"))
    assert (reply.status, reply.body, reply.headers["allow"]) == (405, b"Method Not Allowed\n", "DELETE")

    def head(client: GardenHttp) -> int:
        with connect(client.address) as sock:
            sock.sendall(build_head("HEAD", "/ping", "Connection: close"))
            status, _, rest = read_head(sock)
            assert rest + sock.recv(100) == b""
            return status

    assert await garden.do(head) == 405


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\n\r\n", 400),  # without Host
        (b"POST /containers HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n", 431),
        (b"GET /ping HTTP/1.1\r\nHost: a\r\nX: " + b"x" * HEAD_MAX_BYTES + b"\r\n\r\n", 431),
        (b"GET /ping HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ],
)
async def test_what_is_no_http_is_answered_and_the_connection_closed(
    garden: Garden, data: bytes, status: int
) -> None:
    """The server goes on."""

    def ask(client: GardenHttp) -> int:
        with connect(client.address) as sock:
            answer = b""
            with suppress(ConnectionError):  # it does not read a head of a megabyte to its end
                sock.sendall(data)
            with suppress(ConnectionError):
                while piece := sock.recv(65536):
                    answer += piece
            return int(answer.split(b" ")[1]) if answer else 431

    assert await garden.do(ask) == status
    assert await garden.json("GET", "/ping") == {}


async def test_head_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    """A thousand of them are a thousand small buffers for the time the operator allows."""
    garden = await open_garden(tmp_path, read_header_timeout_s=0.05)

    def half(client: GardenHttp) -> bytes:
        with connect(client.address) as sock:
            sock.sendall(b"GET /ping HTTP/1.1\r\nHost:")
            return sock.recv(100)

    assert await garden.do(half) == b""
    await garden.door.stop()
    assert HEAD_MAX_BYTES <= 1 << 20


# --- §1.3 success and errors


async def test_1_21_success_without_a_value_is_an_empty_object(garden: Garden) -> None:
    """With its length, and a newline that counts."""
    assert await garden.json("GET", "/ping") == {}


async def test_1_23_errors_have_five_keys(garden: Garden) -> None:
    """Unknown containers and processes are typed, and named."""
    error = await garden.error("GET", "/containers/web-1/info")
    assert error.status == 404
    assert error.error == {
        "Type": "ContainerNotFoundError",
        "Message": "unknown handle: web-1",
        "Handle": "web-1",
        "ProcessID": "",
        "Binary": "",
    }
    await garden.do(lambda c: c.create(handle="box"))
    with pytest.raises(GardenHttpError) as caught:
        await garden.do(lambda c: c.attach("box", "job-9"))
    assert (caught.value.status, caught.value.type) == (404, "ProcessNotFoundError")
    assert caught.value.error["ProcessID"] == "job-9"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "EOF"),
        (b"{", "invalid JSON"),
        (b'{"grace_time": "5s"}', "grace_time"),
        (b'{"netin": [{"host_port": 70000}]}', r"netin\[0\].host_port"),
        (b'{"netout_rules": [{"protocol": 4}]}', r"netout_rules\[0\].protocol: invalid protocol: 4"),
        (
            b'{"netout_rules": [{}, {"protocol": 1, "ports": [{"start": 9, "end": 8}]}]}',
            r"netout_rules\[1\].ports\[0\].end: range is reversed",
        ),
        (
            b'{"netout_rules": [{"networks": [{"start": "10.0.0.9", "end": "10.0.0.8"}]}]}',
            r"netout_rules\[0\].networks\[0\].end: range is reversed",
        ),
        (b'{"netout_rules": [{"networks": [{}]}]}', r"netout_rules\[0\].networks\[0\]: a range needs"),
        (b'{"netout_rules": [{"networks": [{"start": "10.0.0.300"}]}]}', "invalid IP address: 10.0.0.300"),
        (b'{"netout_rules": [{"ports": [{"start": 1}]}]}', "Ports cannot be specified for Protocol ALL"),
        (
            b'{"netout_rules": [{"protocol": 1, "icmps": {"type": 8}}]}',
            "ICMP cannot be specified for Protocol TCP",
        ),
        (b'{"image": {"uri": "raw:///a"}, "rootfs": "/b"}', "Cannot provide both Image.URI and RootFSPath"),
        (b'{"image": {"uri": "preloaded+layer:/a?layer=b"}}', "no query parameter 'layer_path' found in URL"),
        (b'{"network": "10.1.0.300/24"}', "invalid CIDR address: 10.1.0.300/24"),
        (b'{"limits": {"disk_limits": {"byte_hard": 1, "scope": 2}}}', "scope"),
        (b'{"env": ["A"]}', "must be NAME=VALUE"),
        (b'{"bind_mounts": [{"src_path": "a", "dst_path": "/b"}]}', "absolute path"),
    ],
)
async def test_1_26_bad_bodies_change_nothing(garden: Garden, body: bytes, message: str) -> None:
    """500, no type, and a message that names the place."""
    reply = await garden.do(lambda c: c.call("POST", "/containers", body))
    assert (reply.status, reply.json()["Type"]) == (500, "")
    assert re.search(message, reply.json()["Message"]), reply.json()
    assert await garden.do(lambda c: c.list("?garden.state=all")) == []


async def test_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """Before it is read to its end."""
    garden = await open_garden(tmp_path, max_message_bytes=1 << 20)
    body = b'{"handle": "' + b"x" * (2 << 20) + b'"}'
    told = (500, "the body is larger than 1048576 bytes")

    def say(client: GardenHttp, said: bytes) -> Reply:
        with connect(client.address) as sock:
            sock.sendall(said)
            return read_reply(sock)

    for said in (
        build_head("POST", "/containers", length=len(body)) + body,
        build_head("POST", "/containers", length=10**18),  # which would never come
        CHUNKED + b"%x\r\n%b\r\n" % (len(body), body),
    ):
        reply = await garden.do(partial(say, said=said))
        assert (reply.status, reply.json()["Message"]) == told
    await garden.door.stop()


@pytest.mark.parametrize(
    ("request_bytes", "message"),
    [
        (build_head("POST", "/containers", length=100) + b'{"handle":"x"}', "unexpected EOF"),
        (CHUNKED + b'e\r\n{"handle":"x"}\r\n', "unexpected EOF"),
        (CHUNKED + b'e\r\n{"hand', "unexpected EOF"),
        (CHUNKED + b'zz\r\n{"handle":"x"}\r\n', "malformed chunked encoding"),
    ],
)
async def test_1_26_body_that_is_cut_short_changes_nothing(
    garden: Garden, request_bytes: bytes, message: str
) -> None:
    """A client that still listens is told."""

    def ask(client: GardenHttp) -> Reply:
        with connect(client.address) as sock:
            sock.sendall(request_bytes)
            sock.shutdown(socket.SHUT_WR)
            reply = read_reply(sock)
            assert sock.recv(100) == b""
            return reply

    reply = await garden.do(ask)
    assert reply.status == 500
    assert message in reply.json()["Message"]
    assert await garden.do(lambda c: c.list("?garden.state=all")) == []


async def test_body_of_a_client_that_has_gone_changes_nothing(garden: Garden) -> None:
    """Nobody can be told."""

    def ask(client: GardenHttp) -> None:
        with connect(client.address) as sock:
            sock.sendall(build_head("POST", "/containers", length=100) + b'{"handle":"x"}')

    await garden.do(ask)
    assert await garden.do(lambda c: c.list("?garden.state=all")) == []


# --- §3 containers


async def test_3_3_create_and_list(garden: Garden) -> None:
    """L1, L8, L9, L10: given and made handles, filters, an empty list."""
    assert await garden.do(lambda c: c.list()) == []
    assert await garden.do(lambda c: c.create(handle="a", properties={"k": "v", "x y": "1&2"})) == "a"
    made = await garden.do(lambda c: c.create())
    assert len(made) == 36
    assert set(await garden.do(lambda c: c.list())) == {"a", made}
    assert await garden.do(lambda c: c.list("?x+y=1%262&k=v")) == ["a"]
    assert await garden.do(lambda c: c.list("?k=v&absent=")) == ["a"]
    assert await garden.do(lambda c: c.list("?k=other")) == []
    assert set(await garden.do(lambda c: c.list("?garden.state=all"))) == {"a", made}


async def test_L2_handle_in_use(garden: Garden) -> None:
    """The exact text."""
    await garden.do(lambda c: c.create(handle="a"))
    error = await garden.error("POST", "/containers", {"handle": "a"})
    assert (error.status, error.type, error.message) == (500, "", "Handle 'a' already in use")


async def test_L8_container_that_is_being_made_is_hidden(garden: Garden) -> None:
    """Unless all are asked for."""
    garden.server.backend.create_gate.clear()
    making = asyncio.ensure_future(garden.do(lambda c: c.create(handle="slow")))
    await until(lambda: ("create", "slow") in garden.server.backend.calls)
    assert await garden.do(lambda c: c.list()) == []
    assert await garden.do(lambda c: c.list("?garden.state=all")) == ["slow"]
    garden.server.backend.create_gate.set()
    await making
    assert await garden.do(lambda c: c.list()) == ["slow"]


async def test_3_4_second_destroy_is_told_that_there_is_one(garden: Garden) -> None:
    """Diego compares the text."""
    await garden.do(lambda c: c.create(handle="a"))
    garden.server.destroy_gate.clear()
    first = asyncio.ensure_future(garden.do(lambda c: c.destroy("a")))
    await until(lambda: ("destroy", "a") in garden.server.backend.calls)
    error = await garden.error("DELETE", "/containers/a")
    assert (error.status, error.type, error.message) == (500, "", "container already being destroyed")
    garden.server.destroy_gate.set()
    await first
    assert (await garden.error("DELETE", "/containers/a")).type == "ContainerNotFoundError"


async def test_PR1_to_PR3_properties(garden: Garden) -> None:
    """Set, read, replaced, removed; the server's own beside them."""
    await garden.do(lambda c: c.create(handle="a", properties={"k": "v"}, grace_time=5_000_000_000))
    assert await garden.json("PUT", "/containers/a/properties/k%20y", {"value": "w"}) == {}
    found = await garden.json("GET", "/containers/a/properties")
    assert (found["k"], found["k y"], found["garden.state"]) == ("v", "w", "created")
    assert found["garden.grace-time"] == "5000000000"
    assert found["garden.network.external-ip"] == "192.0.2.1"
    assert await garden.json("GET", "/containers/a/properties/k%20y") == {"value": "w"}
    for _ in range(2):
        assert await garden.json("DELETE", "/containers/a/properties/k%20y") == {}
    error = await garden.error("GET", "/containers/a/properties/k%20y")
    assert (error.status, error.type, error.message) == (500, "", "property does not exist: k y")


async def test_3_6_bulk_calls_have_an_entry_per_handle(garden: Garden) -> None:
    """BM5: unknown ones have an error and zeroes; none at all is an empty map, a missing key too."""
    await garden.do(lambda c: c.create(handle="a"))
    found = await garden.json("GET", "/containers/bulk_info?handles=a,b")
    assert found["a"]["Err"] is None
    assert found["a"]["Info"]["State"] == "active"
    assert found["b"]["Info"]["ContainerIP"] == ""
    assert (found["b"]["Err"]["Type"], found["b"]["Err"]["Message"]) == ("", "unknown handle: b")
    found = await garden.json("GET", "/containers/bulk_metrics?handles=b,a")
    assert found["a"]["Metrics"]["PidStat"] == {"Current": 1, "Max": 0}
    assert found["b"]["Metrics"]["Age"] == 0
    for query in ("?handles=", ""):
        assert await garden.json("GET", f"/containers/bulk_metrics{query}") == {}


async def test_3_7_and_N14_ports(garden: Garden) -> None:
    """0 asks for one; the body's handle does not count; they show in info, in order (N19)."""
    await garden.do(lambda c: c.create(handle="a", netin=[{"host_port": 0, "container_port": 8080}]))
    mapped = await garden.json("POST", "/containers/a/net/in", {"handle": "other"})
    assert mapped["host_port"] == mapped["container_port"] != 0
    ports = (await garden.do(lambda c: c.info("a")))["MappedPorts"]
    assert [port["ContainerPort"] for port in ports] == [8080, mapped["container_port"]][: len(ports)]


async def test_N22_later_rules_go_before_earlier_ones(garden: Garden) -> None:
    """And a bulk call keeps its order; null opens nothing."""
    first = {"protocol": 1, "networks": [{"start": "10.0.0.1"}], "ports": [{"start": 80, "end": 81}]}
    await garden.do(lambda c: c.create(handle="a", netout_rules=[first]))
    assert await garden.json("POST", "/containers/a/net/out", {"protocol": 3, "icmps": {"type": 8}}) == {}
    bulk = [
        {"protocol": 2, "ports": [{"start": 53}]},
        {"networks": [{"start": "10.1.0.0", "end": "10.1.0.9"}]},
    ]
    assert await garden.json("POST", "/containers/a/net/out/bulk", bulk) == {}
    reply = await garden.do(lambda c: c.call("POST", "/containers/a/net/out/bulk", b"null"))
    assert reply.json() == {}
    policy, _ = await garden.server.core.containers.egress("a")
    assert [str(rule) for rule in policy.rules] == [
        "udp:*:53",
        "all:10.1.0.0-10.1.0.9",
        "icmp:*:8",
        "tcp:10.0.0.1:80-81",
    ]


async def test_3_9_limits(garden: Garden) -> None:
    """CP1, ME3: what was set; with nothing set, an empty object."""
    limits = {
        "cpu_limits": {"limit_in_shares": 50, "weight": 100},
        "memory_limits": {"limit_in_bytes": 1 << 30},
        "pid_limits": {"max": 128},
    }
    await garden.do(lambda c: c.create(handle="a", limits=limits))
    await garden.do(lambda c: c.create(handle="b"))
    assert await garden.json("GET", "/containers/a/limits/memory") == {"limit_in_bytes": 1 << 30}
    assert await garden.json("GET", "/containers/a/limits/cpu") == {"limit_in_shares": 100}
    for kind in ("memory", "cpu", "disk", "bandwidth"):
        assert await garden.json("GET", f"/containers/b/limits/{kind}") == {}
    assert (await garden.json("GET", "/containers/a/metrics"))["PidStat"]["Max"] == 128


async def test_5_3_a_stream_that_fails_in_the_middle_is_one_line_of_the_log(
    garden: Garden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends without the last chunk."""
    stray: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))

    async def breaks(handle: str, path: str, user: str) -> AsyncIterator[bytes]:
        yield bytes(512)
        raise CopyFailed("failed", "x: Permission denied")

    monkeypatch.setattr(garden.server.backend, "stream_out", breaks)
    await garden.do(lambda c: c.create(handle="a"))
    with capture_logs() as logs:
        with pytest.raises(ConnectionError):
            await garden.do(lambda c: c.call("GET", "/containers/a/files?source=%2Fx&user="))
        await until(lambda: not garden.door._connections)
        gc.collect()
    found = [(each["event"], each["error"]) for each in logs if each["log_level"] == "warning"]
    assert found == [("garden.broken_off", "x: Permission denied")]
    assert not stray


async def test_7_grace_time(garden: Garden) -> None:
    """In nanoseconds; what is not above 0 means never (§7, statement 7)."""
    await garden.do(lambda c: c.create(handle="a"))
    assert await garden.json("PUT", "/containers/a/grace_time", -5) == {}
    assert garden.server.core.registry.get("a").spec.grace_time_s == 0
    assert await garden.json("PUT", "/containers/a/grace_time", 10**15) == {}
    assert await garden.json("PUT", "/containers/a/grace_time", 2**63 - 1) == {}
    assert garden.server.core.registry.get("a").spec.grace_time_s == GRACE_TIME_MAX_S
    reply = await garden.do(lambda c: c.call("PUT", "/containers/a/grace_time", b"null"))
    assert reply.status == 200
    assert garden.server.core.registry.get("a").spec.grace_time_s == 0
    assert await garden.json("PUT", "/containers/a/grace_time", 50_000_000) == {}
    await until(lambda: not len(garden.server.core.registry))
    assert (await garden.error("PUT", "/containers/a/grace_time", "5s")).status in (404, 500)


# --- §6 run and attach


async def run(garden: Garden, *argv: str, **spec: Any) -> HttpProcess:
    return await garden.do(lambda c: c.run("box", argv[0], *argv[1:], **spec))


@pytest.fixture
async def box(garden: Garden) -> Garden:
    await garden.do(lambda c: c.create(handle="box"))
    return garden


async def test_6_8_run_answers_with_both_ids_then_output_then_the_exit(box: Garden) -> None:
    """Each Run has a stream id of its own."""
    first, second = await run(box, "echo", "hello"), await run(box, "true", id="given")
    assert first.stream_id != second.stream_id
    assert second.id == "given"
    assert await asyncio.to_thread(first.wait) == 0
    assert (first.stdout, first.stderr) == (b"hello\n", b"")
    assert await asyncio.to_thread(second.wait) == 0


async def test_6_5_failed_start_is_an_ordinary_reply(box: Garden) -> None:
    """With a length and without `Connection: close`, so that the client keeps the type."""
    with pytest.raises(GardenHttpError) as caught:
        await run(box, "no-such-program")
    assert (caught.value.status, caught.value.type) == (500, "ExecutableNotFoundError")


async def test_6_18_stdin_and_its_end(box: Garden) -> None:
    """What comes behind the request at once is of the stream already (statement 7)."""
    body = json.dumps({"path": "cat"}).encode()

    def talk(client: GardenHttp) -> tuple[bytes, int]:
        with connect(client.address) as sock:
            stdin = b'{"source":0,"data":"one\\n"}{"source":0}\n'
            sock.sendall(build_head("POST", "/containers/box/processes", length=len(body)) + body + stdin)
            status, _, rest = read_head(sock)
            assert status == 201
            while rest.count(b"\n") < 2:
                rest += sock.recv(65536)
            first, last = map(json.loads, rest.splitlines())
            assert sock.recv(10) == b""
            process = HttpProcess(client, "box", sock, first["process_id"], first["stream_id"], b"")
            process.open_side("stdout")
            process._sides["stdout"].join(10)
            return process.stdout, last["exit_status"]

    assert await box.do(talk) == (b"one\n", 0)


async def test_6_13_unknown_stream_ids_end_at_once(box: Garden) -> None:
    """200, and nothing."""

    def ask(client: GardenHttp) -> tuple[int, bytes]:
        with connect(client.address) as sock:
            sock.sendall(build_head("GET", "/containers/box/processes/p/attaches/99/stdout"))
            status, _, rest = read_head(sock)
            return status, rest + sock.recv(10)

    assert await box.do(ask) == (200, b"")


async def test_6_20_signals_are_heard_after_the_end_of_stdin(box: Garden) -> None:
    """The reference stops reading there."""
    process = await run(box, "sleep", "1000")
    process.end_input()
    process.signal(1)
    assert await asyncio.to_thread(process.wait) == 137


async def test_6_21_garbage_costs_its_sender_only_its_connection(box: Garden) -> None:
    """It is told, instead of waiting for what will not be done; the process goes on."""
    process = await run(box, "sleep", "1000", id="p")
    process.control.sendall(b"\x00\xff garbage\n")
    said = await asyncio.to_thread(process.next_message)
    assert said == {"process_id": "p", "error": "a message must be a JSON object"}
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(process.next_message)
    await asyncio.to_thread(process.wait_for_sides)
    process.leave()
    other = await box.do(lambda c: c.attach("box", "p"))
    other.signal(0)
    assert await asyncio.to_thread(other.wait) == 143


async def test_6_19_input_of_any_size_may_come_in_one_message(box: Garden) -> None:
    """Go's io.Copy sends a bytes.Buffer so; what comes behind it is heard."""
    process = await run(box, "cat")
    await asyncio.to_thread(process.write, "x" * 6_000_000)
    process.end_input()
    assert await asyncio.to_thread(process.wait) == 0
    assert process.stdout == b"x" * 6_000_000


async def test_6_28_client_that_leaves_behind_unread_input_is_missed(box: Garden) -> None:
    """Its process reads nothing, so its end is not read either; the container is idle all the same."""
    process = await run(box, "cat", id="p")
    entry = box.server.core.registry.get("box").processes["p"]
    entry.process.write_stdin = lambda data, offset: asyncio.Event().wait()  # type: ignore[assignment,misc,return-value]

    def fill() -> None:
        process.control.settimeout(0.5)
        for _ in range(1000):
            try:
                process.write("x" * 65_536)
            except TimeoutError:
                return
        raise AssertionError("it takes input without end")

    await asyncio.to_thread(fill)
    await box.json("PUT", "/containers/box/grace_time", 20_000_000)
    await asyncio.sleep(0.1)
    assert await box.do(lambda c: c.list()) == ["box"]
    process.leave()
    await until(lambda: not len(box.server.core.registry))


async def test_6_28_client_that_leaves_leaves_the_process(box: Garden) -> None:
    """Its stdin ends with the last client; so `cat` does, and who attaches later learns it."""
    process = await run(box, "cat", id="p")
    other = await box.do(lambda c: c.attach("box", "p"))
    process.leave()
    await asyncio.sleep(0.05)
    other.write("still open\n")
    other.leave()
    entry = box.server.core.registry.get("box").processes["p"]
    await until(lambda: entry.process.exit is not None)
    late = await box.do(lambda c: c.attach("box", "p"))
    assert await asyncio.to_thread(late.wait) == 0


@pytest.mark.parametrize("inputs", [1, 5, 50])
async def test_6_28_what_was_never_fed_is_forgotten_with_the_process(box: Garden, inputs: int) -> None:
    """A client leaves while its process reads nothing: it counts no longer as one who feeds a process of that name."""
    process = await run(box, "cat", id="p")
    entry = box.server.core.registry.get("box").processes["p"]
    entry.process.write_stdin = lambda data, offset: asyncio.Event().wait()  # type: ignore[assignment,misc,return-value]
    for _ in range(inputs):
        process.write("never read\n")
    process.leave()
    await asyncio.sleep(0.05)
    await box.json("DELETE", "/containers/box")
    await box.json("POST", "/containers", {"handle": "box"})
    again = await run(box, "cat", id="p")
    entry = box.server.core.registry.get("box").processes["p"]
    again.leave()
    await until(lambda: entry.process.exit is not None)


async def test_6_30_one_clients_end_is_not_everybodys(box: Garden) -> None:
    """S4: the process sees the end when no writer remains."""
    first = await run(box, "cat", id="p")
    second = await box.do(lambda c: c.attach("box", "p"))
    first.end_input()
    await asyncio.sleep(0.05)
    second.write("more\n")
    second.end_input()
    assert await asyncio.to_thread(first.wait) == 0
    assert first.stdout == b"more\n"
    assert await asyncio.to_thread(second.wait) == 0


async def test_6_15_side_connections_may_come_late(box: Garden) -> None:
    """After the process and the control connection have ended."""
    process = await box.do(lambda c: c.run("box", "echo", "hello", sides=()))
    assert await asyncio.to_thread(process.wait) == 0
    await asyncio.to_thread(process.open_side, "stdout")
    await asyncio.to_thread(process._sides["stdout"].join, 10)
    assert process.stdout == b"hello\n"


async def test_AT3_attach_to_a_finished_process(box: Garden) -> None:
    """The rest of its output, and its exit: nothing was read, so all of it."""
    process = await box.do(lambda c: c.run("box", "echo", "hello", id="p", sides=()))
    assert await asyncio.to_thread(process.wait) == 0
    again = await box.do(lambda c: c.attach("box", "p"))
    assert await asyncio.to_thread(again.wait) == 0
    assert again.stdout == b"hello\n"
    once_more = await box.do(lambda c: c.attach("box", "p"))
    assert await asyncio.to_thread(once_more.wait) == 0
    assert once_more.stdout == b""
    from_start = await box.do(lambda c: c.attach("box", "p", "?stdout_offset=2"))
    assert await asyncio.to_thread(from_start.wait) == 0
    assert from_start.stdout == b"llo\n"


@pytest.mark.parametrize("query", ["?stdout_offset=7", "?stdout_offset=x", "?stderr_offset=-1"])
async def test_attach_from_where_nothing_is_is_refused(box: Garden, query: str) -> None:
    """With a message, not a silent gap."""
    process = await box.do(lambda c: c.run("box", "echo", "hello", id="p"))
    await asyncio.to_thread(process.wait)
    with pytest.raises(GardenHttpError, match="offset"):
        await box.do(lambda c: c.attach("box", "p", query))


async def test_without_the_cursor_attach_begins_now(box: Garden) -> None:
    """As in the reference (AT2)."""
    process = await box.do(lambda c: c.run("box", "echo", "hello", id="p", sides=()))
    await asyncio.to_thread(process.wait)
    attachments = Attachments(remember=False, metrics=Metrics())
    entry = box.server.core.registry.get("box").processes["p"].process
    assert attachments.begin("box", entry, {}, fresh=False).offsets == {
        OutputStream.STDOUT: 6,
        OutputStream.STDERR: 0,
    }


async def test_6_29_stop_ends_connections_without_a_last_message(tmp_path: Path) -> None:
    """The process goes on, and its stdin with it."""
    garden = await open_garden(tmp_path)
    await garden.do(lambda c: c.create(handle="box"))
    process = await run(garden, "cat", id="p")
    await garden.door.stop()
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(process.next_message)
    process.leave()
    assert garden.server.core.processes.get("box", "p").exit is None
    await garden.server.core.close()


@pytest.mark.parametrize("pipelined", [False, True])
async def test_6_29_stop_tells_those_whose_requests_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipelined: bool
) -> None:
    """They are not left with a connection that ends; what was begun is the next server's affair."""
    monkeypatch.setattr("garden_py.api.http.door._STOP_GRACE_S", 0.05)
    garden = await open_garden(tmp_path)
    await garden.do(lambda c: c.create(handle="box"))
    garden.server.destroy_gate.clear()

    def destroy(client: GardenHttp) -> tuple[Reply, bytes]:
        with connect(client.address) as sock:
            sock.sendall(build_head("DELETE", "/containers/box") * (1 + pipelined))
            return read_reply(sock), sock.recv(100)

    asked = asyncio.ensure_future(garden.do(destroy))
    await until(lambda: garden.server.core.registry.get("box").state is State.DESTROYING)
    await garden.door.stop()
    reply, rest = await asked
    assert (reply.status, reply.json()["Type"], rest) == (500, "ServiceUnavailableError", b"")
    garden.server.destroy_gate.set()
    await garden.server.core.close()


async def test_7_4_an_attached_client_keeps_the_container(box: Garden) -> None:
    """For the life of its control connection, not of the process."""
    process = await run(box, "sleep", "1000")
    await box.json("PUT", "/containers/box/grace_time", 20_000_000)
    await asyncio.sleep(0.1)
    assert await box.do(lambda c: c.list()) == ["box"]
    process.leave()
    await until(lambda: not len(box.server.core.registry))


async def test_connections_that_say_nothing_cost_nobody_anything(box: Garden) -> None:
    """Half heads, runs whose side connections never come, side connections that read nothing."""
    half = [connect(box.client.address) for _ in range(50)]
    for sock in half:
        sock.sendall(b"GET /pi")
    silent = [await box.do(lambda c: c.run("box", "echo", "x", sides=())) for _ in range(20)]
    process = await run(box, "echo", "hello")
    assert await asyncio.to_thread(process.wait) == 0
    assert process.stdout == b"hello\n"
    for sock in half:
        sock.close()
    for each in silent:
        each.leave()


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    """After a door and all its connections have gone."""

    async def live() -> None:
        garden = await open_garden(tmp_path)
        await garden.do(lambda c: c.create(handle="box"))
        for _ in range(5):
            process = await run(garden, "echo", "hello")
            await asyncio.to_thread(process.wait)
        await garden.door.stop()
        await garden.server.core.close()

    asyncio.run(live())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(live())
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_6_20_signals_are_heard_while_the_process_reads_nothing(box: Garden) -> None:
    """Whatever input waits in front of them."""
    process = await run(box, "sleep", "1000")
    for _ in range(3):
        await asyncio.to_thread(process.write, "x" * 1_000_000)
    process.signal(1)
    assert await asyncio.to_thread(process.wait) == 137


async def test_process_of_another_door_keeps_its_stdin(box: Garden) -> None:
    """A Garden client that attaches and leaves is not the last one who feeds it, as far as anybody here knows."""
    started = await box.server.core.processes.start("box", ProcessSpec("cat", id="p"))
    process = await box.do(lambda c: c.attach("box", "p", sides=()))
    process.leave()
    await asyncio.sleep(0.1)
    await started.write_stdin(b"still open\n", None)
    await started.close_stdin()
    assert (await started.wait()).code == 0
