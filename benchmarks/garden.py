"""Through the Garden door: the questions and streams of its clients, with a client that does next to nothing itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kit.garden_http import GardenHttp, HttpProcess, connect
from kit.server import running_server
from measure import Subject, alternate, in_a_row, in_a_streak, timing
from report import Mark, Row, at_most
from setting import Setting

CONTAINERS = 250
STDOUT_BYTES = 1 << 30
STDIN_BYTES = 128 << 20
_STDIN_PIECE = 64 << 10
_WRITER = f"read x; exec dd if=/dev/zero bs=1M count={STDOUT_BYTES >> 20} 2>/dev/null"


def measure_garden(setting: Setting) -> Iterator[Row]:
    """A server of its own with a Garden door on a unix socket; `runc exec` and a bare sendfile loop as peers."""
    door = f"unix:/var/tmp/garden-bench-{os.getpid()}.sock"
    with running_server("--log-level", "info", "--garden-http", door):
        garden = GardenHttp(door)
        yield from _measure_processes(setting, garden)
        yield from _measure_queries(setting, garden)


def _measure_processes(setting: Setting, garden: GardenHttp) -> Iterator[Row]:
    runc, name = setting.runc, setting.runc.new_id()
    with garden.container() as handle, _bare_sender() as sender:
        runc.run_ms(name)
        try:
            subjects: dict[str, Subject] = {
                "garden": lambda: _run_ms(garden, handle),
                "runc": lambda: runc.exec_ms(name, "/bin/true"),
            }
            runs, streaks = (
                alternate({subject: so(act) for subject, act in subjects.items()}, rounds=setting.rounds)
                for so in (in_a_row, in_a_streak)
            )
        finally:
            runc.delete_ms(name)
        out = alternate(
            {"garden": lambda: _stdout_mb_s(garden, handle), "bare": lambda: _bare_mb_s(sender)},
            rounds=setting.throughput_rounds,
            warm_up=1,
        )
        into = alternate(
            {"garden": lambda: _stdin_mb_s(garden, handle)}, rounds=setting.throughput_rounds, warm_up=1
        )
    what, peer, marks = "Garden: run `true` → exit", "runc exec", (at_most(6),)
    yield Row(what, "ms", runs["garden"], peer, runs["runc"], marks)
    yield Row(f"{what}, 20 in a row", "ms", streaks["garden"], peer, streaks["runc"], marks)
    yield Row(
        "Garden: stdout",
        "MB/s",
        out["garden"],
        "bare sendfile",
        out["bare"],
        (Mark("value", 850, least=True),),
    )
    yield Row("Garden: stdin", "MB/s", into["garden"], marks=(Mark("value", 200, least=True),))


def _run_ms(garden: GardenHttp, handle: str) -> float:
    begin = time.perf_counter()
    process: HttpProcess = garden.run(handle, "true", sides=())
    if process.next_message()["exit_status"] != 0:
        raise RuntimeError("true is false")
    took_ms = (time.perf_counter() - begin) * 1e3
    process.leave()
    return took_ms


def _stdout_mb_s(garden: GardenHttp, handle: str) -> float:
    process: HttpProcess = garden.run(handle, "sh", "-c", _WRITER, sides=())
    sock, rest = process.open_side_socket("stdout")
    process.write("go\n")
    figure = _receive_mb_s(sock, STDOUT_BYTES - len(rest))
    if process.wait() != 0:
        raise RuntimeError("the writer failed")
    return figure


def _receive_mb_s(sock: socket.socket, expected: int) -> float:
    begin, buffer, received = time.perf_counter(), bytearray(1 << 20), 0
    with sock:
        while count := sock.recv_into(buffer):
            received += count
    if received != expected:
        raise RuntimeError(f"{received} bytes of {expected} came")
    return received / 1e6 / (time.perf_counter() - begin)


def _stdin_mb_s(garden: GardenHttp, handle: str) -> float:
    """JSON strings, as the protocol has it, encoded beforehand."""
    process: HttpProcess = garden.run(handle, "sh", "-c", "exec cat >/dev/null", sides=())
    piece = json.dumps({"process_id": process.id, "source": 0, "data": "x" * _STDIN_PIECE}).encode() + b"\n"
    begin = time.perf_counter()
    for _ in range(STDIN_BYTES // _STDIN_PIECE):
        process.control.sendall(piece)
    process.end_input()
    process.wait()
    return STDIN_BYTES / 1e6 / (time.perf_counter() - begin)


_SENDER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
print("ready", flush=True)
file = os.open(sys.argv[2], os.O_RDONLY)
while True:
    connection, _ = listener.accept()
    at = 0
    while sent := os.sendfile(connection.fileno(), file, at, 8 << 20):
        at += sent
    connection.close()
"""


@contextmanager
def _bare_sender() -> Iterator[str]:
    """A process that sends a file of STDOUT_BYTES to whoever connects, and does nothing else; its address."""
    place = Path(f"/var/tmp/garden-bench-sender-{os.getpid()}")
    place.mkdir()
    try:
        with (place / "file").open("wb") as file:
            for _ in range(STDOUT_BYTES >> 20):
                file.write(bytes(1 << 20))
        argv = [sys.executable, "-c", _SENDER, str(place / "socket"), str(place / "file")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as sender:
            assert sender.stdout is not None
            sender.stdout.readline()
            try:
                yield f"unix:{place}/socket"
            finally:
                sender.kill()
    finally:
        for name in ("file", "socket"):
            (place / name).unlink(missing_ok=True)
        place.rmdir()


def _bare_mb_s(address: str) -> float:
    return _receive_mb_s(connect(address), STDOUT_BYTES)


def _measure_queries(setting: Setting, garden: GardenHttp) -> Iterator[Row]:
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda _: garden.create(), range(CONTAINERS)))
        try:
            path = f"/containers/bulk_metrics?handles={','.join(handles)}"
            found = alternate(
                {
                    "info": timing(lambda: garden.info(handles[0])),
                    "list": timing(lambda: _require(len(garden.list()))),
                    "metrics": timing(lambda: _require(len(garden.json("GET", path)))),
                },
                rounds=setting.rounds,
            )
        finally:
            list(pool.map(garden.destroy, handles))
    yield Row("Garden: info", "ms", found["info"], marks=(at_most(1.5),))
    yield Row(f"Garden: list of {CONTAINERS}", "ms", found["list"], marks=(at_most(10),))
    yield Row(f"Garden: bulk metrics of {CONTAINERS}", "ms", found["metrics"], marks=(at_most(80),))


def _require(count: int) -> None:
    if count != CONTAINERS:
        raise RuntimeError(f"{count} containers answered, not {CONTAINERS}")
