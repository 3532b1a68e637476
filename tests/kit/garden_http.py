"""A small Garden client that speaks the wire by hand, as the protocol's §6 describes it. One connection a call."""

from __future__ import annotations

import json
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from kit.patience import FACTOR

TIMEOUT_S = 30.0 * FACTOR


class GardenHttpError(Exception):
    """A reply outside 200 to 299."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status} {error.get('Type')}: {error.get('Message')}")
        self.status = status
        self.type = error.get("Type")
        self.message = str(error.get("Message"))
        self.error = error


@dataclass(frozen=True)
class Reply:
    """A whole reply; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        assert int(self.headers["content-length"]) == len(self.body)
        assert self.body.endswith(b"\n")
        return json.loads(self.body)


def connect(address: str) -> socket.socket:
    """A connection to unix:PATH or HOST:PORT."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT_S)
        sock.connect(address.removeprefix("unix:"))
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def build_head(method: str, path: str, *headers: str, length: int | None = None) -> bytes:
    """A request's head; the client says `Host: api` whatever it talks to."""
    lines = [f"{method} {path} HTTP/1.1", "Host: api", "User-Agent: Go-http-client/1.1", *headers]
    if length is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read_head(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers, and what came behind them; an end of file before is a ConnectionError."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(f"the connection ended after {data!r}")
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, _ = first.split(" ", 2)
    assert version == "HTTP/1.1"
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status), headers, rest


def read_reply(sock: socket.socket) -> Reply:
    """One reply, by its length, its chunks, or the end of the connection."""
    status, headers, data = read_head(sock)
    if headers.get("transfer-encoding") == "chunked":
        return Reply(status, headers, _read_chunks(sock, data))
    wanted = int(headers["content-length"]) if "content-length" in headers else None
    while wanted is None or len(data) < wanted:
        piece = sock.recv(65536)
        if not piece:
            assert wanted is None, f"{len(data)} bytes of {wanted} came"
            break
        data += piece
    return Reply(status, headers, data)


def _read_chunks(sock: socket.socket, data: bytes) -> bytes:
    body = b""
    while True:
        while b"\r\n" not in data:
            data += _more(sock)
        size_text, _, data = data.partition(b"\r\n")
        size = int(size_text, 16)
        while len(data) < size + 2:
            data += _more(sock)
        if size == 0:
            return body
        body, data = body + data[:size], data[size + 2 :]


def _more(sock: socket.socket) -> bytes:
    piece = sock.recv(1 << 20)
    if not piece:
        raise ConnectionError("the body was cut short")
    return piece


