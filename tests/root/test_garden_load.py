"""Many clients at the Garden door at once, and many that never come to the point."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from garden_image import garden_door_of, garden_server_with
from kit.garden import wait_until
from kit.garden_http import GardenHttp, HttpProcess, build_head, connect
from kit.patience import FACTOR
from kit.server import ServerProcess

pytestmark = pytest.mark.root
RUNS, IN_FLIGHT = 2000, 16
LIVING, ATTACHED, CREATES, CREATES_IN_FLIGHT = 20, 10, 24, 8  # in full: benchmarks/run --only garden_load
FAST_MIB = 150  # more than is kept of a stream (--output-retention-bytes)
HEADS, RUNNING = (
    1000,
    100,
)  # of each kind of client that never comes to the point: without a process, and with one


@pytest.fixture(scope="module")
def server(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that waits three seconds for a request's head."""
    with garden_server_with(tmp_path_factory.mktemp("garden"), "--read-header-timeout", "3s") as server:
        yield server


@pytest.fixture(scope="module")
def garden(server: ServerProcess) -> GardenHttp:
    return GardenHttp(garden_door_of(server))


def descriptors_of(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def private_bytes(server: ServerProcess) -> int:
    lines = Path(f"/proc/{server.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) << 10


@pytest.fixture(scope="module")
def box(garden: GardenHttp) -> Iterator[str]:
    with garden.container() as handle:
        yield handle


def test_runs_through_the_hijack_are_all_right(garden: GardenHttp, server: ServerProcess, box: str) -> None:
    """Every exit code and every byte; and no descriptor stays."""
    before = descriptors_of(server)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:

        def run(number: int) -> tuple[int, bytes, bytes]:
            return garden.sh(box, f"echo out {number}; echo err {number} >&2; exit {number % 256}")

        found = list(pool.map(run, range(RUNS)))
    expected = [(n % 256, f"out {n}\n".encode(), f"err {n}\n".encode()) for n in range(RUNS)]
    assert found == expected
    wait_until(lambda: descriptors_of(server) <= before + 8, "the descriptors' return")


@pytest.mark.parametrize("late_s", [0.1, 1.0])
def test_side_connection_that_comes_late_gets_all_of_it(garden: GardenHttp, box: str, late_s: float) -> None:
    """It can be asked for only when the answer has got to the client, and the process does not wait for that."""
    process = garden.run(box, "dd", "if=/dev/zero", "bs=1M", f"count={FAST_MIB}", sides=())
    time.sleep(late_s)
    sock, first = process.open_side_socket("stdout")
    with sock:
        count = len(first)
        while piece := sock.recv(1 << 20):
            count += len(piece)
    assert count == FAST_MIB << 20
    assert process.wait() == 0


def test_process_waits_for_no_side_connection_that_never_comes(garden: GardenHttp, box: str) -> None:
    """Not longer than one may take that does (attachments.SIDE_WAIT_S)."""
    process = garden.run(box, "dd", "if=/dev/zero", "bs=1M", f"count={FAST_MIB}", sides=())
    assert process.wait() == 0


def test_what_a_side_connection_has_missed_is_logged(
    garden: GardenHttp, server: ServerProcess, box: str
) -> None:
    """One that comes later than the process waits begins at what is kept, and nobody takes that for all of it."""
    process = garden.run(box, "dd", "if=/dev/zero", "bs=1M", f"count={FAST_MIB}", sides=())
    assert process.wait() == 0
    sock, first = process.open_side_socket("stdout")
    with sock:
        count = len(first)
        while piece := sock.recv(1 << 20):
            count += len(piece)
    (told,) = [json.loads(line) for line in server.log().splitlines() if "garden.output_skipped" in line]
    assert (told["process_id"], told["stream"]) == (process.id, "stdout")
    assert 0 < told["bytes"] == (FAST_MIB << 20) - count


def test_creates_and_destroys_beside_many_others(garden: GardenHttp, server: ServerProcess, box: str) -> None:
    """Others live and clients are attached to their output: no error, all output whole, memory is given back."""
    living = [garden.create() for _ in range(LIVING)]
    writers = [
        garden.run(living[n], "sh", "-c", "read go; seq 1 2000", sides=("stdout",)) for n in range(ATTACHED)
    ]
    before = private_bytes(server)
    with ThreadPoolExecutor(CREATES_IN_FLIGHT) as pool:
        made = list(pool.map(lambda _: garden.create(), range(CREATES)))
        for writer in writers:
            writer.write("go\n")
        list(pool.map(garden.destroy, made))
        assert [writer.wait() for writer in writers] == [0] * ATTACHED
        assert all(writer.stdout.split() == [b"%d" % n for n in range(1, 2001)] for writer in writers)
        assert sorted(garden.list()) == sorted([box, *living])
        list(pool.map(garden.destroy, living))
    assert private_bytes(server) - before < 16 << 20


def never_finish_the_head(garden: GardenHttp, box: str) -> list[socket.socket]:
    found = [connect(garden.address) for _ in range(HEADS)]
    for sock in found:
        sock.sendall(b"GET /containers HTTP/1.1\r\nHost: a\r\nX-Half:")
    return found


def never_finish_the_body(garden: GardenHttp, box: str) -> list[socket.socket]:
    found = [connect(garden.address) for _ in range(HEADS)]
    for sock in found:
        sock.sendall(build_head("POST", f"/containers/{box}/processes", length=100) + b'{"path":')
    return found


def never_read_the_reply(garden: GardenHttp, box: str) -> list[socket.socket]:
    """More requests behind each other than the socket holds replies for."""
    found = [connect(garden.address) for _ in range(RUNNING)]
    for sock in found:
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(build_head("GET", "/capacity") * 50)
    return found


def start(garden: GardenHttp, box: str, script: str) -> list[HttpProcess]:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return list(pool.map(lambda _: garden.run(box, "sh", "-c", script, sides=()), range(RUNNING)))


def never_end_a_message(garden: GardenHttp, box: str) -> list[socket.socket]:
    found = start(garden, box, "cat; echo x")
    for process in found:
        process.control.sendall(b'{"source":0,"data":"never ended')
    return [process.control for process in found]


def never_end_their_input(garden: GardenHttp, box: str) -> list[socket.socket]:
    found = start(garden, box, "cat >/dev/null; echo x")
    for process in found:
        process.write("x" * 1000)
    return [process.control for process in found]


def never_open_a_side(garden: GardenHttp, box: str) -> list[socket.socket]:
    """Of processes that write more than a pipe holds, and go on."""
    return [each.control for each in start(garden, box, "head -c 200000 /dev/zero; cat")]


def never_read_a_side(garden: GardenHttp, box: str) -> list[socket.socket]:
    found = start(garden, box, "head -c 2000000 /dev/zero; cat")
    sides = [process.open_side_socket("stdout")[0] for process in found]
    return [*sides, *(process.control for process in found)]


def half_close(garden: GardenHttp, box: str) -> list[socket.socket]:
    """The way to the server is closed, which is what it sees of a client that has left; the way back stays open."""
    found = start(garden, box, "cat")
    for process in found:
        process.control.shutdown(socket.SHUT_WR)
    return [process.control for process in found]


@pytest.mark.parametrize(
    ("begin", "server_ends_them"),
    [
        (never_finish_the_head, True),
        (never_finish_the_body, False),
        (never_read_the_reply, False),
        (never_end_a_message, False),
        (never_end_their_input, False),
        (never_open_a_side, False),
        (never_read_a_side, False),
        (half_close, True),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_clients_that_never_come_to_the_point_cost_nobody_anything(
    garden: GardenHttp,
    server: ServerProcess,
    box: str,
    begin: Callable[[GardenHttp, str], list[socket.socket]],
    server_ends_them: bool,
) -> None:
    """The next caller is served, memory is bounded, and all is given back: in time, or when the client has gone."""
    garden.text_of(box, "true")
    descriptors, memory = descriptors_of(server), private_bytes(server)
    clients = begin(garden, box)
    assert garden.text_of(box, "echo served") == "served\n"
    assert private_bytes(server) - memory < 64 << 20
    for sock in clients:
        if server_ends_them:
            sock.settimeout(60 * FACTOR)
            while sock.recv(65536):
                pass
        sock.close()
    # Their stdin has ended with them, and so have the processes.
    wait_until(lambda: not garden.info(box)["ProcessIDs"], "the end of what was run", 60)
    wait_until(lambda: descriptors_of(server) <= descriptors + 8, "the descriptors' return", 60)
