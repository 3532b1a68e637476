"""Processes in real containers: who they are, what they see, how they end."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of, matching
from kit.garden import PATIENCE, code_of, sh, text_of, wait_until

from garden_py.client import (
    AlreadyExists,
    Container,
    ContainerSpec,
    FailedPrecondition,
    GardenClient,
    GardenError,
    InvalidArgument,
    Limits,
    NotFound,
    Stream,
    Tty,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def people(garden: GardenClient) -> Container:
    """A container with users and groups made at run time, as images have them."""
    container = garden.create(ContainerSpec(env={"FROM": "container", "BOTH": "container"}))
    text_of(
        container,
        "echo 'alice:x:1001:1010:Alice:/home/alice:/bin/sh' >>/etc/passwd;"
        "echo 'staff:x:50:' >>/etc/group; echo 'crew:x:1011:alice' >>/etc/group; echo 'alice:x:1010:' >>/etc/group;"
        "mkdir -p /home/alice; chown 1001:1010 /home/alice",
    )
    return container


# --- users


@pytest.mark.parametrize(
    ("user", "identity"),
    [
        ("", "0 0 0 /root root"),
        ("root", "0 0 0 /root root"),
        ("alice", "1001 1010 1010 1011 /home/alice alice"),
        ("1001", "1001 1010 1010 1011 /home/alice 1001"),
        ("alice:staff", "1001 50 50 /home/alice alice:staff"),
        ("1234:5678", "1234 5678 5678 / 1234:5678"),
        ("4321", "4321 0 0 / 4321"),
    ],
)
def test_user_is_resolved_inside_the_container(people: Container, user: str, identity: str) -> None:
    """From the container's own files, as they are now; numbers need no entry."""
    assert text_of(people, "echo $(id -u) $(id -g) $(id -G) $HOME $USER", user=user) == f"{identity}\n"


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("stranger", "unable to find user stranger: no matching entries in passwd file"),
        ("alice:nogrp", "unable to find group nogrp: no matching entries in group file"),
    ],
)
def test_unknown_user_is_an_error_of_its_own(people: Container, user: str, message: str) -> None:
    """Not an exit code, and the text that clients of the classic server look for."""
    with pytest.raises(NotFound, match=message) as refused:
        people.run(["true"], user=user)
    assert refused.value.code == "USER_NOT_FOUND"


def test_a_user_id_that_the_container_has_not_is_told(people: Container) -> None:
    """Its ids are 0 to 65535."""
    with pytest.raises(InvalidArgument, match=r"user 70000 .* the container has no such ids"):
        people.run(["true"], user="70000")


# --- environment and directory


def test_environment_is_merged_in_order(people: Container) -> None:
    """The container's, then the process's, then the defaults that nobody has stated; nothing else."""
    process = people.run(["env"], env={"OWN": "process", "BOTH": "process"}).output()
    lines = process.stdout.decode().splitlines()
    assert [line for line in lines if not line.startswith(("PATH=", "USER=", "HOME="))] == [
        "FROM=container",
        "BOTH=process",
        "OWN=process",
    ]
    assert {line for line in lines if line.startswith(("PATH=", "USER=", "HOME="))} == {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "USER=root",
        "HOME=/root",
    }


def test_stated_variables_win_over_defaults(people: Container) -> None:
    """PATH decides where a program without a slash is found."""
    stated = {"HOME": "/tmp", "USER": "me", "PATH": "/bin"}
    assert text_of(people, "echo $HOME $USER $PATH $(pwd)", env=stated) == "/tmp me /bin /root\n"
    people.write_file("/opt/only-here", b"#!/bin/sh\necho found", mode=0o755)
    with pytest.raises(NotFound) as refused:
        people.run(["only-here"])
    assert refused.value.code == "EXECUTABLE_NOT_FOUND"
    assert people.run(["only-here"], env={"PATH": "/opt"}).output().stdout == b"found\n"


def test_directory_is_made_for_the_user(people: Container) -> None:
    """All levels, owned by the process's user, also where that user may not write."""
    text_of(people, "mkdir -p /closed && chmod 0555 /closed")
    script = "pwd; touch here; stat -c '%u %g %a' ."
    assert text_of(people, script, dir="/closed/a/b", user="alice") == "/closed/a/b\n1001 1010 755\n"
    assert text_of(people, "pwd", user="alice") == "/home/alice\n"
    assert code_of(people, "touch /root/x", user="alice", dir="/root") != 0


