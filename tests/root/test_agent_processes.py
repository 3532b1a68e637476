"""The agent as PID 1 of its own namespaces, on this host's file system: processes, streams, signals, ptys."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.agent_client import AgentClient, AgentError, Streams
from kit.agent_process import directory_for_all_users, running_agent

from garden_py import wire
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> RuntimeBundle:
    return build_runtime_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def place() -> Iterator[Path]:
    with directory_for_all_users() as path:
        yield path


@pytest.fixture
def agent_path(bundle: RuntimeBundle, place: Path) -> Iterator[Path]:
    with running_agent(bundle, place) as (path, _):
        yield path
    assert (place / "agent.log").read_text() == ""


@pytest.fixture
def agent(agent_path: Path) -> Iterator[AgentClient]:
    with AgentClient(agent_path) as client:
        yield client


def sh(script: str) -> list[bytes]:
    return [b"sh", b"-c", script.encode()]


def code_of(agent: AgentClient, argv: list[bytes], **fields: object) -> AgentError:
    with pytest.raises(AgentError) as caught:
        agent.spawn("refused", argv, **fields)
    assert agent.request("list") == {"processes": []}, "a failed start leaves no record"
    return caught.value


def wait_until_hung_up(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, 0)
    assert poll.poll(10_000)


def test_streams_and_exit_code_arrive_whole_and_apart(agent: AgentClient) -> None:
    """S1, S3, X1."""
    data = os.urandom(3 << 20).hex().encode()
    with agent.spawn("p", sh("cat; echo problem >&2; exit 42")) as streams:
        pid = os.fork()
        if pid == 0:  # a writer beside the reader: the pipes hold less than the data
            streams.write(data)
            os._exit(0)
        agent.request("close_stdin", id="p")
        streams.close("stdin")
        agent.request("drop_output", id="p", stream="stdout")
        assert streams.read_all("stdout") == data
        assert streams.read_all("stderr") == b"problem\n"
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == 42


def test_a_process_holds_three_descriptors_and_is_its_own_session(agent: AgentClient) -> None:
    """P7: nothing of PID 1 leaks, neither sockets nor other processes' pipes."""
    with agent.spawn("other", [b"sleep", b"60"]):
        _, out, _ = agent.run("p", sh("ls /proc/self/fd; echo; echo $$; ps -o sid=,pgid= -p $$"))
    fds, rest = out.split(b"\n\n")
    assert fds.split() == [b"0", b"1", b"2", b"3"]
    assert len(set(rest.split())) == 1


def test_signals_are_as_a_program_expects_them(agent: AgentClient) -> None:
    """Python ignores SIGPIPE and SIGXFSZ and exec keeps that; nothing may be blocked either."""
    _, out, _ = agent.run("p", [b"grep", b"-E", b"^Sig(Blk|Ign)", b"/proc/self/status"])
    assert [line.split()[1] for line in out.splitlines()] == [b"0" * 16] * 2


def test_environment_and_directory_of_the_user(agent: AgentClient) -> None:
    """E1-E5, W1: exactly the given variables, then the defaults."""
    _, out, _ = agent.run("p", [b"env"], env=[b"B=2", b"A=1", b"B=3"], user="daemon")
    assert out == b"B=3\nA=1\nPATH=/usr/local/bin:/usr/bin:/bin\nUSER=daemon\nHOME=/usr/sbin\n"
    assert agent.run("p", [b"pwd"], user="daemon")[1] == b"/usr/sbin\n"


def test_the_user_has_its_groups_and_no_others(agent: AgentClient) -> None:
    """U4, U7: groups of the server are never inherited."""
    assert agent.run("p", sh("id -u; id -G"), user="1001:1002")[1] == b"1001\n1002\n"
    assert agent.run("p", sh("id -u; id -g"), user="daemon")[1] == b"1\n1\n"