class ProcessBase(ABC):
    """What tests do with a Run or Attach, whoever speaks the wire."""

    id: str

    @abstractmethod
    def send(self, **message: Any) -> None:
        """A message to the server."""

    @abstractmethod
    def wait(self) -> int:
        """The exit status, after all open side connections have ended."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """What has come of an output so far."""

    def write(self, text: str) -> None:
        self.send(source=0, data=text)

    def end_input(self) -> None:
        self.send(source=0)

    def resize(self, columns: int, rows: int) -> None:
        self.send(tty={"window_size": {"columns": columns, "rows": rows}})

    def signal(self, number: int) -> None:
        """0: terminate, 1: kill."""
        self.send(signal=number)

    @property
    def stdout(self) -> bytes:
        return self.read("stdout")

    @property
    def stderr(self) -> bytes:
        return self.read("stderr")


class WireProcess(ProcessBase):
    """What tests of the Garden wire do besides."""

    stream_id: str

    @abstractmethod
    def next_message(self) -> dict[str, Any]:
        """The next message of the server; ConnectionError at the end of the connection."""

    @abstractmethod
    def leave(self) -> None:
        """Close the control connection, as a client that crashes does."""

    @abstractmethod
    def wait_for_sides(self) -> None:
        """Wait until all side connections have ended."""


class GardenClientBase(ABC):
    """What tests of the statements ask of a client, whichever door it is at."""

    @abstractmethod
    def create(self, **spec: Any) -> str:
        """Make a container; its handle."""

    @abstractmethod
    def destroy(self, handle: str) -> None: ...

    @abstractmethod
    def list(self) -> list[str]: ...

    @abstractmethod
    def info(self, handle: str) -> Any: ...

    @abstractmethod
    def stop(self, handle: str, *, kill: bool) -> None: ...

    @abstractmethod
    def memory_limit(self, handle: str) -> int:
        """The limit in force, in bytes."""

    @abstractmethod
    def metrics(self, handle: str) -> Any: ...

    @abstractmethod
    def map_port(self, handle: str, container_port: int) -> tuple[int, int]:
        """(host port, container port) of a mapping with a host port from the pool."""

    @abstractmethod
    def net_out(self, handle: str, *rules: dict[str, Any]) -> None:
        """Allow one destination more, or several at once."""

    @abstractmethod
    def stream_in(self, handle: str, tar: bytes, *, user: str, destination: str) -> None: ...

    @abstractmethod
    def stream_out(self, handle: str, *, user: str, source: str) -> bytes:
        """The tar."""

    @abstractmethod
    def run(
        self, handle: str, path: str, *args: str, sides: tuple[str, ...] = ("stdout", "stderr"), **spec: Any
    ) -> Any:
        """Start a process and open side connections, stdout first, as clients do."""

    @abstractmethod
    def attach(self, handle: str, process_id: str) -> Any:
        """Attach to a process."""

    @contextmanager
    def container(self, **spec: Any) -> Iterator[str]:
        """A container for the length of a block."""
        handle = self.create(**spec)
        try:
            yield handle
        finally:
            self.destroy(handle)

    def sh(self, handle: str, script: str, **spec: Any) -> tuple[int, bytes, bytes]:
        """Exit status and both outputs of a shell script."""
        process = self.run(handle, "sh", "-c", script, **spec)
        return process.wait(), process.stdout, process.stderr

    def text_of(self, handle: str, script: str, **spec: Any) -> str:
        """What a script writes to stdout; it must succeed."""
        status, out, err = self.sh(handle, script, **spec)
        assert status == 0, f"{script!r} ended with {status}: {err!r}"
        return out.decode()


class WireClient(GardenClientBase):
    """A client of the Garden door, whoever speaks the wire."""

    @abstractmethod
    def call(self, method: str, path: str, body: bytes | None = None, *headers: str) -> Reply:
        """One request on a connection of its own."""

    @abstractmethod
    def _run(self, handle: str, spec: dict[str, Any], sides: tuple[str, ...]) -> WireProcess:
        """Run, with the body as it is."""

    @abstractmethod
    def _attach(self, handle: str, process_id: str, query: str, sides: tuple[str, ...]) -> WireProcess:
        """Attach."""

    def json(self, method: str, path: str, value: Any = None) -> Any:
        """A call with JSON in and out; GardenHttpError for what is no success."""
        body = None if value is None else json.dumps(value).encode() + b"\n"
        return self.succeed(self.call(method, path, body)).json()

    def succeed(self, reply: Reply) -> Reply:
        if reply.status // 100 != 2:
            raise GardenHttpError(reply.status, reply.json())
        return reply

    def create(self, **spec: Any) -> str:
        return str(self.json("POST", "/containers", {"image": {}, "limits": {}, **spec})["Handle"])

    def destroy(self, handle: str) -> None:
        assert self.json("DELETE", f"/containers/{quote(handle)}") == {}

    def list(self, query: str = "") -> list[str]:
        return list(self.json("GET", f"/containers{query}")["Handles"])

    def info(self, handle: str) -> Any:
        return self.json("GET", f"/containers/{quote(handle)}/info")

    def stop(self, handle: str, *, kill: bool) -> None:
        assert self.json("PUT", f"/containers/{quote(handle)}/stop", {"kill": kill}) == {}

    def memory_limit(self, handle: str) -> int:
        return int(self.json("GET", f"/containers/{quote(handle)}/limits/memory")["limit_in_bytes"])

    def metrics(self, handle: str) -> Any:
        return self.json("GET", f"/containers/{quote(handle)}/metrics")

    def map_port(self, handle: str, container_port: int) -> tuple[int, int]:
        wanted = {"host_port": 0, "container_port": container_port}
        found = self.json("POST", f"/containers/{quote(handle)}/net/in", wanted)
        return found["host_port"], found["container_port"]

    def net_out(self, handle: str, *rules: dict[str, Any]) -> None:
        path = f"/containers/{quote(handle)}/net/out"
        if len(rules) == 1:
            assert self.json("POST", path, rules[0]) == {}
        else:
            assert self.json("POST", f"{path}/bulk", rules) == {}

    def stream_in(self, handle: str, tar: bytes, **query: str) -> None:
        self.succeed(self.call("PUT", f"/containers/{quote(handle)}/files?{urlencode(query)}", tar))

    def stream_out(self, handle: str, **query: str) -> bytes:
        return self.succeed(self.call("GET", f"/containers/{quote(handle)}/files?{urlencode(query)}")).body

    def run(
        self, handle: str, path: str, *args: str, sides: tuple[str, ...] = ("stdout", "stderr"), **spec: Any
    ) -> Any:
        return self._run(
            handle, {"path": path, "args": list(args), "rlimits": {}, "image": {}, **spec}, sides
        )

    def attach(
        self, handle: str, process_id: str, query: str = "", sides: tuple[str, ...] = ("stdout", "stderr")
    ) -> Any:
        return self._attach(handle, process_id, query, sides)


@dataclass
class HttpProcess(WireProcess):
    """A Run or Attach: the control connection, and the side connections that were asked for."""

    client: GardenHttp
    handle: str
    control: socket.socket
    id: str
    stream_id: str
    _rest: bytes
    _sides: dict[str, threading.Thread] = field(default_factory=dict)
    output: dict[str, bytearray] = field(default_factory=dict)

    def open_side(self, name: str) -> None:
        """Open a side connection and read it to its end in the background."""
        sock = self.open_side_socket(name)
        self.output[name] = bytearray(sock[1])
        thread = threading.Thread(target=self._drain, args=(name, sock[0]), daemon=True)
        thread.start()
        self._sides[name] = thread

    def open_side_socket(self, name: str) -> tuple[socket.socket, bytes]:
        """The bare connection, and what came behind its head."""
        sock = connect(self.client.address)
        path = f"/containers/{quote(self.handle)}/processes/{quote(self.id)}/attaches/{self.stream_id}/{name}"
        sock.sendall(build_head("GET", path, "Content-Type: application/json"))
        status, headers, rest = read_head(sock)
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        return sock, rest

    def _drain(self, name: str, sock: socket.socket) -> None:
        with sock:
            while piece := sock.recv(1 << 20):
                self.output[name] += piece

    def send(self, **message: Any) -> None:
        """A message to the server."""
        self.control.sendall(json.dumps({"process_id": self.id, **message}).encode() + b"\n")

    def wait(self) -> int:
        """The exit status, after all open side connections have ended."""
        last: dict[str, Any] = {}
        while "exit_status" not in last:
            last = self.next_message()
            assert "error" not in last, last
        self.wait_for_sides()
        self.control.close()
        return int(last["exit_status"])

    def next_message(self) -> dict[str, Any]:
        """The next message of the server; ConnectionError at the end of the connection."""
        while b"\n" not in self._rest:
            self._rest += _more(self.control)
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def leave(self) -> None:
        """Close the control connection, as a client that crashes does."""
        self.control.close()

    def wait_for_sides(self) -> None:
        for thread in self._sides.values():
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a side connection does not end"

    def read(self, name: str) -> bytes:
        return bytes(self.output[name])


@dataclass(frozen=True)
class GardenHttp(WireClient):
    """Calls to one server."""

    address: str

    def call(self, method: str, path: str, body: bytes | None = None, *headers: str) -> Reply:
        """One request on a connection of its own."""
        with connect(self.address) as sock:
            length = None if body is None else len(body)
            sock.sendall(
                build_head(method, path, "Connection: close", *headers, length=length) + (body or b"")
            )
            return read_reply(sock)

    def _run(self, handle: str, spec: dict[str, Any], sides: tuple[str, ...]) -> HttpProcess:
        body = json.dumps(spec).encode()
        return self._hijack("POST", f"/containers/{quote(handle)}/processes", handle, 201, sides, body)

    def _attach(self, handle: str, process_id: str, query: str, sides: tuple[str, ...]) -> HttpProcess:
        path = f"/containers/{quote(handle)}/processes/{quote(process_id)}{query}"
        return self._hijack("GET", path, handle, 200, sides, None)

    def _hijack(
        self, method: str, path: str, handle: str, expected: int, sides: tuple[str, ...], body: bytes | None
    ) -> HttpProcess:
        sock = connect(self.address)
        try:
            sock.sendall(build_head(method, path, length=None if body is None else len(body)) + (body or b""))
            status, headers, rest = read_head(sock)
            if status != expected:
                assert "connection" not in headers, "the client would lose the typed error"
                wanted = int(headers["content-length"])
                while len(rest) < wanted:
                    rest += _more(sock)
                raise GardenHttpError(status, json.loads(rest))
            assert headers["transfer-encoding"] == "chunked"
        except BaseException:
            sock.close()
            raise
        process = HttpProcess(self, handle, sock, "", "", rest)
        first = process.next_message()
        process.id, process.stream_id = first["process_id"], first["stream_id"]
        for name in sides:
            process.open_side(name)
        return process