def test_directory_cannot_leave_the_container(people: Container) -> None:
    """A link to a host path is a path of the container."""
    text_of(people, "ln -sfn ../../../../var/tmp /link")
    assert text_of(people, "pwd -P", dir="/link/garden-escaped/deep") == "/var/tmp/garden-escaped/deep\n"
    assert not Path("/var/tmp/garden-escaped").exists()


# --- arguments, descriptors, rlimits


def test_arguments_arrive_as_they_are(shared_box: Container) -> None:
    """Empty ones, spaces, newlines and bytes beyond ASCII."""
    arguments = ["", "a b", "line\nbreak", "'\"$x`", "ünïcode", "--"]
    done = shared_box.run(["printf", "[%s]", *arguments]).output()
    assert done.stdout.decode() == "".join(f"[{argument}]" for argument in arguments)


def test_process_has_three_descriptors(shared_box: Container) -> None:
    """P7: listing shows 0 1 2 and the listing's own."""
    assert text_of(shared_box, "ls /proc/self/fd").split() == ["0", "1", "2", "3"]


def test_standard_streams_can_be_opened_again(people: Container) -> None:
    """S2: as a user who does not own the server's pipes."""
    done = people.run(sh("echo out >/dev/stdout; echo err >/dev/stderr"), user="alice").output()
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_rlimits_are_soft_and_hard(shared_box: Container) -> None:
    """R1; the others are inherited."""
    script = "grep -E 'open files|processes|core' /proc/self/limits"
    limits = {"nofile": 30, "nproc": 4567, "core": 0}
    rows = {
        line[:25].strip(): line[25:].split()[:2]
        for line in text_of(shared_box, script, rlimits=limits).splitlines()
    }
    assert rows == {
        "Max open files": ["30", "30"],
        "Max processes": ["4567", "4567"],
        "Max core file size": ["0", "0"],
    }
    assert code_of(shared_box, "exec 29</dev/null", rlimits={"nofile": 30}) == 0
    assert code_of(shared_box, "exec 31</dev/null", rlimits={"nofile": 30}) != 0


# --- start errors


@pytest.mark.parametrize(
    ("path", "code", "kind"),
    [
        ("no-such-program", "EXECUTABLE_NOT_FOUND", NotFound),
        ("/no/such/program", "EXECUTABLE_NOT_FOUND", NotFound),
        ("/etc/passwd", "NOT_EXECUTABLE", FailedPrecondition),
        ("/etc", "NOT_EXECUTABLE", FailedPrecondition),
    ],
)
def test_start_errors_are_typed(shared_box: Container, path: str, code: str, kind: type[GardenError]) -> None:
    """Not an exit code 127 from somewhere; the id is free again."""
    for _ in range(2):
        with pytest.raises(kind) as refused:
            shared_box.run([path], id="never")
        assert refused.value.code == code
    assert "never" not in shared_box.info().process_ids


def test_script_without_its_interpreter_is_told(shared_box: Container) -> None:
    """The file is there, and what it needs is not."""
    shared_box.write_file("/tmp/script", b"#!/no/such/interpreter\n", mode=0o755)
    with pytest.raises((NotFound, FailedPrecondition)) as refused:
        shared_box.run(["/tmp/script"])
    assert refused.value.code in ("EXECUTABLE_NOT_FOUND", "NOT_EXECUTABLE")


def test_process_ids_are_chosen_once(box: Container) -> None:
    """Also after the exit, for its status can be asked for; a repeated request gets the same process."""
    first = box.start(["true"], id="mine", request_id="r")
    assert box.wait("mine", PATIENCE) is not None
    with pytest.raises(AlreadyExists) as refused:
        box.start(["true"], id="mine")
    assert refused.value.code == "PROCESS_ID_IN_USE"
    assert box.start(["true"], id="mine", request_id="r").pid == first.pid
    assert [process.id for process in box.processes()] == ["mine"]
    assert box.info().process_ids == ("mine",)


# --- ends and signals


@pytest.mark.parametrize("code", [0, 1, 7, 127, 255])
def test_exit_codes_are_passed_on(shared_box: Container, code: int) -> None:
    """0 to 255."""
    done = shared_box.run(sh(f"exit {code}")).output()
    assert (done.exit.code, done.exit.signal, done.exit.reason) == (code, None, "")


@pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("SIGKILL", 9), ("USR1", 10), (34, 34)])
def test_signals_end_processes(shared_box: Container, name: str | int, number: int) -> None:
    """By name and number, right after the start."""
    process = shared_box.run(["sleep", "1000"])
    assert process.signal(name)
    status = process.wait(PATIENCE)
    assert (status.code, status.signal, status.shell_code) == (None, number, 128 + number)
    assert not status.out_of_memory
    assert status.reason.startswith("ended by ")
    assert not process.signal(name)