def test_capabilities_of_root_and_of_a_user(agent: AgentClient) -> None:
    """C: inheritable and ambient are empty for all, a user has none, the bounding set is as asked."""
    keep = 1 << 0 | 1 << 5 | 1 << 7
    show = [b"sed", b"-n", b"s/^Cap.*:\\t//p", b"/proc/self/status"]
    inheritable, permitted, effective, bounding, ambient = agent.run("p", show, bounding=keep)[1].split()
    assert {int(inheritable, 16), int(ambient, 16)} == {0}
    assert {int(permitted, 16), int(effective, 16), int(bounding, 16)} == {keep}
    sets = [int(word, 16) for word in agent.run("p", show, bounding=keep, user="1001:1002")[1].split()]
    assert sets == [0, 0, 0, keep, 0]


def test_no_new_privs_is_set_only_on_demand(agent: AgentClient) -> None:
    """It breaks sudo, so it is the caller's choice."""
    show = [b"grep", b"NoNewPrivs", b"/proc/self/status"]
    assert agent.run("p", show)[1].endswith(b"\t0\n")
    assert agent.run("p", show, no_new_privs=True)[1].endswith(b"\t1\n")


def test_a_user_can_reopen_its_standard_streams(agent: AgentClient) -> None:
    """S2: programs log to /dev/stderr by name."""
    script = "cat /dev/stdin; echo out > /dev/stdout; echo err > /dev/stderr"
    assert agent.run("p", sh(script), stdin=b"in\n", user="1001:1002") == (0, b"in\nout\n", b"err\n")


def test_missing_directories_are_made_for_the_user(agent: AgentClient, place: Path) -> None:
    """W2: even below a directory the user may not write, all levels, 0755."""
    closed = place / "closed"
    closed.mkdir(mode=0o555)
    where = str(closed / "a/b").encode()
    assert agent.run("p", [b"pwd"], dir=where, user="1001:1002")[1] == where + b"\n"
    for path in (closed / "a", closed / "a/b"):
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1001, 1002, 0o755)
    status = closed.stat()
    assert (status.st_uid, status.st_mode & 0o7777) == (0, 0o555)


def test_after_making_directories_the_user_has_no_rights_left_over(agent: AgentClient, place: Path) -> None:
    """They were made with root's file capabilities, which must be gone at exec."""
    (place / "secret").write_text("x")
    (place / "secret").chmod(0o600)
    script = (
        f"cat {place}/secret; grep -E 'CapEff|CapPrm' /proc/self/status; cat /proc/self/status | grep Uid"
    )
    _, out, err = agent.run("p", sh(script), dir=str(place / "new").encode(), user="1001:1002")
    assert b"Permission denied" in err
    assert out.split()[1::2][:2] == [b"0" * 16, b"0" * 16]
    assert out.splitlines()[-1].split()[1:] == [b"1001"] * 4


@pytest.mark.parametrize("directory", [b"/etc/passwd", b"/etc/passwd/x", b"relative", b"/proc/none"])
def test_an_impossible_directory_is_refused(agent: AgentClient, directory: bytes) -> None:
    """The caller learns which directory, before anything runs."""
    error = code_of(agent, [b"true"], dir=directory)
    assert error.code == "bad_directory"
    assert directory.decode() in error.message


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (b"nope", "executable_not_found", 'exec: "nope": executable file not found in $PATH'),
        (b"/no/such", "executable_not_found", "stat /no/such: no such file or directory"),
        (b"/etc/passwd/x", "executable_not_found", "stat /etc/passwd/x: no such file or directory"),
        (b"/etc/passwd", "not_executable", 'exec: "/etc/passwd": permission denied'),
        (b"/etc", "not_executable", 'exec: "/etc": permission denied'),
    ],
)
def test_start_failures_come_as_errors_not_as_exit_codes(
    agent: AgentClient, argv: bytes, code: str, message: str
) -> None:
    """P4, in the words clients know."""
    error = code_of(agent, [argv])
    assert (error.code, error.message) == (code, message)


