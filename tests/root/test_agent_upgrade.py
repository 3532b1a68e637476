"""One agent takes another one's place in PID 1, and nothing that runs notices."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.agent_client import AgentClient, AgentError
from kit.agent_container import MOUNTED_AT, make_busybox_rootfs, running_container
from kit.agent_process import directory_for_all_users
from kit.bundles import append, build_changed, replace_in
from kit.garden import wait_until

from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def bundles() -> Iterator[Path]:
    """Where all bundles are: what containers mount."""
    with directory_for_all_users() as path:
        yield path / "runtime"


@pytest.fixture(scope="module")
def bundle(bundles: Path) -> RuntimeBundle:
    return build_runtime_bundle(bundles)


@pytest.fixture(scope="module")
def other(bundles: Path, bundle: RuntimeBundle, tmp_path_factory: pytest.TempPathFactory) -> RuntimeBundle:
    """Another build; it comes into being while containers of the first one may be running."""
    return build_changed(bundles, tmp_path_factory.mktemp("s") / "p", append("agent/main.py", "# later"))


@pytest.fixture
def place() -> Iterator[Path]:
    with directory_for_all_users() as path:
        yield path


@pytest.fixture
def path(bundle: RuntimeBundle, place: Path) -> Iterator[Path]:
    make_busybox_rootfs(place / "rootfs")
    with running_container(bundle, place, place / "rootfs", f"upgrade-test-{os.getpid()}") as path:
        yield path
    assert (place / "agent.log").read_text() == "", "nothing surprised the agent"


@pytest.fixture
def agent(path: Path) -> Iterator[AgentClient]:
    with AgentClient(path) as client:
        yield client


def sh(script: str) -> list[bytes]:
    return [b"sh", b"-c", script.encode()]


def upgrade(agent: AgentClient, bundle: RuntimeBundle) -> dict[str, object]:
    request = agent.send("upgrade", **upgrade_fields(bundle))
    reply, fds = agent.receive(request)
    assert fds == []
    return reply


def upgrade_fields(bundle: RuntimeBundle) -> dict[str, object]:
    return {
        "build": bundle.version,
        "argv": [os.fsencode(word) for word in bundle.argv(MOUNTED_AT)],
        "env": [os.fsencode(entry) for entry in bundle.env],
    }


def test_the_new_agent_holds_what_the_old_one_held(
    agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle
) -> None:
    """A running process, one that has ended and was not released, and the connection that asked."""
    assert agent.hello()["build"] == bundle.version
    done = agent.spawn("done", sh("exit 7"))
    agent.wait_exit("done")
    streams = agent.spawn("runs", [b"cat"])
    before = agent.request("list")["processes"]
    reply = upgrade(agent, other)
    assert reply["build"] == other.version
    assert agent.hello()["processes"] == before
    streams.write(b"after\n")
    assert streams.read_until("stdout", b"\n") == b"after\n"
    streams.close("stdin")
    agent.request("close_stdin", id="runs")
    assert os.waitstatus_to_exitcode(agent.wait_exit("runs")) == 0
    for id in ("runs", "done"):
        agent.request("release", id=id)
    assert agent.run("new", sh("cat /proc/1/comm"), user="alice")[1] == b"garden-init\n"
    for each in (streams, done):
        each.close()


def test_exits_in_the_middle_are_not_lost(
    agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle
) -> None:
    """Each child ends at its own moment around an execve; all are told once, with their own status."""
    for turn, target in enumerate([other, bundle] * 6):
        started = {}
        for number in range(24):
            id = f"p{turn}-{number}"
            # 2 ms apart: over both start-ups, of the check and of PID 1 itself.
            started[id] = agent.spawn(id, sh(f"sleep 0.{number * 3:03d}; exit {number}"))
        upgrade(agent, target)
        for number, (id, streams) in enumerate(started.items()):
            assert os.waitstatus_to_exitcode(agent.wait_exit(id)) == number
            agent.request("release", id=id)
            streams.close()
    assert agent.events == []
    assert agent.request("list") == {"processes": []}


def test_bytes_of_pipes_and_terminals_are_not_lost(
    agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle
) -> None:
    """Output with a checksum, `cat` that is being fed, and a terminal in both directions, under many upgrades."""
    lines = b"".join(b"%08d\n" % number for number in range(300_000))
    writer = agent.spawn(
        "writer", sh("i=0; while [ $i -lt 300000 ]; do printf '%08d\\n' $i; i=$((i+1)); done")
    )
    feeder = agent.spawn("cat", [b"cat"])
    terminal = agent.spawn("tty", sh("stty raw -echo; cat"), tty={"rows": 24, "columns": 80})
    typed = b"".join(b"typed %06d." % number for number in range(20_000))
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda: found.update(writer=digest(writer.read_all("stdout")))),
        threading.Thread(target=lambda: found.update(cat=digest(feeder.read_all("stdout")))),
        threading.Thread(target=lambda: found.update(tty=digest(read_exactly(terminal.fds["stdout"], len(typed))))),
    ]  # fmt: skip
    feeding = threading.Event()
    fed = bytearray()

    def feed() -> None:
        while not feeding.is_set():
            chunk = os.urandom(10_000)
            fed.extend(chunk)
            feeder.write(chunk)

    feeders = [
        threading.Thread(target=feed),
        threading.Thread(target=lambda: type_slowly(terminal.fds["stdin"], typed)),
    ]
    for name in ("stdout", "stderr"):
        agent.request("drop_output", id="writer", stream=name)
        agent.request("drop_output", id="cat", stream=name)
    for thread in [*threads, *feeders]:
        thread.start()
    for target in [other, bundle] * 10:
        upgrade(agent, target)
    feeding.set()
    for thread in feeders:
        thread.join(60)
    feeder.close("stdin")
    agent.request("close_stdin", id="cat")
    for thread in threads:
        thread.join(60)
    assert found == {"writer": digest(lines), "cat": digest(bytes(fed)), "tty": digest(typed)}
    agent.request("signal", id="tty", signal=9, group=True)
    for id, streams in {"writer": writer, "cat": feeder, "tty": terminal}.items():
        agent.wait_exit(id)
        agent.request("release", id=id)
        streams.close()


def digest(data: bytes) -> str:
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()}"


def read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := os.read(fd, count - len(data))):
        data += more
    return data


def type_slowly(fd: int, data: bytes) -> None:
    for at in range(0, len(data), 100):
        os.write(fd, data[at : at + 100])


def test_requests_and_halves_of_requests_on_their_way_arrive(
    path: Path, agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle
) -> None:
    """A second connection stays, too; what it sends meanwhile is answered by the new agent."""
    from garden_py import wire

    with AgentClient(path) as second:
        second.hello()
        frame = wire.encode_frame(wire.REQUEST, 77, {"op": "ping"})
        second.socket.sendall(frame[:20])
        assert agent.request("list") == {"processes": []}  # the half has been received by now
        request = agent.send("upgrade", **upgrade_fields(other))
        pings = [agent.send("ping") for _ in range(50)]
        # Answers of the old agent come before that of the new one, those of the new one after it.
        answered = []
        while len(answered) < 51:
            answer, fds = agent._next_frame()
            assert (answer.kind, fds) == (wire.REPLY, [])
            answered.append(answer.id)
        assert sorted(answered) == sorted([request, *pings])
        second.socket.sendall(frame[20:])
        assert second.receive(77) == ({}, [])


def test_a_start_under_way_is_answered_by_the_new_agent(
    path: Path, agent: AgentClient, other: RuntimeBundle
) -> None:
    """A cgroup file that blocks holds the child before its exec, over the upgrade."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, bytes(1 << 16))
    except BlockingIOError:
        os.set_blocking(write, True)
    with AgentClient(path) as second:
        request = second.send_spawn("slow", sh("echo started"))
        second.close()
    request = agent.send("spawn", [write], **{**SPAWN, "id": "slower", "argv": sh("echo started")})
    upgraded = agent.send("upgrade", **upgrade_fields(other))
    assert agent.receive(upgraded)[0]["build"] == other.version
    starts = {"slow": False, "slower": True}
    wait_until(
        lambda: {r["id"]: r["starting"] for r in agent.hello()["processes"]} == starts, "the start of slow"
    )
    os.set_blocking(read, False)
    try:
        while os.read(read, 1 << 16):
            pass
    except BlockingIOError:
        pass
    _, fds = agent.receive(request)
    with os.fdopen(fds[1], "rb") as stdout:
        assert stdout.readline() == b"started\n"
    for fd in (fds[0], fds[2], read, write):
        os.close(fd)
    assert os.waitstatus_to_exitcode(agent.wait_exit("slower")) == 0