def test_trapped_signal_lets_the_process_choose(shared_box: Container) -> None:
    """X7."""
    process = shared_box.run(sh("trap 'exit 42' TERM; echo up; while :; do sleep 0.05; done"))
    assert next(iter(process)).data == b"up\n"
    process.signal("TERM")
    assert process.wait(PATIENCE).code == 42


def test_group_signal_reaches_children(shared_box: Container) -> None:
    """To the process only, its children live on; to its group, they do not."""
    script = "sleep 1000 & echo $!; wait; sleep 1000"
    process = shared_box.run(sh(script))
    child = next(iter(process)).data.decode().strip()
    process.signal("KILL")
    process.wait(PATIENCE)
    assert code_of(shared_box, f"kill -0 {child} && kill -9 {child}") == 0
    process = shared_box.run(sh(script))
    child = next(iter(process)).data.decode().strip()
    process.signal("KILL", group=True)
    process.wait(PATIENCE)
    wait_until(lambda: code_of(shared_box, f"kill -0 {child}") != 0, "the child's end")


def test_orphans_are_reaped(box: Container) -> None:
    """PID 1 leaves no zombies, however many children are left to it."""
    text_of(box, "i=0; while [ $i -lt 50 ]; do (true &) ; i=$((i+1)); done")
    wait_until(lambda: box.metrics().pids == 1, "the end of all orphans")
    assert text_of(box, "ps -o stat | grep -c Z || true") == "0\n"


def test_a_hundred_quick_exits_lose_nothing(shared_box: Container) -> None:
    """S1: the full output and the exit code of each."""

    def one(n: int) -> bool:
        done = shared_box.run(sh(f"echo out-{n}; echo err-{n} >&2; exit {n % 256}")).output()
        return (done.stdout, done.stderr, done.exit.code) == (b"out-%d\n" % n, b"err-%d\n" % n, n % 256)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(100)))


def test_exit_status_can_be_asked_for_many_times(box: Container) -> None:
    """X8: by the same client, by others, before and after."""
    box.start(sh("read x; exit 6"), id="asked")
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(box.wait, "asked", PATIENCE) for _ in range(6)]
        box.attach("asked").stdin.close()
        statuses = [future.result() for future in waiting]
    assert {status.code for status in statuses if status is not None} == {6}
    again = box.wait("asked")
    assert again is not None
    assert again.code == 6
    (info,) = box.processes()
    assert info.exit == again


# --- stdin


def test_stdin_arrives_unmodified(shared_box: Container) -> None:
    """Every byte value, larger than a pipe, then the end of file."""
    data = bytes(range(256)) * 2048
    process = shared_box.run(["cat"])
    process.stdin.write(data)
    process.stdin.close()
    done = process.output()
    assert done.stdout == data
    assert done.exit.code == 0


def test_exit_is_told_while_input_is_still_sent(shared_box: Container) -> None:
    """S5: what is not read is dropped."""
    for _ in range(5):
        process = shared_box.run(["true"])
        with suppress(FailedPrecondition):  # the client knows of the exit already
            process.stdin.write(b"x" * 100_000)
        assert process.output().exit.code == 0


def test_input_after_its_end_is_refused(shared_box: Container) -> None:
    """Silence would lose bytes."""
    process = shared_box.run(["sleep", "1000"])
    process.stdin.close()
    with pytest.raises(FailedPrecondition) as refused:
        process.stdin.write(b"late")
    assert refused.value.code == "STDIN_CLOSED"
    shared_box.signal(process.id, "KILL")


# --- terminals


def test_terminal_has_the_asked_for_size(shared_box: Container) -> None:
    """T1 to T3: everything on stdout, lines end in CR LF, zero is the default of 24 by 80."""
    for tty, size in ((Tty(), "24 80"), (Tty(rows=123, columns=456), "123 456"), (Tty(columns=99), "24 99")):
        done = shared_box.run(sh("test -t 0 && test -t 1 && test -t 2 && stty size"), tty=tty).output()
        assert done.stdout == f"{size}\r\n".encode()
        assert done.stderr == b""


def test_resize_is_seen_by_the_process(shared_box: Container) -> None:
    """T4: SIGWINCH is delivered."""
    script = "trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.02; done"
    process = shared_box.run(sh(script), tty=Tty(24, 80))
    assert next(iter(process)).data == b"up\r\n"
    process.resize(50, 132)
    assert process.output().stdout == b"50 132\r\n"