def test_a_script_without_its_interpreter_says_so(agent: AgentClient, place: Path) -> None:
    """The kernel says ENOENT for it, which reads as if the script were missing."""
    for name, content in (("lost", "#!/no/interpreter\n"), ("noformat", "\x00\x01\x02")):
        (place / name).write_text(content)
        (place / name).chmod(0o755)
    assert "interpreter" in code_of(agent, [str(place / "lost").encode()]).message
    assert code_of(agent, [str(place / "noformat").encode()]).code == "not_executable"


def test_the_search_goes_on_after_a_file_that_may_not_run(agent: AgentClient, place: Path) -> None:
    """P5 with execvp(3)'s rule: EACCES counts only if nothing else is found."""
    (place / "true").write_text("")
    path = b"PATH=" + str(place).encode()
    assert agent.run("p", [b"true"], env=[path + b":/bin"])[0] == 0
    assert code_of(agent, [b"true"], env=[path]).code == "not_executable"


def test_unknown_users_and_groups_are_refused(agent: AgentClient) -> None:
    """U5, U9."""
    assert code_of(agent, [b"true"], user="hans").code == "user_not_found"
    assert code_of(agent, [b"true"], user="root:hans").code == "group_not_found"
    assert code_of(agent, [b"true"], user="2147483648").code == "bad_user"


def test_limits_hold_for_the_process_and_not_for_the_next(agent: AgentClient) -> None:
    """R1, R2: PID 1 has lifted its own limit of open files; nobody may inherit that."""
    show = sh("ulimit -Sn; ulimit -Hn; ulimit -Su 2>/dev/null || ulimit -Sp")
    before = agent.run("p", show)[1]
    assert agent.run("p", show, rlimits={"nofile": 30, "nproc": 4567})[1].split() == [b"30", b"30", b"4567"]
    assert agent.run("p", show, rlimits={"nofile": [20, 40]})[1].split()[:2] == [b"20", b"40"]
    assert agent.run("p", show)[1] == before
    assert code_of(agent, [b"true"], rlimits={"nofile": 2**62}).code == "bad_rlimit"
    assert code_of(agent, [b"true"], rlimits={"files": 1}).code == "bad_rlimit"


def test_a_taken_id_is_refused_until_it_is_released(agent: AgentClient) -> None:
    """P2: the exit stays readable under the id."""
    with agent.spawn("p", [b"true"]):
        agent.wait_exit("p")
        with pytest.raises(AgentError, match="process ID 'p' already in use"):
            agent.spawn("p", [b"true"])
    agent.request("release", id="p")
    assert agent.run("p", [b"true"])[0] == 0


def test_a_gated_program_runs_when_the_gate_opens(agent: AgentClient, place: Path) -> None:
    """Everything before exec may be done earlier, the program itself not; a closed gate means never."""
    for opened in (True, False):
        ran = place / f"ran-{opened}"
        gate, own_end = os.pipe()
        number = agent.send_spawn("p", [b"touch", os.fsencode(ran)], gated=True, fds=[gate])
        os.close(gate)
        assert agent.request("list")["processes"][0]["starting"] is True
        assert not ran.exists()
        if opened:
            os.write(own_end, b"\n")
            os.close(own_end)
            Streams(*_started(agent, number)).__exit__()
            assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == 0
            agent.request("release", id="p")
        else:
            os.close(own_end)
            with pytest.raises(AgentError) as caught:
                agent.receive(number)
            assert caught.value.code == "not_released"
            assert agent.request("list") == {"processes": []}
        assert ran.exists() is opened


def _started(agent: AgentClient, number: int) -> tuple[int, list[str], list[int]]:
    reply, fds = agent.receive(number)
    return reply["pid"], reply["fds"], fds


def test_a_gate_needs_a_descriptor(agent: AgentClient) -> None:
    """Without one the last cgroup's file would be taken for it."""
    with pytest.raises(AgentError) as caught:
        agent.spawn("p", [b"true"], gated=True)
    assert caught.value.code == "invalid_request"


