"""Bad neighbours: how long a process of one container takes while another does its worst within sane limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cell import Cell, ping_ms
from measure import Samples
from report import Row, at_most, ratio_at_most
from setting import Setting

from garden_py.client import Container, ContainerSpec, Limits, ProcessSpec

RUNS = 20
_SETTLE_S = 0.5
_MIB = 1 << 20
# Of every attacker. A tenth of the default weight: what is not known to be good gets the processors when others rest.
# And a quota of half a processor: part of what the kernel does for packets and for tasks that come and go is outside of
# any weight, and only a quota bounds how much of it there is. Without one, p95 was 4 to 12 times the quiet one.
LIMITS = Limits(memory_bytes=128 * _MIB, pids=100, cpu_weight=10, cpu_quota_us=50_000)
# Packets are received in softirq, for whoever happens to run: only a limit on bandwidth bounds how many there are.
_SENDER_LIMITS = replace(LIMITS, network_tx_bytes_per_s=50 * _MIB)
_WRITER_LIMITS = replace(LIMITS, io_write_bytes_per_s=20 * _MIB, io_read_bytes_per_s=20 * _MIB)
_QUIET = "the same, neighbour idle"
# The agent's own interpreter, the only one in an image of busybox that has threads, and goes on when fork(2) fails.
_PYTHON = (
    'b=$(echo /dev/.garden/*); exec $b/lib/ld-linux-*.so.* --library-path $b/lib $b/python3 -I -S -B -c "$0"'
)
_FORKS = """
import os
while True:
    try:
        if os.fork() == 0 and os.getpid() % 2:
            os._exit(0)
        os.waitpid(-1, os.WNOHANG)
    except OSError:
        pass
"""
_THREADS = """
import _thread, time
while True:
    try:
        _thread.start_new_thread(time.sleep, (0.01,))
    except RuntimeError:
        pass
"""


@dataclass(frozen=True, slots=True)
class Attack:
    """What a container does to the others.

    Attributes:
        argv: of the process that does it.
        copies: how many of them run.
        needs_sink: the container that the traffic goes to is given as the last argument.
    """

    name: str
    argv: tuple[str, ...]
    limits: Limits = LIMITS
    copies: int = 1
    needs_sink: bool = False


def _sh(script: str, *args: str) -> tuple[str, ...]:
    return ("sh", "-c", script, *args)


ATTACKS = (
    Attack("fork bomb", _sh(_PYTHON, _FORKS)),
    Attack("memory bomb", _sh("while :; do tail /dev/zero; done"), copies=4),
    Attack("thread bomb", _sh(_PYTHON, _THREADS), copies=2),
    Attack("CPU hog", _sh("while :; do :; done"), copies=8),
    Attack(
        "disk writer",
        _sh("while :; do dd if=/dev/zero of=/$$ bs=1M count=64 conv=fsync status=none; done"),
        _WRITER_LIMITS,
        copies=4,
    ),
    Attack(
        "network flood",
        _sh("while :; do nc $0 9999 </dev/zero >/dev/null; done"),
        _SENDER_LIMITS,
        copies=4,
        needs_sink=True,
    ),
)


def measure_noisy(setting: Setting) -> Iterator[Row]:
    """The same process again and again, quiet and under each attack in turns; and whether the server answers."""
    cell = setting.cell
    with cell.container() as victim:
        cell.run_ms(victim, "true")
        for attack in ATTACKS:
            quiet, noisy, pings = _under(cell, victim, attack, setting.throughput_rounds)
            what = f"run `true` → exit beside a {attack.name}"
            yield Row(what, "ms", _medians(noisy), _QUIET, _medians(quiet), (ratio_at_most(3),))
            yield Row(f"{what}: p95", "ms", _p95(noisy), _QUIET, _p95(quiet), (ratio_at_most(3),))
            yield Row(f"Ping beside a {attack.name}: worst", "ms", _worst(pings), marks=(at_most(1000),))


def _under(
    cell: Cell, victim: str, attack: Attack, rounds: int
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Batches of runs without and with the attack, and of pings with it."""
    quiet, noisy, pings = [], [], []
    for _ in range(rounds):
        quiet.append([cell.run_ms(victim, "true") for _ in range(RUNS)])
        with _attacked(cell, attack) as attacker:
            time.sleep(_SETTLE_S)
            batch, asked = [], []
            for _ in range(RUNS):
                batch.append(cell.run_ms(victim, "true"))
                asked.append(ping_ms(cell.stub))
            if attacker.metrics().pids <= 1:  # the agent alone
                raise RuntimeError(f"the {attack.name} has ended by itself")
            noisy.append(batch)
            pings.append(asked)
    return quiet, noisy, pings


@contextmanager
def _attacked(cell: Cell, attack: Attack) -> Iterator[Container]:
    with cell.client.create(ContainerSpec(limits=attack.limits)) as attacker:
        if attack.needs_sink:
            with cell.client.create(ContainerSpec(limits=attack.limits)) as sink:
                sink.start(ProcessSpec("nc", ("-ll", "-p", "9999", "-e", "sh", "-c", "cat >/dev/null")))
                _start(attacker, attack, sink.info().container_ip)
                yield attacker
        else:
            _start(attacker, attack)
            yield attacker


def _start(attacker: Container, attack: Attack, *more: str) -> None:
    path, *args = (*attack.argv, *more)
    for _ in range(attack.copies):
        attacker.start(ProcessSpec(path, tuple(args)))


def _medians(batches: list[list[float]]) -> Samples:
    return Samples(tuple(statistics.median(batch) for batch in batches))


def _p95(batches: list[list[float]]) -> Samples:
    """The largest but one of each batch of 20."""
    return Samples(tuple(sorted(batch)[-max(1, len(batch) // 20) - 1] for batch in batches))


def _worst(batches: list[list[float]]) -> Samples:
    return Samples(tuple(max(batch) for batch in batches))
