"""A small process that times command lines, apart from the one that speaks gRPC.

Run as `python stopwatch.py`, perhaps behind `unshare`; the commands then run in those namespaces. One JSON object a
line comes in on stdin and one goes out on stdout; `Stopwatch` is the other side. An answer repeats the request's `id`,
so that one whose asker was interrupted is not taken for the next.

    {"op": "time", "argv", "log", "listener"?, "hello"?, "leave"?}       -> {"ms", "hello_ms"?}
    {"op": "nothing"}                                                    -> {}
    {"op": "cycles", "cycles": [[argv, ...], ...], "in_flight", "log", "listener"} -> {"ms"}

`listener` is a path: a socket that listens there is descriptor 3 of the command, as for the agent. `hello`: also
connect to it and say hello. `leave`: the command does not end by itself; it is killed when it has answered.

It loads neither grpc nor much else, so its forks are cheap: the peers shall not pay for our libraries.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from garden_py import wire

LISTENER_FD = 3
COMMAND_TIMEOUT_S = 60.0


class CommandFailed(Exception):
    """A timed command did not do what it should."""


class Stopwatch:
    """The side of the one who asks.

    Args:
        prefix: command line before the interpreter's, e.g. `unshare --net`.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C ends us, who then need it to clean up
        )
        self._asked = 0

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have something timed.

        Raises:
            CommandFailed: the command failed, with the end of its log.
        """
        assert self._process.stdin is not None
        self._asked += 1
        self._process.stdin.write(json.dumps({**request, "id": self._asked}).encode() + b"\n")
        while (answer := self._next_answer(request))["id"] != self._asked:
            pass
        if "error" in answer:
            raise CommandFailed(answer["error"])
        return answer

    def _next_answer(self, request: dict[str, Any]) -> dict[str, Any]:
        # Unbuffered: a second answer in a buffer of ours would be one that select(2) does not see.
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 4 * COMMAND_TIMEOUT_S)[0]:
            raise CommandFailed(f"no answer to {request}")
        line = self._process.stdout.readline()
        if not line:
            raise CommandFailed(f"the stopwatch ended at {request}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self) -> None:
        """Wait until it is not busy any more, should an asker have been interrupted."""
        self.ask(op="nothing")

    def close(self) -> None:
        """End the process; safe twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait(COMMAND_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextmanager
def running_stopwatch(*prefix: str) -> Iterator[Stopwatch]:
    """A stopwatch that ends with the context."""
    stopwatch = Stopwatch(prefix)
    try:
        yield stopwatch
    finally:
        stopwatch.close()


# --- the process ---


def main() -> None:
    """Answer requests until the end of stdin."""
    # From here on descriptor 3 is taken, and only ever replaced: nothing else of ours can get that number.
    os.dup2(sys.stdin.fileno(), LISTENER_FD, inheritable=False)
    operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "time": _time,
        "cycles": _cycles,
        "nothing": lambda request: {},
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request["op"]](request)
        except (CommandFailed, OSError, subprocess.TimeoutExpired) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({**answer, "id": request["id"]}), flush=True)


def _time(request: dict[str, Any]) -> dict[str, Any]:
    path: str | None = request.get("listener")
    if path is not None:
        _listen(path)
    answer: dict[str, Any] = {}
    begin = time.perf_counter()
    process = _start(request["argv"], request["log"], with_listener=path is not None)
    try:
        if path is not None and request.get("hello"):
            _say_hello(path)
            answer["hello_ms"] = _ms_since(begin)
        if not request.get("leave"):
            _require_success(process, request)
            answer["ms"] = _ms_since(begin)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return answer


def _cycles(request: dict[str, Any]) -> dict[str, Any]:
    _listen(request["listener"])

    def cycle(commands: list[list[str]]) -> None:
        for argv in commands:
            _require_success(_start(argv, request["log"], with_listener=True), {**request, "argv": argv})

    with ThreadPoolExecutor(request["in_flight"]) as pool:
        begin = time.perf_counter()
        list(pool.map(cycle, request["cycles"]))  # takes every result, so that an error is seen
        return {"ms": _ms_since(begin)}


def _start(argv: list[str], log: str, *, with_listener: bool) -> subprocess.Popen[bytes]:
    """Standard streams are files, not pipes: PID 1 of a container keeps them."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[LISTENER_FD] if with_listener else [],
        )


def _require_success(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    status = _wait(process)
    if status != 0:
        tail = Path(request["log"]).read_text(errors="replace")[-1000:]
        raise CommandFailed(f"{' '.join(request['argv'])} ended with {status}: {tail}")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status, at once when there is one: Popen.wait with a timeout looks only every 0.5 to 50 ms.

    A descriptor of a process is readable when it has ended, pidfd_open(2).
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        if not select.select([pidfd], [], [], COMMAND_TIMEOUT_S)[0]:
            process.kill()
            raise CommandFailed(f"{process.args!r} took longer than {COMMAND_TIMEOUT_S:g} s")
    finally:
        os.close(pidfd)
    return process.wait()


def _listen(path: str) -> None:
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        os.dup2(listener.fileno(), LISTENER_FD, inheritable=False)


def _say_hello(path: str) -> None:
    """Returns when the agent has answered. The connection waits in the listener until the agent runs."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(COMMAND_TIMEOUT_S)
        connection.connect(path)
        hello = {"op": "hello", "server": "benchmark", "wire": [wire.VERSION, wire.VERSION]}
        connection.sendall(wire.encode_frame(wire.REQUEST, 1, hello))
        decoder = wire.Decoder()
        while data := connection.recv(1 << 16):
            for frame in decoder.feed(data):
                if frame.kind == wire.REPLY:
                    return
                raise CommandFailed(f"the agent answered hello with {frame!r}")
    raise CommandFailed("the agent closed the connection")


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    main()
