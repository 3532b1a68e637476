"""What a broken server or a hostile container may try against the agent."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kit.agent_client import AgentClient, AgentError
from kit.agent_process import directory_for_all_users, running_agent

from garden_py import wire
from garden_py.agent.connection import MAX_CONNECTIONS
from garden_py.agent.processes import MAX_PROCESSES
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

pytestmark = pytest.mark.root

PROCESS: dict[str, object] = {
    "op": "spawn", "id": "x", "argv": [b"true"], "env": [], "dir": b"", "user": "", "tty": None,
    "rlimits": {}, "bounding": None, "no_new_privs": False, "program": None, "program_args": {}, "gated": False,
}  # fmt: skip


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
    assert (place / "agent.log").read_text() == "", "nothing surprised the agent"


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(path))
    peer.settimeout(10)
    return peer


def is_closed(peer: socket.socket) -> bool:
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


def frame(value: object, **changes: int) -> bytes:
    return wire.encode_frame(changes.pop("kind", wire.REQUEST), 1, value, **changes)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(100_000),
        b"GA\x02\x01" + bytes(12),
        b"GA\x01\x01" + bytes(4) + b"\xff\xff\xff\xff" + bytes(4),
        b"GA\x01\x01" + bytes(4) + b"\x05\0\0\0" + bytes(4) + b"l\xff\xff\xff\xff",
        frame({"op": "list"}, kind=wire.REPLY),
        frame({"op": "list"}, nfds=3),
    ],
    ids=["http", "random", "version", "huge", "count", "reply", "missing descriptors"],
)
def test_broken_bytes_close_their_connection_only(agent_path: Path, data: bytes) -> None:
    """The other connection, and a process on it, go on."""
    with AgentClient(agent_path) as good, connect(agent_path) as bad:
        good.hello()
        with suppress(BrokenPipeError, ConnectionResetError):
            bad.sendall(data)
        assert is_closed(bad)
        assert good.run("p", [b"echo", b"fine"])[1] == b"fine\n"


def test_descriptors_without_a_frame_are_not_collected(agent_path: Path) -> None:
    """They would fill PID 1's table."""
    with connect(agent_path) as bad:
        socket.send_fds(bad, [frame({"op": "list"})], [0] * 16)
        while data := bad.recv(1 << 16):
            assert data.startswith(b"GA")


def test_a_frame_cut_in_two_waits_for_its_rest(agent_path: Path) -> None:
    """And one that never comes costs nothing when the peer leaves."""
    with connect(agent_path) as slow, AgentClient(agent_path) as other:
        request = frame({"op": "list"})
        slow.sendall(request[:20])
        other.hello()
        slow.sendall(request[20:])
        assert next(wire.Decoder().feed(slow.recv(1 << 16))).kind == wire.REPLY
        slow.sendall(request[:20])


def test_a_hundred_connections_leave_room_for_the_first(agent_path: Path) -> None:
    """The listener is the server's alone, but a bug there must not hurt here."""
    with AgentClient(agent_path) as first:
        first.hello()
        crowd = [connect(agent_path) for _ in range(100)]
        try:
            refused = sum(is_closed(peer) for peer in crowd[MAX_CONNECTIONS - 1 :])
            assert refused == len(crowd) - MAX_CONNECTIONS + 1
            first.hello()
        finally:
            for peer in crowd:
                peer.close()
    # Their places are free again as soon as the agent has seen them leave.
    deadline = time.monotonic() + 10
    while True:
        try:
            with AgentClient(agent_path) as client:
                client.hello()
            break
        except (ConnectionResetError, BrokenPipeError):
            assert time.monotonic() < deadline


def test_a_server_that_does_not_read_is_dropped(agent_path: Path) -> None:
    """PID 1's memory is bounded; the other connection does not wait."""
    with AgentClient(agent_path) as good, connect(agent_path) as deaf:
        requests = frame({"op": "x" * 4000}) * 16

        def ask_for_ever() -> None:
            while True:
                deaf.sendall(requests)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ask_for_ever()
        assert good.request("list") == {"processes": []}


@pytest.mark.parametrize("op", [None, 7, b"list", "", "nope", "__init__", "x" * 100_000])
def test_unknown_operations_are_answered(agent_path: Path, op: object) -> None:
    """An error frame, and the connection stays."""
    with AgentClient(agent_path) as agent:
        with pytest.raises(AgentError) as caught:
            agent.request(op)  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.field) == ("invalid_request", "op")
        agent.hello()


