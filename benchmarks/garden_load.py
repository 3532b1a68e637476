"""Much at once through the Garden door: runs, and creates and destroys beside many containers and attached clients."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kit.garden_http import GardenHttp, HttpProcess
from kit.server import ServerProcess, running_server
from measure import Samples, timed_ms
from report import Row
from setting import Setting

RUNS, RUNS_IN_FLIGHT = 2000, 16
LIVING, ATTACHED, IN_FLIGHT = 250, 100, 32
_POOL = "10.216.0.0/22"  # room for LIVING + IN_FLIGHT, which the pool of a test's server has not


def measure_garden_load(setting: Setting) -> Iterator[Row]:
    """A server of its own. Anything but speed that is wrong fails: an exit code, a byte, a missing container."""
    door = f"unix:/var/tmp/garden-load-{os.getpid()}.sock"
    with running_server("--log-level", "info", "--garden-http", door, network_pool=_POOL) as server:
        garden = GardenHttp(door)
        yield from _measure_runs(garden)
        with _living(garden) as writers:
            yield from _measure_churn(garden, server, rounds=setting.throughput_rounds)
            _require_output(writers)


def _measure_runs(garden: GardenHttp) -> Iterator[Row]:
    with garden.container() as handle, ThreadPoolExecutor(RUNS_IN_FLIGHT) as pool:

        def run(number: int) -> None:
            found = garden.sh(handle, f"echo out {number}; echo err {number} >&2; exit {number % 256}")
            if found != (number % 256, f"out {number}\n".encode(), f"err {number}\n".encode()):
                raise RuntimeError(f"run {number} gave {found}")

        took_ms = timed_ms(lambda: list(pool.map(run, range(RUNS))))
    yield Row(
        f"Garden: {RUNS} runs of a shell, {RUNS_IN_FLIGHT} in flight", "/s", Samples((RUNS / took_ms * 1e3,))
    )


@contextmanager
def _living(garden: GardenHttp) -> Iterator[list[HttpProcess]]:
    """Containers; some have a process that writes until it is told to stop, with a client attached to it."""
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda _: garden.create(), range(LIVING)))
    script = "(while sleep 0.2; do echo tick; done) & read stop; kill $!; echo last"
    yield [garden.run(handle, "sh", "-c", script, sides=("stdout",)) for handle in handles[:ATTACHED]]


def _require_output(writers: list[HttpProcess]) -> None:
    for writer in writers:
        writer.write("stop\n")
    for writer in writers:
        writer.wait()
        *ticks, last = writer.stdout.split()
        if last != b"last" or set(ticks) != {b"tick"}:
            raise RuntimeError(f"an attached client got {writer.stdout[-100:]!r}")


def _measure_churn(garden: GardenHttp, server: ServerProcess, *, rounds: int) -> Iterator[Row]:
    took: dict[str, list[list[float]]] = {"create": [], "destroy": []}
    memory: list[float] = []

    def timed(act: Callable[[], object], into: list[float]) -> None:
        into.append(timed_ms(act))

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for number in range(rounds):
            creates: list[float] = []
            destroys: list[float] = []
            handles = [f"load-{number}-{index}" for index in range(IN_FLIGHT)]
            list(pool.map(lambda h, into=creates: timed(lambda: garden.create(handle=h), into), handles))
            if len(garden.list()) != LIVING + IN_FLIGHT:
                raise RuntimeError("a container is missing")
            list(pool.map(lambda h, into=destroys: timed(lambda: garden.destroy(h), into), handles))
            took["create"].append(creates)
            took["destroy"].append(destroys)
            memory.append(_private_mib(server))
    beside = f"{IN_FLIGHT} in flight beside {LIVING}, {ATTACHED} attached"
    for verb, found in took.items():
        yield Row(f"Garden: {verb}, {beside}", "ms", Samples(tuple(ms for each in found for ms in each)))
        yield Row(f"Garden: {verb}, {beside}: p95 of a round", "ms", Samples(tuple(map(_p95, found))))
    growth = [later - memory[0] for later in memory[1:] or memory]
    yield Row("Garden: server's private memory, growth since the first round", "MiB", Samples(tuple(growth)))


def _p95(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=20)[-1]


def _private_mib(server: ServerProcess) -> float:
    time.sleep(0.5)  # the last destroys' background work
    lines = Path(f"/proc/{server.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