def test_terminal_input_ends_with_a_control_character(shared_box: Container) -> None:
    """A closed stdin is what Ctrl-D is to a terminal."""
    process = shared_box.run(["cat"], tty=Tty())
    process.stdin.write(b"line\n")
    process.stdin.close()
    done = process.output()
    assert done.exit.code == 0
    assert done.stdout.count(b"line") == 2  # echo and output


def test_ten_thousand_lines_through_a_terminal(shared_box: Container) -> None:
    """S1 with a tty: complete, also when the process exits at once."""
    expected = "".join(f"{n}\r\n" for n in range(1, 10_001)).encode()
    for _ in range(5):
        assert shared_box.run(["seq", "1", "10000"], tty=Tty()).output().stdout == expected


def test_without_a_terminal_there_is_none(shared_box: Container) -> None:
    """T5; and a resize is refused."""
    assert code_of(shared_box, "test -t 1") == 1
    process = shared_box.run(["cat"])
    process.resize(1, 1)
    with pytest.raises(FailedPrecondition) as refused:
        process.output()
    assert refused.value.code == "NO_TTY"
    shared_box.signal(process.id, "KILL")


def test_signal_from_the_keyboard(shared_box: Container) -> None:
    """Ctrl-C through the terminal is SIGINT: the terminal is the session's controlling one."""
    process = shared_box.run(sh("echo up; sleep 1000"), tty=Tty())
    assert b"up" in next(iter(process)).data
    process.stdin.write(b"\x03")
    status = shared_box.wait(process.id, PATIENCE)
    assert status is not None
    assert status.shell_code == 130


# --- limits of one process


@pytest.mark.cgroup2
def test_process_has_limits_of_its_own(box: Container) -> None:
    """Memory: the hog dies and says why, its neighbour and the container do not."""
    neighbour = box.run(["sleep", "1000"])
    hog = box.run(["tail", "/dev/zero"], limits=Limits(memory_bytes=16 << 20)).output()
    assert (hog.exit.signal, hog.exit.out_of_memory) == (9, True)
    assert str(16 << 20) in hog.exit.reason
    assert neighbour.exit is None
    assert box.limits().memory_bytes == 0
    neighbour.signal("KILL")
    assert not neighbour.wait(PATIENCE).out_of_memory


@pytest.mark.cgroup2
def test_process_cannot_fork_beyond_its_limit(box: Container) -> None:
    """pids: of the process and its children together."""
    script = "for n in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo done"
    done = box.run(sh(script), limits=Limits(pids=4))
    assert done.wait(PATIENCE).code == 2  # busybox: can't fork
    wait_until(lambda: box.metrics().pids > 1, "children")
    box.stop(kill=True)


@pytest.mark.cgroup2
def test_process_is_throttled_by_its_quota(box: Container) -> None:
    """A tenth of a processor: a busy loop gets no more than that, beside what it takes to start it."""
    before, began = box.metrics().cpu_usage_ns, time.monotonic_ns()
    spinning = box.run(sh("while :; do :; done"), limits=Limits(cpu_quota_us=10_000, cpu_period_us=100_000))
    assert box.wait(spinning.id, timedelta(seconds=1)) is None
    used_ns, passed_ns = box.metrics().cpu_usage_ns - before, time.monotonic_ns() - began
    spinning.signal("KILL")
    assert used_ns < 200_000_000 + passed_ns // 8


@pytest.mark.cgroup2
def test_cgroup_of_a_finished_process_is_gone(box: Container) -> None:
    """A container in which thousands of limited processes run does not collect groups."""
    box.run(["true"], limits=Limits(pids=10), id="limited").output()
    wait_until(
        lambda: not [d for group in cgroups_of(box.handle) for d in matching(group, "**/p-limited")],
        "the group's end",
    )


def test_output_streams_of_a_process_are_listed(box: Container) -> None:
    """ListProcesses shows how much was written and whether more may come."""
    process = box.run(sh("echo 12345; echo 123 >&2"), id="listed")
    process.output()
    (info,) = box.processes()
    assert (info.stdout_bytes, info.stderr_bytes) == (6, 4)
    assert (info.stdout_closed, info.stderr_closed) == (True, True)
    assert info.pid > 1
    assert b"".join(c.data for c in box.read_output("listed", Stream.STDERR)) == b"123\n"


def test_bad_process_specs_name_their_field(shared_box: Container) -> None:
    """Nothing is started for them."""
    with pytest.raises(InvalidArgument) as refused:
        shared_box.run(["true"], dir="relative", rlimits={"files": 1})
    assert {field.field for field in refused.value.fields} == {"spec.dir", "spec.rlimits[files]"}