WRONG = (None, True, -1, 2**63 - 1, "x", "", b"x", b"\0", [1], [[]], {}, {"rows": "x"}, {"path": 3}, [b"\0"])
ACCEPTABLE = {  # by field, those of the values above that have the right type
    "id": ("x",), "argv": (), "env": (), "dir": (b"x",), "user": ("", "x"), "tty": (None,),
    "rlimits": ({}, {"rows": "x"}, {"path": 3}), "bounding": (None, 2**63 - 1), "no_new_privs": (True,),
    "program": (None,),
}  # fmt: skip


@pytest.mark.parametrize("field", list(ACCEPTABLE))
def test_a_wrong_type_in_any_field_of_spawn_is_named(agent_path: Path, field: str) -> None:
    """Nothing is started, nothing is guessed."""
    acceptable = [repr(value) for value in ACCEPTABLE[field]]
    with AgentClient(agent_path) as agent:
        for value in WRONG:
            if repr(value) in acceptable:
                continue
            with pytest.raises(AgentError) as caught:
                agent.request(**{**PROCESS, field: value})  # type: ignore[arg-type]
            assert caught.value.code == "invalid_request", (value, caught.value)
            assert (caught.value.field or "").startswith(field), (value, caught.value)
        assert agent.request("list") == {"processes": []}


@pytest.mark.parametrize(
    "op", ["signal", "signal_all", "resize", "attach", "drop_output", "release", "hello"]
)
def test_no_request_without_its_fields_is_served(agent_path: Path, op: str) -> None:
    """Every handler checks."""
    with AgentClient(agent_path) as agent:
        for fields in ({}, {"id": 1}, {"id": "p"}, {"id": "p", "signal": 0}, {"id": "p", "signal": 65}):
            with pytest.raises(AgentError) as caught:
                agent.request(op, **fields)
            assert caught.value.code in ("invalid_request", "process_not_found")
        agent.hello()


def test_a_foreign_wire_version_is_refused(agent_path: Path) -> None:
    """The agent may be older or newer than a restarted server."""
    with AgentClient(agent_path) as agent:
        with pytest.raises(AgentError) as caught:
            agent.request("hello", server="future", wire=[wire.VERSION + 1, 9])
        assert caught.value.code == "unsupported_wire"


def test_a_large_environment_passes_and_a_too_large_argument_is_an_error(agent_path: Path) -> None:
    """execve(2): 128 KiB for one string, a quarter of the stack limit for all."""
    with AgentClient(agent_path) as agent:
        env = [b"V%d=%s" % (number, b"x" * 1000) for number in range(500)]
        assert agent.run("p", [b"sh", b"-c", b"env | grep -c ^V"], env=env)[1] == b"500\n"
        with pytest.raises(AgentError) as caught:
            agent.spawn("p", [b"true", b"x" * 200_000])
        assert caught.value.details["errno"] == "E2BIG"
        assert agent.run("p", [b"true"])[0] == 0


def test_closing_the_connection_while_a_process_starts_loses_nothing(agent_path: Path) -> None:
    """The process is in the table for the next server, or its failure is forgotten."""
    for number in range(20):
        with AgentClient(agent_path) as gone:
            gone.send_spawn(f"p{number}", [b"true"])
            gone.send_spawn(f"q{number}", [b"/no/such"])
    with AgentClient(agent_path) as agent:
        deadline = time.monotonic() + 10
        while not all(record["exited"] for record in agent.hello()["processes"]):
            assert time.monotonic() < deadline
        ids = {record["id"] for record in agent.hello()["processes"]}
        assert ids <= {f"p{number}" for number in range(20)}
        for id in ids:
            agent.request("release", id=id)


def test_two_hundred_processes_at_once(agent_path: Path) -> None:
    """Each gets its own streams and its own exit."""
    with AgentClient(agent_path) as agent:
        streams = {
            number: agent.spawn(f"p{number}", [b"sh", b"-c", b"read x; exit $x"]) for number in range(200)
        }
        for number, each in streams.items():
            each.write(b"%d\n" % (number % 256))
        for number, each in streams.items():
            assert os.waitstatus_to_exitcode(agent.wait_exit(f"p{number}")) == number % 256
            each.close()
            agent.request("release", id=f"p{number}")
        assert agent.request("list") == {"processes": []}


def test_descriptors_run_out_before_pid_1_does(bundle: RuntimeBundle, place: Path) -> None:
    """Starting fails with a code, serving goes on, and releasing makes room again."""
    with running_agent(bundle, place, "prlimit", "--nofile=128:128") as (path, _), AgentClient(path) as agent:
        started = []

        def fill() -> None:
            for number in range(MAX_PROCESSES):
                agent.spawn(f"p{number}", [b"true"]).close()
                started.append(f"p{number}")

        with pytest.raises(AgentError) as caught:
            fill()
        assert caught.value.code == "too_many_processes"
        assert len(started) > 20
        with AgentClient(path) as second:
            second.hello()
        agent.wait_exit(started[0])
        agent.request("release", id=started[0])
        assert agent.run("again", [b"true"])[0] == 0


