"""A small synchronous client of the agent's wire protocol, for tests."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from garden_py import wire

DEADLINE_S = 20.0


class AgentError(Exception):
    """An error frame."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(f"{details['code']}: {details['message']}")
        self.code: str = details["code"]
        self.message: str = details["message"]
        self.field: str | None = details.get("field")
        self.details = details


class Streams:
    """The server's ends of a process's streams; closes them all at the end."""

    def __init__(self, pid: int, names: list[str], fds: list[int]) -> None:
        self.pid = pid
        self.fds = dict(zip(names, fds, strict=True))

    def close(self, *names: str) -> None:
        for name in names or tuple(self.fds):
            os.close(self.fds.pop(name))

    def read_all(self, name: str) -> bytes:
        """Everything until the end of the stream."""
        chunks = []
        while chunk := os.read(self.fds[name], 1 << 16):
            chunks.append(chunk)
        return b"".join(chunks)

    def read_until(self, name: str, wanted: bytes) -> bytes:
        data = b""
        while wanted not in data:
            chunk = os.read(self.fds[name], 1 << 16)
            assert chunk, f"stream ended after {data!r}"
            data += chunk
        return data

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.fds["stdin"], rest) :]

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AgentClient:
    """One connection to an agent; every wait has a deadline."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))  # blocking: with a timeout, a full backlog would be an error at once
        self.socket.settimeout(DEADLINE_S)
        self._decoder = wire.Decoder()
        self._frames: deque[tuple[wire.Frame, list[int]]] = deque()
        self._fds: list[int] = []
        self._next_id = 1
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        for fd in self._fds + [fd for _, fds in self._frames for fd in fds]:
            os.close(fd)
        self._fds.clear()
        self._frames.clear()

    def send(self, op: str, fds: list[int] | None = None, **fields: Any) -> int:
        """Send a request; returns its id."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        frame = wire.encode_frame(wire.REQUEST, request_id, {"op": op, **fields}, len(fds or []))
        if fds:
            sent = socket.send_fds(self.socket, [frame], fds)
            self.socket.sendall(frame[sent:])
        else:
            self.socket.sendall(frame)
        return request_id

    def receive(self, request_id: int) -> tuple[dict[str, Any], list[int]]:
        """The answer to a request; events met on the way are kept."""
        while True:
            frame, fds = self._next_frame()
            if frame.kind == wire.EVENT:
                self.events.append(frame.value)
                continue
            assert frame.id == request_id, (frame, request_id)
            if frame.kind == wire.ERROR:
                raise AgentError(frame.value)
            return frame.value, fds

    def request(self, op: str, fds: list[int] | None = None, **fields: Any) -> dict[str, Any]:
        """Send and wait for a reply without descriptors."""
        reply, reply_fds = self.receive(self.send(op, fds, **fields))
        assert reply_fds == []
        return reply

    def hello(self) -> dict[str, Any]:
        return self.request("hello", server="test", wire=[wire.OLDEST, wire.VERSION])

    def spawn(self, id: str, argv: list[bytes], **fields: Any) -> Streams:
        reply, fds = self.receive(self.send_spawn(id, argv, **fields))
        return Streams(reply["pid"], reply["fds"], fds)

    def send_spawn(self, id: str, argv: list[bytes], **fields: Any) -> int:
        request: dict[str, Any] = {
            "id": id, "argv": argv, "env": [], "dir": b"", "user": "", "tty": None, "rlimits": {},
            "bounding": None, "no_new_privs": False, "program": None, "program_args": {}, "gated": False,
        }  # fmt: skip
        return self.send("spawn", **{**request, **fields})

    def run(self, id: str, argv: list[bytes], stdin: bytes = b"", **fields: Any) -> tuple[int, bytes, bytes]:
        """Run to the end and release: (exit code as os.waitstatus_to_exitcode, stdout, stderr)."""
        with self.spawn(id, argv, **fields) as streams:
            if "tty" not in fields:
                self.request("close_stdin", id=id)
                with suppress(
                    BrokenPipeError
                ):  # a program that gives up reads no more, and says why elsewhere
                    streams.write(stdin)
                streams.close("stdin")
            self.request("drop_output", id=id, stream="stdout")
            out = streams.read_all("stdout")
            err = streams.read_all("stderr") if "stderr" in streams.fds else b""
        status = self.wait_exit(id)
        self.request("release", id=id)
        return os.waitstatus_to_exitcode(status), out, err

    def attach(self, id: str) -> tuple[dict[str, Any], Streams]:
        reply, fds = self.receive(self.send("attach", id=id))
        return reply, Streams(reply["pid"], reply["fds"], fds)

    def wait_exit(self, id: str) -> int:
        """The raw wait status from the exit event."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for event in self.events:
                if event["event"] == "exited" and event["process"] == id:
                    self.events.remove(event)
                    return int(event["status"])
            frame, _ = self._next_frame()
            assert frame.kind == wire.EVENT, frame
            self.events.append(frame.value)
        raise TimeoutError(id)

    def is_closed_by_peer(self) -> bool:
        """Wait until the agent closes the connection."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def _next_frame(self) -> tuple[wire.Frame, list[int]]:
        while not self._frames:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, wire.MAX_FDS)
            if not data:
                raise ConnectionResetError("the agent closed the connection")
            self._fds += fds
            for frame in self._decoder.feed(data):
                taken, self._fds = self._fds[: frame.nfds], self._fds[frame.nfds :]
                assert len(taken) == frame.nfds
                self._frames.append((frame, taken))
        return self._frames.popleft()