SPAWN: dict[str, object] = {
    "env": [], "dir": b"", "user": "", "tty": None, "rlimits": {}, "bounding": None, "no_new_privs": False,
    "program": None, "program_args": {}, "gated": False,
}  # fmt: skip


def test_an_upgrade_that_cannot_be_leaves_the_old_agent(
    agent: AgentClient,
    bundle: RuntimeBundle,
    bundles: Path,
    tmp_path: Path,
) -> None:
    """Nothing there, no program, one that fails, one that does not understand the state: all are told why."""
    streams = agent.spawn("runs", [b"cat"])
    fails = build_changed(
        bundles, tmp_path / "a", append("agent/handover.py", "def unpack(fd): raise OSError('no luck')")
    )
    foreign = build_changed(
        bundles, tmp_path / "b", lambda p: replace_in(p / "agent/handover.py", "FORMAT = 1", "FORMAT = 2")
    )
    fields = upgrade_fields(bundle)
    attempts = [
        ({**fields, "argv": [b"/no/such"]}, "No such file"),
        ({**fields, "argv": [b"/etc/passwd"]}, "denied"),
        ({**fields, "argv": [b"/bin/grep"]}, "grep: .*No such file"),
        (upgrade_fields(fails), "no luck"),
        (upgrade_fields(foreign), "format"),
    ]
    for attempt, reason in attempts:
        with pytest.raises(AgentError, match=reason) as caught:
            agent.request("upgrade", **attempt)
        assert caught.value.code == "upgrade_failed"
        assert agent.hello()["build"] == bundle.version
    streams.write(b"still\n")
    assert streams.read_until("stdout", b"\n") == b"still\n"
    streams.close()
    agent.request("signal", id="runs", signal=9, group=False)
    agent.wait_exit("runs")


