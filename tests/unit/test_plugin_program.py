"""An external program is run to its end, or ended with all that it has started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.garden import wait_until
from kit.patience import FACTOR

from garden_py.backend.plugin import program
from garden_py.backend.plugin.program import STDERR_TAIL_BYTES, STDOUT_MAX_BYTES, Ended, run_program
from garden_py.model.errors import HostFault

_PATIENCE_S = 30 * FACTOR


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def run(script: str, *, stdin: bytes = b"", timeout_s: float = _PATIENCE_S, caller: int = -1) -> Ended:
    fd = os.memfd_create("input")
    os.write(fd, stdin)
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        with pipe() as (reading, _):
            argv = [sys.executable, "-c", script]
            return run_program(argv, stdin=fd, caller=reading if caller < 0 else caller, timeout_s=timeout_s)
    finally:
        os.close(fd)


def test_both_outputs_and_the_status_come_back() -> None:
    script = "import sys; print('out', sys.stdin.read()); print('err', file=sys.stderr); sys.exit(3)"
    assert run(script, stdin=b"in") == Ended(3, "out in\n", "err\n")


def test_a_signal_is_a_status_below_zero() -> None:
    ended = run("import os; os.kill(os.getpid(), 9)")
    assert (ended.status, ended.how) == (-signal.SIGKILL, "killed by signal 9")


def test_what_is_not_text_is_shown_as_such() -> None:
    assert run(r"import os; os.write(1, b'a\xffb')").stdout == "a\N{REPLACEMENT CHARACTER}b"


def test_input_may_be_more_than_a_pipe_holds() -> None:
    assert (
        run("import sys; print(len(sys.stdin.buffer.read()))", stdin=b"x" * (2 << 20)).stdout
        == f"{2 << 20}\n"
    )


def test_a_program_that_is_not_there_is_a_fault() -> None:
    said = "/no/such: cannot be run: No such file or directory"
    with pipe() as (reading, _), open(os.devnull, "rb") as null, pytest.raises(HostFault, match=said):
        run_program(["/no/such"], stdin=null.fileno(), caller=reading, timeout_s=1)


def test_all_that_fits_is_kept_and_more_is_too_much() -> None:
    ended = run(f"import os; os.write(1, b'x' * {STDOUT_MAX_BYTES})")
    assert (len(ended.stdout), ended.gave_up) == (STDOUT_MAX_BYTES, "")
    assert "more than" in run(f"import os; os.write(1, b'x' * {STDOUT_MAX_BYTES + 1})").gave_up


def test_of_a_long_log_the_end_is_kept() -> None:
    ended = run("import sys; sys.stderr.write('a' * 1000000 + 'the end')")
    assert len(ended.stderr) == STDERR_TAIL_BYTES
    assert ended.stderr.endswith("the end")


def test_one_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    script = f"""
import os, time
pid = os.fork()
if pid:
    open({str(note)!r}, "w").write(str(pid))
time.sleep(600)
"""
    ended = run(script, timeout_s=2 * FACTOR)
    assert "did not end in" in ended.gave_up
    assert ended.status == -signal.SIGKILL
    wait_until(lambda: not is_alive(int(note.read_text())), "the child has ended too")


def test_one_that_writes_without_a_pause_is_killed_in_time_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is always something to read; that must not put off the end."""
    monkeypatch.setattr(program._Watch, "_read", lambda self, fd: True)  # so there is
    ended = run("import os, time; os.write(2, b'x'); time.sleep(600)", timeout_s=1)
    assert "did not end in 1 s" in ended.gave_up


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_one_that_nobody_waits_for_is_killed() -> None:
    """The other end of the caller's pipe is closed, also by the caller's death."""
    reading, writing = os.pipe()
    os.close(writing)
    try:
        ended = run("import time; time.sleep(600)", caller=reading)
    finally:
        os.close(reading)
    assert ended.gave_up == "nobody waits for it any more"
    assert ended.status == -signal.SIGKILL


def test_a_child_that_stays_is_not_waited_for(tmp_path: Path) -> None:
    """A daemon that a plugin starts may keep the pipes for ever."""
    note = tmp_path / "child"
    script = f"""
import os, time
print("done", flush=True)
pid = os.fork()
if pid == 0:
    time.sleep(600)
open({str(note)!r}, "w").write(str(pid))
"""
    try:
        assert run(script) == Ended(0, "done\n", "")
        assert is_alive(int(note.read_text()))
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)