def test_a_running_process_is_not_released(agent: AgentClient) -> None:
    """Its exit would be lost."""
    with agent.spawn("p", [b"sleep", b"60"]):
        with pytest.raises(AgentError) as caught:
            agent.request("release", id="p")
        assert caught.value.code == "still_running"


@pytest.mark.parametrize("op", ["attach", "close_stdin", "release"])
def test_an_unknown_process_has_one_code_everywhere(agent: AgentClient, op: str) -> None:
    """AT1."""
    with pytest.raises(AgentError) as caught:
        agent.request(op, id="nobody")
    assert caught.value.code == "process_not_found"


def test_death_by_signal_is_told_apart_from_exit(agent: AgentClient) -> None:
    """X2, also right after the start (X5)."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        with agent.spawn("p", [b"sleep", b"60"]):
            assert agent.request("signal", id="p", signal=int(number), group=False) == {"delivered": True}
            assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == -number
        assert agent.request("signal", id="p", signal=9, group=False) == {"delivered": False}
        agent.request("release", id="p")


def test_a_group_signal_reaches_the_children(agent: AgentClient) -> None:
    """A shell's background job belongs to its group."""
    with agent.spawn("p", sh("sleep 60 & echo started; wait")) as streams:
        streams.read_until("stdout", b"started")
        agent.request("signal", id="p", signal=9, group=True)
        agent.wait_exit("p")
        agent.request("drop_output", id="p", stream="stdout")
        assert streams.read_all("stdout") == b""


def test_stop_reaches_twenty_processes_and_spares_pid_1(agent: AgentClient) -> None:
    """ST1: everything but PID 1."""
    streams = [agent.spawn(f"p{number}", [b"sleep", b"60"]) for number in range(20)]
    assert agent.request("signal_all", signal=15) == {"delivered": True}
    for number, each in enumerate(streams):
        assert os.waitstatus_to_exitcode(agent.wait_exit(f"p{number}")) == -15
        each.close()
    assert agent.request("signal_all", signal=15) == {"delivered": False}


def test_pid_1_survives_every_signal_from_inside(agent: AgentClient) -> None:
    """pid_namespaces(7): only signals with a handler get through, and SIGINT must not have Python's."""
    script = "for s in $(seq 1 31); do [ $s = 3 ] || kill -$s 1; done; kill -9 1; echo alive"
    assert agent.run("p", sh(script))[1] == b"alive\n"
    assert agent.hello()["wire"] == wire.VERSION


def test_pid_1_can_be_neither_traced_nor_read(agent: AgentClient) -> None:
    """It holds the server's socket; /proc/1/fd would hand it to root of the container."""
    script = (
        "cat /proc/1/environ; head -c1 /proc/1/mem; ls -l /proc/1/fd/ >/dev/null; cat /proc/1/fd/2;"
        "head -1 /proc/1/status"
    )
    capabilities_of_a_container = 0xA80425FB
    _, out, err = agent.run("p", sh(script), bounding=capabilities_of_a_container)
    assert out == b"Name:\tgarden-init\n"
    assert err.count(b"/proc/1/environ: Permission denied") == 1
    assert err.count(b"/proc/1/mem") == 1
    assert err.count(b"cannot read symbolic link") > 3, "its descriptors have numbers but no names"
    assert err.count(b"cat: /proc/1/fd/2: Permission denied") == 1


def test_exit_is_told_while_a_background_child_holds_the_pipe(agent: AgentClient) -> None:
    """Two facts: exited, and stream closed."""
    with agent.spawn("p", sh("sleep 60 & echo $!")) as streams:
        assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == 0
        background = int(streams.read_until("stdout", b"\n"))
        assert select.select([streams.fds["stdout"]], [], [], 0)[0] == []
        agent.run("killer", [b"kill", str(background).encode()])
        assert streams.read_all("stdout") == b""


