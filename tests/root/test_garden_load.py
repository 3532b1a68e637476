"""Many clients at the Garden door at once, and many that never come to the point."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.garden import wait_until
from kit.garden_http import GardenHttp, connect
from kit.server import ServerProcess

pytestmark = pytest.mark.root
RUNS, IN_FLIGHT = 640, 16


def descriptors_of(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def test_runs_through_the_hijack_are_all_right(
    garden_http: GardenHttp, garden_http_server: ServerProcess
) -> None:
    """Every exit code and every byte; and no descriptor stays."""
    before = descriptors_of(garden_http_server)
    with garden_http.container() as handle, ThreadPoolExecutor(IN_FLIGHT) as pool:

        def run(number: int) -> tuple[int, bytes, bytes]:
            return garden_http.sh(handle, f"echo out {number}; echo err {number} >&2; exit {number % 256}")

        found = list(pool.map(run, range(RUNS)))
    expected = [(n % 256, f"out {n}\n".encode(), f"err {n}\n".encode()) for n in range(RUNS)]
    assert found == expected
    wait_until(lambda: descriptors_of(garden_http_server) <= before + 8, "the descriptors' return")


def test_clients_that_never_come_to_the_point_cost_nobody_anything(
    garden_http: GardenHttp, garden_http_server: ServerProcess
) -> None:
    """Half heads, runs that nobody reads, side connections that nobody asked for: the next caller is served."""
    with garden_http.container() as handle:
        before = private_bytes(garden_http_server)
        half = [connect(garden_http.address) for _ in range(800)]
        for sock in half:
            sock.sendall(b"GET /containers HTTP/1.1\r\nHost: a\r\nX-Half:")
        runs = [garden_http.run(handle, "sh", "-c", "cat; echo x", sides=()) for _ in range(100)]
        for process in runs:
            process.control.sendall(b'{"source":0,"data":"never ended')
        assert garden_http.text_of(handle, "echo served") == "served\n"
        assert private_bytes(garden_http_server) - before < 64 << 20
        for sock in half:
            sock.close()
        for process in runs:
            process.leave()
        # Their stdin has ended with them, and so have they.
        wait_until(lambda: not garden_http.info(handle)["ProcessIDs"], "the end of what was run")


def private_bytes(server: ServerProcess) -> int:
    lines = Path(f"/proc/{server.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) << 10