def test_a_program_that_vanishes_between_check_and_exec_leaves_the_old_agent(
    agent: AgentClient, bundle: RuntimeBundle, place: Path
) -> None:
    """The exec itself fails: descriptors are closed on exec again, signals arrive again."""
    script = b'#!/bin/sh\n[ "$1" = check ] && /bin/busybox rm "$0"\nexit 0\n'
    program = place / "rootfs/bin/once"
    program.write_bytes(script)
    program.chmod(0o755)
    with pytest.raises(AgentError, match="cannot be executed: No such file"):
        agent.request("upgrade", build="x", argv=[b"/bin/once"], env=[])
    assert agent.run("p", sh("ls /proc/self/fd | wc -l"))[0] != 127
    assert agent.run("p", sh("ls -l /proc/self/fd"))[1].count(b" -> pipe:") == 3
    assert agent.hello()["build"] == bundle.version


def test_no_process_can_get_at_pid_1_meanwhile(
    place: Path, agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle
) -> None:
    """An exec makes a process dumpable until it says otherwise; signals would meet the interpreter unprepared."""
    spy = agent.spawn(
        "spy", sh("while true; do cat /proc/1/environ && echo SEEN; kill -INT 1; done 2>/dev/null")
    )
    for target in [other, bundle] * 15:
        upgrade(agent, target)
    agent.request("signal", id="spy", signal=9, group=True)
    agent.wait_exit("spy")
    agent.request("drop_output", id="spy", stream="stdout")
    assert spy.read_all("stdout") == b""
    spy.close()


def test_the_latest_of_two_upgrades_counts(
    path: Path, agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle
) -> None:
    """A server was killed in the middle of one, and the next one asks, too."""
    first = agent.send("upgrade", **upgrade_fields(other))
    with AgentClient(path) as second:
        assert upgrade(second, bundle)["build"] == bundle.version
    with pytest.raises(AgentError, match="another upgrade"):
        agent.receive(first)


def test_no_descriptor_is_left_behind_by_upgrades(
    agent: AgentClient, bundle: RuntimeBundle, other: RuntimeBundle, place: Path
) -> None:
    """Neither in PID 1 nor in what it starts."""
    streams = agent.spawn("t", [b"cat"], tty={"rows": 1, "columns": 1})
    upgrade(agent, other)
    before = agent.run("p", COUNT)
    for target in [bundle, other] * 5:
        upgrade(agent, target)
    assert agent.run("p", COUNT) == before
    streams.close()


# The pause lets the agent drop its ends of the counting process's own streams.
COUNT = sh("sleep 0.3; ls /proc/1/fd | wc -l; ls /proc/self/fd | wc -l")