def test_orphans_leave_no_zombies(agent: AgentClient) -> None:
    """I2."""
    agent.run("p", sh("for i in $(seq 50); do (true &) ; done"))
    deadline = time.monotonic() + 10
    while b"Z" in agent.run("ps", [b"ps", b"-A", b"-o", b"stat="])[1]:
        assert time.monotonic() < deadline


def test_a_restarted_server_finds_everything_again(agent_path: Path) -> None:
    """AT4: processes, exits and unread output survive the server."""
    with AgentClient(agent_path) as first:
        first.spawn("live", sh("echo before; read line; echo got $line; exit 3")).close()
        first.spawn("dead", sh("echo bye; exit 4")).close()
        first.wait_exit("dead")
    with AgentClient(agent_path) as second:
        records = {record["id"]: record for record in second.hello()["processes"]}
        assert records["live"]["exited"] is False
        assert os.waitstatus_to_exitcode(records["dead"]["status"]) == 4
        assert 0 < records["dead"]["started_ns"] <= records["dead"]["ended_ns"] <= time.time_ns()
        _, streams = second.attach("live")
        with streams:
            assert list(streams.fds) == ["stdin", "stdout", "stderr"]
            streams.write(b"it\n")
            assert streams.read_until("stdout", b"it\n") == b"before\ngot it\n"
        assert os.waitstatus_to_exitcode(second.wait_exit("live")) == 3
        _, streams = second.attach("dead")
        with streams:
            assert streams.read_all("stdout") == b"bye\n"


def test_attach_tells_what_was_dropped(agent: AgentClient) -> None:
    """A server that has read a stream to its end does not want it back."""
    with agent.spawn("p", [b"true"]):
        assert agent.request("close_stdin", id="p") == {"closed": True}
        assert agent.request("close_stdin", id="p") == {"closed": False}
        assert agent.request("drop_output", id="p", stream="stderr") == {"dropped": True}
        reply, streams = agent.attach("p")
        assert reply["fds"] == ["stdout"]
        streams.close()


def test_an_unread_process_is_not_blocked_by_a_pipeful(agent: AgentClient) -> None:
    """S8, until the server comes back: 64 KiB wait in the pipe (pipe(7)); only a server grows it."""
    with agent.spawn("p", [b"head", b"-c", b"65536", b"/dev/zero"]) as streams:
        assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == 0
        assert len(streams.read_all("stdout")) == 65_536


def run_tty(agent: AgentClient, script: str, **fields: object) -> bytes:
    return agent.run("p", sh(script), tty=fields.pop("tty", {"rows": 0, "columns": 0}), **fields)[1]


def test_a_terminal_has_its_size_and_its_owner(agent: AgentClient) -> None:
    """T1-T3: 24x80 by default, each dimension alone too; it belongs to the user."""
    show = "stty size; test -t 0 -a -t 1 -a -t 2 && echo tty; stat -c '%u %G %a' $(tty); ps -o tpgid= -p $$"
    size, tty, owner, foreground = run_tty(agent, show, user="1001:1002").split(b"\r\n")[:4]
    assert (size, tty, owner) == (b"24 80", b"tty", b"1001 tty 620")
    assert int(foreground) > 1, "it is the controlling terminal"
    assert run_tty(agent, "stty size", tty={"rows": 456, "columns": 123}) == b"456 123\r\n"
    assert run_tty(agent, "stty size", tty={"rows": 0, "columns": 99}) == b"24 99\r\n"


def test_terminal_output_is_complete_when_the_process_is_gone(agent: AgentClient) -> None:
    """S1 with a tty: the last bytes are the ones that get lost."""
    expected = b"".join(b"%d\r\n" % number for number in range(1, 10001))
    for _ in range(10):
        assert run_tty(agent, "seq 10000") == expected


def test_terminal_output_waits_for_a_reader(agent: AgentClient) -> None:
    """More than the pipe holds: the writer blocks, nothing is lost, and PID 1 goes on serving."""
    expected = b"".join(b"%d\r\n" % number for number in range(1, 300_001))
    with agent.spawn("p", [b"seq", b"300000"], tty={"rows": 0, "columns": 0}) as streams:
        wait_until_readable(streams)
        assert agent.request("list")["processes"][0]["exited"] is False
        agent.request("drop_output", id="p", stream="stdout")
        assert streams.read_all("stdout") == expected
    assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == 0


