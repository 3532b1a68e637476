"""The command line on a real server: terminals, signals, big streams, copies, and a server that is killed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.server import ServerProcess, running_server
from kit.terminal import DEADLINE_S, GARDEN, Terminal

pytestmark = pytest.mark.root


class Shell:
    """Runs `garden` against one server."""

    def __init__(self, address: str) -> None:
        self.environ = {**os.environ, "GARDEN_ADDRESS": address, "TERM": "xterm"}

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int = 0) -> str:
        done = subprocess.run(
            [*GARDEN, *arguments],
            input=stdin,
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
            env=self.environ,
        )
        assert done.returncode == code, done.stderr.decode()
        return done.stdout.decode()

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*GARDEN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environ,
            bufsize=0,  # communicate() would not see what readline() has read ahead
        )


@pytest.fixture
def garden(garden_server: ServerProcess) -> Shell:
    return Shell(garden_server.address)


@pytest.fixture
def handle(garden: Shell) -> Iterator[str]:
    made = garden("create", "--memory", "128M").strip()
    yield made
    garden("destroy", made)


def test_a_shell_on_a_terminal_has_its_size_and_follows_it(garden: Shell, handle: str) -> None:
    """What `garden run -it` is for; the exit code of the shell is ours."""
    terminal = Terminal(garden.environ, "run", "-it", handle, "sh")
    terminal.wait_for("[#$] ")
    terminal.type("stty size; echo $TERM\r")
    terminal.wait_for(r"33 99\r\nxterm")
    terminal.resize(44, 111)
    os.kill(terminal.process.pid, signal.SIGWINCH)
    terminal.wait_for("[#$] ")
    # The new size travels beside what is typed, so the shell is asked until it has arrived.
    terminal.type("until stty size | grep -q '44 111'; do sleep 0.1; done; echo resized''now; exit 7\r")
    terminal.wait_for("resizednow")
    assert terminal.end() == 7


def test_control_c_on_a_terminal_goes_to_the_program(garden: Shell, handle: str) -> None:
    """The shell survives what ends its child."""
    terminal = Terminal(garden.environ, "run", "-it", handle, "sh")
    terminal.wait_for("[#$] ")
    terminal.type("sh -c 'echo fore''ground; exec sleep 1000'\r")
    terminal.wait_for("foreground")
    terminal.type("\x03")
    terminal.wait_for("[#$] ")
    terminal.type("exit 5\r")
    assert terminal.end() == 5


def test_the_detach_keys_leave_the_process_running(garden: Shell, handle: str) -> None:
    """And attach finds it again."""
    terminal = Terminal(garden.environ, "run", "-it", "--id", "shell", handle, "sh")
    terminal.wait_for("[#$] ")
    terminal.type("\x10\x11")
    assert terminal.end() == 0
    again = Terminal(garden.environ, "attach", "-i", handle, "shell")
    again.type("echo still''here; exit 4\r")
    again.wait_for("stillhere")
    assert again.end() == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_without_a_terminal_are_passed_on(garden: Shell, handle: str, number: signal.Signals) -> None:
    """A supervisor that stops `garden run` stops the program, and sees how it took it."""
    script = "trap 'echo caught; exit 9' INT TERM HUP; echo ready; while :; do sleep 0.05; done"
    running = garden.begin("run", handle, "sh", "-c", script)
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(number)
    out, err = running.communicate(timeout=DEADLINE_S)
    assert (out, running.returncode) == (b"caught\n", 9), err


def test_a_reader_that_leaves_ends_the_program(garden: Shell, handle: str) -> None:
    """`garden run c yes | head -1` must not leave `yes` behind."""
    running = garden.begin("run", "--id", "yes", handle, "yes")
    assert running.stdout is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(DEADLINE_S) == 128 + signal.SIGPIPE
    (process,) = json.loads(garden("ps", handle, "-o", "json"))
    assert process["exit"]["signal"] == signal.SIGPIPE
    assert running.stderr is not None
    running.stderr.close()


def test_a_background_child_does_not_hold_run_up(garden: Shell, handle: str) -> None:
    """The program has exited and all it wrote is here, whoever else holds the pipe."""
    done = subprocess.run(
        [*GARDEN, "run", handle, "sh", "-c", "sleep 1000 & echo last words"],
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env=garden.environ,
    )
    assert (done.returncode, done.stdout) == (0, b"last words\n")
    assert b"still holds its output open" in done.stderr


def test_large_streams_arrive_whole_in_both_directions(garden: Shell, handle: str) -> None:
    """Bytes in, bytes out, nothing lost and nothing doubled."""
    data = os.urandom(1 << 20) * 40
    digest = hashlib.sha256(data).hexdigest()
    assert garden("run", "-i", handle, "sha256sum", stdin=data).split()[0] == digest
    done = subprocess.run(
        [*GARDEN, "run", "-i", handle, "cat"],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
        env=garden.environ,
    )
    assert hashlib.sha256(done.stdout).hexdigest() == digest


def test_copies_go_in_and_out(garden: Shell, handle: str, tmp_path: Path) -> None:
    """Whatever the tree holds comes back the same, owned by the user who asked."""
    source = tmp_path / "tree"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "random").write_bytes(os.urandom(3_000_000))
    (source / "script").write_text("#!/bin/sh\necho ran\n")
    (source / "script").chmod(0o755)
    (source / "link").symlink_to("script")
    garden("cp", str(source), f"{handle}:/opt")
    garden("cp", "--user", "nobody", str(source), f"{handle}:/tmp/owned")
    assert garden("run", handle, "/opt/script") + garden(
        "run", handle, "stat", "-c", "%U", "/tmp/owned/script"
    ) == ("ran\nnobody\n")
    garden("cp", f"{handle}:/opt", str(tmp_path / "copy"))
    assert subprocess.run(["diff", "-r", source, tmp_path / "copy"], check=False).returncode == 0
    garden("cp", f"{handle}:/nosuch", str(tmp_path), code=1)


@pytest.mark.parametrize("quiet", [False, True])
def test_copies_show_how_far_they_are_on_a_terminal(
    garden: Shell, handle: str, tmp_path: Path, quiet: bool
) -> None:
    """In and out, and the tar that goes to stdout is untouched; not at all if it is not wanted."""
    (tmp_path / "large").write_bytes(os.urandom(5_000_000))
    flags = ["--quiet"] if quiet else []
    for arguments in (
        ["cp", *flags, str(tmp_path / "large"), f"{handle}:/srv"],
        ["cp", *flags, f"{handle}:/srv", str(tmp_path / "back")],
        ["cp", *flags, f"{handle}:/srv", "-"],
    ):
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "rb", buffering=0) as terminal, (tmp_path / "stdout").open("w+b") as stdout:
            environ = {**garden.environ, "COLUMNS": "120"}
            running = subprocess.Popen([*GARDEN, *arguments], stdout=stdout, stderr=theirs, env=environ)
            os.close(theirs)
            shown = _read_to_its_end(terminal)
            assert running.wait(DEADLINE_S) == 0
            size = stdout.seek(0, os.SEEK_END)
        assert (b"5.0" in shown and b"MB" in shown) is not quiet
        assert (size > 5_000_000) is (arguments[-1] == "-")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()


def _read_to_its_end(terminal: io.RawIOBase) -> bytes:
    shown = b""
    while True:
        try:
            shown += terminal.read(65536) or b""
        except OSError:  # EIO: nobody writes there any more, pty(7)
            return shown


def test_a_foreground_run_survives_the_death_of_the_server(tmp_path: Path) -> None:
    """SIGKILL in the middle of its output: the command line waits for the next server and misses no byte."""
    with running_server() as server:
        garden = Shell(server.address)
        handle = garden("create").strip()
        script = "i=0; while [ $i -lt 200000 ]; do echo line $i; i=$((i+1)); done; exit 6"
        running = garden.begin("run", handle, "sh", "-c", script)
        assert running.stdout is not None
        first = running.stdout.readline()
        server.kill()
        server.start()
        rest, err = running.communicate(timeout=60)
        assert first + rest == b"".join(b"line %d\n" % number for number in range(200_000))
        assert running.returncode == 6, err


def test_the_detach_keys_are_heard_while_there_is_no_server() -> None:
    """With the terminal raw nothing else gets one out, and what was typed before waits for a server."""
    with running_server() as server:
        shell = Shell(server.address)
        handle = shell("create").strip()
        terminal = Terminal(shell.environ, "run", "-it", handle, "sh")
        terminal.wait_for("[#$] ")
        server.kill()
        terminal.type("echo into the void\r")
        time.sleep(0.5)
        terminal.type("\x10\x11")
        # Not the failure that it ends with when it has looked for the server in vain.
        assert terminal.end() == 0
        assert "detached" in terminal.seen
        server.start()


def test_doctor_finds_this_host_able(tmp_path: Path) -> None:
    """The tests of this directory make containers here, so nothing may be FAIL; and trials leave nothing."""
    done = subprocess.run(
        [*GARDEN, "doctor", "--json", "--state-dir", str(tmp_path / "state")],
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    findings = json.loads(done.stdout)
    assert [finding for finding in findings if finding["level"] == "FAIL"] == []
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_that_hangs_up_is_no_trace_of_python(garden: Shell, handle: str, tmp_path: Path) -> None:
    """Neither by the thread that reads it nor when its mode shall be as before; the process has got HUP."""
    ours, theirs = pty.openpty()
    with (tmp_path / "err").open("wb") as err:
        argv = [*GARDEN, "run", "-it", handle, "sh", "-c", "echo ready; while :; do sleep 0.1; echo x; done"]
        process = subprocess.Popen(
            argv, stdin=theirs, stdout=theirs, stderr=err, env=garden.environ, start_new_session=True
        )
    os.close(theirs)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(DEADLINE_S) == 1
    assert "Traceback" not in (tmp_path / "err").read_text()
