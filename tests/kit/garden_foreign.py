"""The same client interface as kit/garden_http.py, over a client in another language: tests/foreign/garden.js."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import threading
from pathlib import Path
from queue import Queue
from typing import Any

from kit.garden_http import TIMEOUT_S, GardenHttpError, Reply, WireClient, WireProcess

PROGRAM = Path(__file__).parents[1] / "foreign" / "garden.js"


class ForeignError(ConnectionError):
    """What the foreign client threw."""


class ForeignGarden(WireClient):
    """Calls through the foreign client; close it."""

    def __init__(self, address: str) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[int, Queue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            ["node", PROGRAM, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        threading.Thread(target=self._read, daemon=True).start()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(TIMEOUT_S) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._waiting.pop(answer["id"]).put(answer)

    def ask(self, op: str, **parameters: Any) -> Any:
        number, answers = next(self._numbers), Queue[dict[str, Any]]()
        self._waiting[number] = answers
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"id": number, "op": op, **parameters}) + "\n")
            self._process.stdin.flush()
        answer = answers.get(timeout=TIMEOUT_S)
        if "error" in answer:
            raise ForeignError(answer["error"])
        return answer["result"]

    def call(self, method: str, path: str, body: bytes | None = None, *headers: str) -> Reply:
        packed = None if body is None else base64.b64encode(body).decode()
        named = dict(header.split(": ", 1) for header in headers)
        if body is not None:
            named.setdefault("Content-Type", "application/json")
        found = self.ask("call", method=method, path=path, body=packed, headers=named)
        return Reply(found["status"], found["headers"], base64.b64decode(found["body"]))

    def _run(self, handle: str, spec: dict[str, Any], sides: tuple[str, ...]) -> ForeignProcess:
        return self._begin(self.ask("run", handle=handle, spec=spec, sides=sides))

    def _attach(self, handle: str, process_id: str, query: str, sides: tuple[str, ...]) -> ForeignProcess:
        return self._begin(self.ask("attach", handle=handle, process=process_id, query=query, sides=sides))

    def _begin(self, found: dict[str, Any]) -> ForeignProcess:
        if failure := found.get("failure"):
            raise GardenHttpError(failure["status"], json.loads(failure["body"]))
        return ForeignProcess(self, found["key"], found["process_id"], found["stream_id"])


class ForeignProcess(WireProcess):
    """A Run or Attach of the foreign client."""

    def __init__(self, client: ForeignGarden, key: str, process_id: str, stream_id: str) -> None:
        self._client = client
        self._key = key
        self.id = process_id
        self.stream_id = stream_id

    def send(self, **message: Any) -> None:
        self._client.ask("send", key=self._key, message=message)

    def wait(self) -> int:
        return int(self._client.ask("wait", key=self._key)["status"])

    def next_message(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.ask("next", key=self._key)["message"]
        return found

    def leave(self) -> None:
        self._client.ask("leave", key=self._key)

    def wait_for_sides(self) -> None:
        self._client.ask("sides", key=self._key)

    def read(self, name: str) -> bytes:
        return base64.b64decode(self._client.ask("output", key=self._key, name=name)["data"])