def wait_until_readable(streams: Streams) -> None:
    assert select.select([streams.fds["stdout"]], [], [], 10)[0]


def test_a_released_process_keeps_its_last_terminal_output(agent: AgentClient) -> None:
    """The server may persist the exit while the pipe is full and the pty holds the rest."""
    argv = sh("stty -opost; head -c 1200000 /dev/zero | tr '\\0' x")
    with agent.spawn("p", argv, tty={"rows": 0, "columns": 0}) as streams:
        stdout, read = streams.fds["stdout"], 0
        while read < 1_200_000 - fcntl.fcntl(stdout, fcntl.F_GETPIPE_SZ) - (64 << 10):
            read += len(os.read(stdout, 1 << 12))
        while not select.select([agent.socket], [], [], 0.05)[0]:  # read only as much more as lets it exit
            read += len(os.read(stdout, 1 << 12))
        agent.wait_exit("p")
        agent.request("release", id="p")
        streams.close("stdin")
        assert read + len(streams.read_all("stdout")) == 1_200_000


def test_a_terminal_survives_the_server(agent_path: Path) -> None:
    """What was typed and printed meanwhile is there for the next one."""
    with AgentClient(agent_path) as first:
        argv = sh("stty -echo; echo one; read x; echo two $x")
        with first.spawn("p", argv, tty={"rows": 0, "columns": 0}) as streams:
            streams.read_until("stdout", b"one\r\n")
            streams.write(b"typed\n")
    with AgentClient(agent_path) as second:
        _, streams = second.attach("p")
        with streams:
            assert streams.read_until("stdout", b"two typed\r\n") == b"two typed\r\n"


def test_resize_is_seen_by_the_program(agent: AgentClient) -> None:
    """T4: SIGWINCH and the new size; a 0 is the default again."""
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    with agent.spawn("p", sh(script), tty={"rows": 0, "columns": 0}) as streams:
        streams.read_until("stdout", b"ready")
        assert agent.request("resize", id="p", rows=30, columns=0) == {}
        streams.read_until("stdout", b"30 80")
        agent.request("signal", id="p", signal=9, group=True)


def test_resizing_what_has_no_terminal_is_an_error(agent: AgentClient) -> None:
    """T7 is the server's leniency; the agent says what it is."""
    with agent.spawn("p", [b"sleep", b"60"]):
        with pytest.raises(AgentError) as caught:
            agent.request("resize", id="p", rows=1, columns=1)
        assert caught.value.code == "no_tty"


def test_a_server_that_leaves_a_terminal_hangs_nobody_up(agent: AgentClient) -> None:
    """The agent's duplicate of the master keeps the session alive."""
    streams = agent.spawn(
        "p", sh("trap 'echo hup; exit 9' HUP; echo ready; read x; exit 5"), tty={"rows": 0, "columns": 0}
    )
    streams.read_until("stdout", b"ready")
    streams.close()
    _, again = agent.attach("p")
    with again:
        again.write(b"\n")
        assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == 5


def test_the_child_joins_the_cgroups_handed_over(agent: AgentClient, place: Path) -> None:
    """It writes 0 to each file before anything else; plain files show it."""
    files = [place / f"procs{number}" for number in range(3)]
    fds = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in files]
    try:
        request = agent.send(
            "spawn", fds, id="p", argv=[b"true"], env=[], dir=b"", user="", tty=None, rlimits={},
            bounding=None, no_new_privs=False, program=None, program_args={}, gated=False,
        )  # fmt: skip
        reply, ends = agent.receive(request)
        Streams(reply["pid"], reply["fds"], ends).close()
    finally:
        for fd in fds:
            os.close(fd)
    assert [path.read_bytes() for path in files] == [b"0"] * 3
