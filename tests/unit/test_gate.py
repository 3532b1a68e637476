"""The gate before exec: opened once it is recorded, and asked for limits that only the host can give."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys

import pytest

from garden_py.backend.host.rlimits import read_own_limit, set_limits
from garden_py.backend.streams.gate import Gate
from garden_py.wire import ASK_LIMITS, LIMITS_RAISED, LIMITS_REFUSED


async def read(fd: int) -> bytes:
    """What a child reads from its end, without holding up the gate."""
    return await asyncio.to_thread(os.read, fd, 1)


async def test_a_pipe_lets_go_when_it_is_recorded() -> None:
    order: list[str] = []
    with Gate(lambda: order.append("recorded")) as gate:
        gate.open()
        assert os.read(gate.child_end, 2) == b"\n"
        assert os.read(gate.child_end, 1) == b""
    assert order == ["recorded"]


@pytest.mark.parametrize("asks_first", [True, False])
async def test_limits_are_raised_for_who_asks_and_after_it_is_recorded(asks_first: bool) -> None:
    order: list[object] = []
    with Gate(lambda: order.append("recorded"), order.append) as gate:
        if asks_first:
            os.write(gate.child_end, ASK_LIMITS)
        gate.open()
        if not asks_first:
            os.write(gate.child_end, ASK_LIMITS)
        assert [await read(gate.child_end), await read(gate.child_end)] == [b"\n", LIMITS_RAISED]
    assert order == ["recorded", os.getpid()]


async def test_a_limit_that_cannot_be_raised_is_refused() -> None:
    def refuse(pid: int) -> None:
        raise PermissionError

    with Gate(lambda: None, refuse) as gate:
        gate.open()
        os.write(gate.child_end, ASK_LIMITS)
        assert [await read(gate.child_end), await read(gate.child_end)] == [b"\n", LIMITS_REFUSED]


async def test_what_is_not_recorded_does_not_run_and_is_given_nothing() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    asked: list[int] = []
    with Gate(full, asked.append) as gate:
        os.write(gate.child_end, ASK_LIMITS)
        gate.open()
        with pytest.raises(
            ConnectionResetError
        ):  # its question was not read; a child takes it for the end as well
            await read(gate.child_end)
        assert isinstance(gate.failure, OSError)
    assert asked == []


async def test_only_the_first_question_is_answered() -> None:
    asked: list[int] = []
    with Gate(lambda: None, asked.append) as gate:
        gate.open()
        os.write(gate.child_end, ASK_LIMITS)
        assert [await read(gate.child_end), await read(gate.child_end)] == [b"\n", LIMITS_RAISED]
        os.write(gate.child_end, ASK_LIMITS * 100)
        child = os.dup(gate.child_end)
    assert asked == [os.getpid()]
    os.close(child)


async def test_the_kernel_says_who_asks() -> None:
    asked: list[int] = []
    answered = asyncio.Event()

    def note(pid: int) -> None:
        asked.append(pid)
        answered.set()

    with Gate(lambda: None, note) as gate:
        gate.open()
        script = f"import os; os.write({gate.child_end}, b'?'); input()"
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, pass_fds=[gate.child_end], stdin=subprocess.PIPE
        )
        try:
            await answered.wait()
            assert asked == [child.pid]
        finally:
            await child.communicate(b"\n")


def test_limits_of_another_process_are_set() -> None:
    soft, hard = read_own_limit("core")
    child = subprocess.Popen(["sleep", "100"])
    try:
        set_limits(child.pid, [("core", 7), ("locks", 9)], beside=os.getpid())
        assert resource.prlimit(child.pid, resource.RLIMIT_CORE) == (7, 7)
        with pytest.raises(PermissionError):
            set_limits(child.pid, [("nofile", 1 << 62)], beside=os.getpid())
    finally:
        child.kill()
        child.wait()
    assert read_own_limit("core") == (soft, hard)
    with pytest.raises(ProcessLookupError):
        set_limits(child.pid, [("core", 7)], beside=os.getpid())
