"""How processes have ended that are not the server's children."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from garden_py.backend.host.pids import describe_exit, read_exit_status


@contextmanager
def child(act: int) -> Iterator[tuple[int, int]]:
    """(pidfd, pid) of a child that ends by a signal, or with a status if that is negative; reaped in the end."""
    pid = os.fork()
    if pid == 0:
        if act < 0:
            os._exit(-act)
        os.kill(os.getpid(), act)
    pidfd = os.pidfd_open(pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        yield pidfd, pid
    finally:
        os.waitpid(pid, 0)
        os.close(pidfd)


@pytest.mark.parametrize(
    ("act", "words"),
    [(signal.SIGKILL, "was ended by signal 9 (SIGKILL)"), (-7, "has exited with status 7")],
)
def test_a_zombie_tells_how_it_ended(act: int, words: str) -> None:
    with child(act) as (pidfd, pid):
        status = read_exit_status(pidfd, pid)
        assert status is not None
        assert describe_exit(status) == words


def test_what_runs_has_no_status() -> None:
    pidfd = os.pidfd_open(os.getpid())
    assert read_exit_status(pidfd, os.getpid()) is None
    os.close(pidfd)


def test_real_time_signals_have_no_name() -> None:
    assert describe_exit(signal.SIGRTMIN + 3) == f"was ended by signal {signal.SIGRTMIN + 3}"
