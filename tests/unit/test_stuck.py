"""What is said of processes that do not end."""

from __future__ import annotations

import os
import subprocess
import sys

from garden_py.backend.host.pids import (
    Stuck,
    describe_stuck,
    read_session,
    read_start_time,
    read_stuck,
    read_wait_channel,
)

INIT = Stuck(100, "S", "zap_pid_ns_processes")


def writer(pid: int) -> Stuck:
    return Stuck(pid, "D", "percpu_rwsem_wait")


def test_process_that_holds_up_pid_1_is_named_instead_of_it() -> None:
    """PID 1 merely waits for it, and for all others that have ended but for their parent."""
    told = describe_stuck([INIT, Stuck(101, "Z", "0"), writer(102)], INIT.pid)
    assert told == "process 102 (state D, wait channel percpu_rwsem_wait) does not end"


def test_of_many_a_few_are_named() -> None:
    told = describe_stuck([INIT, *map(writer, range(200, 300))], INIT.pid)
    assert told.startswith("processes 200 (state D")
    assert told.endswith("203 (state D, wait channel percpu_rwsem_wait) and 96 more do not end")
    two = describe_stuck([INIT, writer(1), writer(2)], INIT.pid)
    where = "(state D, wait channel percpu_rwsem_wait)"
    assert two == f"processes 1 {where} and 2 {where} do not end"


def test_one_that_runs_is_named_if_none_sleeps() -> None:
    """It may be in the kernel for minutes, freeing its memory."""
    told = describe_stuck([INIT, Stuck(101, "R", "0")], INIT.pid)
    assert told == "process 101 (state R, wait channel 0) does not end"


def test_pid_1_is_named_if_nothing_else_is_left() -> None:
    told = describe_stuck([Stuck(100, "D", "")], 100)
    assert told == "PID 1 does not end: 100 (state D, wait channel unknown)"
    assert describe_stuck([], 100) == "its processes have just ended"


def test_process_that_is_gone_is_not_read() -> None:
    own = read_stuck(os.getpid())
    assert own is not None
    assert own.state in "RS"
    assert read_stuck(0) is None
    assert read_wait_channel(0) == "gone"


def test_tasks_are_read_whatever_they_are_called() -> None:
    """prctl(2), PR_SET_NAME: any bytes, here those that make no UTF-8, with what looks like the name's end in them."""
    script = "import ctypes; ctypes.CDLL(None).prctl(15, b') R \\xff\\x0b 1'); print(flush=True); input()"
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = read_stuck(child.pid)
        assert found is not None
        assert found.state in "SRD"
        assert read_start_time(child.pid)
        assert read_session(child.pid) == os.getsid(0)
        child.communicate(b"\n", timeout=20)