def test_no_descriptor_is_left_behind(bundle: RuntimeBundle, place: Path) -> None:
    """Success, failure before fork, failure in the child, pty, attach: all give back what they took."""
    with running_agent(bundle, place) as (path, pid), AgentClient(path) as agent:
        agent.hello()
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        agent.run("warm", [b"true"])
        before = len(os.listdir(f"/proc/{child}/fd"))
        for _ in range(20):
            agent.run("p", [b"true"])
            agent.run("t", [b"true"], tty={"rows": 0, "columns": 0})
            with pytest.raises(AgentError):
                agent.spawn("p", [b"/no/such"])
            with pytest.raises(AgentError):
                agent.spawn("p", [b"/no/such"], tty={"rows": 0, "columns": 0})
            with pytest.raises(AgentError):
                agent.request(**{**PROCESS, "user": 3}, fds=[0, 0])  # type: ignore[arg-type]
        agent.hello()  # the last request's descriptors are closed after its answer, before the next request
        assert len(os.listdir(f"/proc/{child}/fd")) == before


def test_a_fifo_as_passwd_hurts_only_the_start(bundle: RuntimeBundle, place: Path) -> None:
    """Reading it would block for ever; PID 1 itself never looks."""
    (place / "etc").mkdir()
    os.mkfifo(place / "etc/passwd")
    over = ["sh", "-c", f'mount --bind {place}/etc /etc && exec "$@"', "sh"]
    with running_agent(bundle, place, *over) as (path, _), AgentClient(path) as agent:
        with pytest.raises(AgentError, match="no regular file"):
            agent.spawn("p", [b"true"])
        (place / "etc/passwd").unlink()
        assert agent.run("p", [b"true"])[0] == 0


def test_a_start_that_hangs_can_be_killed_and_does_not_hold_up_others(
    bundle: RuntimeBundle, place: Path
) -> None:
    """A cgroup file that blocks stands in for a hung mount: only the child waits."""
    with running_agent(bundle, place) as (path, _), AgentClient(path) as agent, AgentClient(path) as other:
        read, write = os.pipe()
        os.set_blocking(write, False)
        try:
            while True:
                os.write(write, bytes(1 << 16))
        except BlockingIOError:
            os.set_blocking(write, True)
        try:
            request = agent.send(fds=[write], **PROCESS)  # type: ignore[arg-type]
            deadline = time.monotonic() + 10
            while not (records := other.request("list")["processes"]):
                assert time.monotonic() < deadline
            assert records[0]["starting"] is True
            assert other.run("p", [b"echo", b"meanwhile"])[1] == b"meanwhile\n"
            assert other.request("signal", id="x", signal=9, group=True) == {"delivered": True}
            _, ends = agent.receive(request)
            for fd in ends:
                os.close(fd)
            assert os.waitstatus_to_exitcode(agent.wait_exit("x")) == -9
        finally:
            os.close(read)
            os.close(write)


def test_signal_all_is_refused_outside_an_own_pid_namespace(bundle: RuntimeBundle, place: Path) -> None:
    """kill(-1) there would be everybody else's end; the agent is started as a child to be PID 2."""
    wrapped = ["sh", "-c", '"$@" & wait', "sh"]
    with running_agent(bundle, place, *wrapped) as (path, _), AgentClient(path) as agent:
        with pytest.raises(AgentError) as caught:
            agent.request("signal_all", signal=9)
        assert caught.value.code == "not_init"


def test_sigquit_writes_a_stack_and_only_a_few(bundle: RuntimeBundle, place: Path) -> None:
    """A rung of the debugging ladder; the log is on the host, so it is bounded."""
    with running_agent(bundle, place) as (path, _), AgentClient(path) as agent:
        agent.run("p", [b"sh", b"-c", b"for i in $(seq 50); do kill -QUIT 1; sleep 0.002; done"])
        agent.hello()
    log = (place / "agent.log").read_text()
    assert 1 <= log.count("stack on SIGQUIT") <= 8
    assert "loop.py" in log


def test_an_agent_without_its_socket_ends(bundle: RuntimeBundle) -> None:
    """Started by hand it must say what is missing instead of serving nobody."""
    result = subprocess.run(
        bundle.argv(str(bundle.directory.parent)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == "garden-init: descriptor 3 is no listening socket\n"
