"""Servers and agents of different releases, and agents that are not what they should be, in real containers."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from kit.bundles import append, build_changed, replace_in
from kit.patience import FACTOR
from kit.stage import Stage, eventually, exit_of, output_of, read_exactly
from kit.trace import assert_no_trace, snapshot

from garden_py import wire
from garden_py.backend.cgroup.groups import pids_in
from garden_py.backend.linux import open_linux_backend, site, upgrades
from garden_py.backend.linux.backend import LinuxBackend
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle
from garden_py.client import Container
from garden_py.config import Config, load_config
from garden_py.model import errors
from garden_py.model.process import OutputStream, Sidecar, WindowSize
from garden_py.service.ports import RunningProcess

pytestmark = pytest.mark.root

STDOUT = OutputStream.STDOUT
WIRE_1 = Path(__file__).parents[1] / "fixtures/agent-wire-1.tar.xz"
BuildBundle = Callable[[Path], RuntimeBundle]


@pytest.fixture
def config() -> Iterator[Config]:
    before = snapshot()
    place = Path(tempfile.mkdtemp(prefix="gv-", dir="/var/tmp"))
    place.chmod(0o755)
    slot = os.getpid() % 20
    yield load_config(
        {
            "state_dir": str(place / "state"),
            "run_dir": str(place / "run"),
            "network_pool": f"10.{200 + slot}.0.0/28",
            "port_pool_start": 46_000 + slot * 10,
            "port_pool_size": 4,
            "uid_pool_start": 0x7000_0000 + (340 + slot) * 65_536 * 20,
            "uid_pool_size": 20,
            "agent_patience_s": 1.0 * FACTOR,
            "agent_check_s": 1.0 * FACTOR,
        },
        environ={},
    )
    shutil.rmtree(place)
    assert_no_trace(before)


@pytest.fixture(autouse=True)
def upgrades_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for a server to have started; here there is none."""
    monkeypatch.setattr(upgrades, "_DELAY_S", 0)


@pytest.fixture
async def stage(config: Config) -> AsyncIterator[Stage]:
    """An open backend; afterwards its containers are destroyed."""
    stage = Stage(lambda: open_linux_backend(config), open_linux_backend(config))
    await stage.backend.open(stage.heard.events(), [])
    yield stage
    await stage.clear()


async def reopen(stage: Stage, monkeypatch: pytest.MonkeyPatch, build: BuildBundle) -> dict[str, str]:
    """Another server takes over, with another bundle; what it could not take over."""
    monkeypatch.setattr(site, "build_runtime_bundle", build)
    return await stage.restart()


def changed(tmp_path: Path, change: Callable[[Path], None]) -> BuildBundle:
    """Builds a bundle of changed sources."""
    place = Path(tempfile.mkdtemp(dir=tmp_path))
    return lambda parent: build_changed(parent, place / f"p{len(os.listdir(place))}", change)


def wire_1(tmp_path: Path) -> BuildBundle:
    """Builds the bundle of the agent as it was before it could be upgraded."""
    with tarfile.open(WIRE_1) as archive:
        archive.extractall(tmp_path / "wire-1")

    def build(parent: Path) -> RuntimeBundle:
        bundle = build_runtime_bundle(parent, tmp_path / "wire-1" / "garden_py")
        return OldBundle(*(getattr(bundle, field.name) for field in dataclasses.fields(bundle)))

    return build


class OldBundle(RuntimeBundle):
    """Its agent's entry took no argument."""

    def argv(self, mounted_at: str) -> list[str]:
        return [*super().argv(mounted_at)[:-1], "from garden_py.agent.main import main; main()"]


async def talk(process: RunningProcess, text: bytes) -> None:
    """A `cat` gives back what it is told, after all it has given back before."""
    offset = process.output(STDOUT).end_offset
    await process.write_stdin(text, None)
    assert (await read_exactly(process.output(STDOUT), offset + len(text)))[offset:] == text


def linux(stage: Stage) -> LinuxBackend:
    assert isinstance(stage.backend, LinuxBackend)
    return stage.backend


async def test_agent_of_another_build_is_upgraded_in_the_background(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes, terminals and exits go on; the same PID 1, whose build is told."""
    handle, privileged = await stage.create(), await stage.create(privileged=True)
    cats = {name: await stage.start(name, "cat") for name in (handle, privileged)}
    terminal = await stage.start(
        handle, "sh", "-c", "stty raw -echo; echo ready; cat", tty=WindowSize(24, 80)
    )
    await read_exactly(terminal.output(STDOUT), 6)
    ended = await stage.start(handle, "sh", "-c", "exit 5")
    pids = {name: stage.backend.pid(name) for name in cats}
    assert stage.backend.agent(handle).current
    for number in range(3):
        build = changed(tmp_path, append("agent/loop.py", f"# build {number}"))
        lost = await reopen(stage, monkeypatch, build)
        assert lost == {}
        cats = {name: await stage.adopt(name, cat) for name, cat in cats.items()}  # type: ignore[misc]
        terminal = await stage.adopt(handle, terminal)
        ended = await stage.adopt(handle, ended)
        assert not stage.backend.agent(handle).current
        for name in cats:
            await stage.backend.adopted(name)
        for name, cat in cats.items():
            await talk(cat, b"during\n")
            await eventually(lambda name=name: stage.backend.agent(name).current, "the upgrade")  # type: ignore[misc]
            await talk(cat, b"after\n")
            assert stage.backend.pid(name) == pids[name]
        await talk(terminal, b"typed")
        assert await exit_of(ended) == (5, None)
    later = await stage.start(handle, "sh", "-c", "echo later; exit 3")
    assert await exit_of(later) == (3, None)
    assert (await output_of(later))[0] == b"later\n"
    assert stage.heard.broken == []


async def start_sidecar(
    stage: Stage, config: Config, handle: str, *argv: str, **fields: Any
) -> RunningProcess:
    (image,) = (config.state_dir / "rootfs").iterdir()
    return await stage.start(handle, *argv, sidecar=Sidecar(str(image)), **fields)


async def test_agent_of_a_sidecar_is_upgraded_too(
    stage: Stage, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process goes on, also a terminal; the exit comes from the new agent."""
    handle = await stage.create()
    cat = await start_sidecar(stage, config, handle, "cat")
    terminal = await start_sidecar(
        stage, config, handle, "sh", "-c", "stty raw -echo; echo ready; cat", tty=WindowSize(24, 80)
    )
    await read_exactly(terminal.output(STDOUT), 6)
    assert await reopen(stage, monkeypatch, changed(tmp_path, append("agent/loop.py", "# later"))) == {}
    cat, terminal = await stage.adopt(handle, cat), await stage.adopt(handle, terminal)
    sidecars = linux(stage)._containers[handle].sidecars
    old = {sidecar.link.build for sidecar in sidecars.values()}
    await stage.backend.adopted(handle)
    await talk(cat, b"during\n")
    await eventually(
        lambda: old.isdisjoint(sidecar.link.build for sidecar in sidecars.values()), "the upgrade of both"
    )
    await talk(cat, b"after\n")
    await talk(terminal, b"typed")
    await cat.close_stdin()
    assert await exit_of(cat) == (0, None)
    assert stage.heard.broken == []


async def test_stopped_agent_of_a_sidecar_costs_its_own_process_only(stage: Stage, config: Config) -> None:
    """Nobody has asked it anything: it is found by being asked."""
    handle = await stage.create()
    victim = await start_sidecar(stage, config, handle, "sleep", "1000", id="victim")
    cat = await start_sidecar(stage, config, handle, "cat")
    cgroup = linux(stage)._containers[handle].cgroup.sidecar("victim")
    (pid,) = pids_in(cgroup)
    os.kill(pid, signal.SIGSTOP)
    assert await exit_of(victim) == (None, signal.SIGKILL)
    victim.exit_recorded()
    await talk(cat, b"still here\n")
    assert stage.heard.broken == []
    await eventually(lambda: not pids_in(cgroup), "the end of the stopped agent")


async def test_agent_of_wire_version_1_is_spoken_with_and_stays(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed, runs processes with and without terminal, and is no reason for anything to break."""
    await reopen(stage, monkeypatch, wire_1(tmp_path))
    handle = await stage.create()
    cat = await stage.start(handle, "cat")
    await talk(cat, b"hello\n")
    assert await reopen(stage, monkeypatch, build_runtime_bundle) == {}
    cat = await stage.adopt(handle, cat)
    await stage.backend.adopted(handle)
    await eventually(lambda: stage.backend.agent(handle).problem != "", "the attempt")
    agent = stage.backend.agent(handle)
    assert (agent.wire, agent.current) == (1, False)
    assert "knows no upgrade" in agent.problem
    await talk(cat, b"again\n")
    process = await stage.start(handle, "sh", "-c", "echo out; echo err >&2; exit 4")
    assert await exit_of(process) == (4, None)
    assert await output_of(process) == (b"out\n", b"err\n")
    terminal = await stage.start(handle, "sh", "-c", "read x; stty size; exit $x", tty=WindowSize(3, 4))
    await terminal.resize(WindowSize(7, 9))
    await terminal.write_stdin(b"6\n", None)
    assert await exit_of(terminal) == (6, None)
    assert b"7 9" in (await output_of(terminal))[0]
    with pytest.raises(errors.InvalidField, match="not recorded"):
        await stage.start(handle, "true", record=fail_to_record)
    with pytest.raises(errors.ExecutableNotFound):
        await stage.start(handle, "nosuch")
    assert stage.heard.broken == []


def fail_to_record() -> None:
    raise errors.InvalidField("x", "not recorded")


async def test_agent_is_upgraded_to_the_next_wire_version(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server of the next release finds: it speaks the version before until the agent is replaced."""
    handle = await stage.create()
    cat = await stage.start(handle, "cat")
    future = wire.VERSION + 1
    monkeypatch.setattr(wire, "OLDEST", wire.VERSION)
    monkeypatch.setattr(wire, "VERSION", future)
    build = changed(tmp_path, set_version(future))
    assert await reopen(stage, monkeypatch, build) == {}
    cat = await stage.adopt(handle, cat)
    assert stage.backend.agent(handle).wire == future - 1
    await stage.backend.adopted(handle)
    await eventually(lambda: stage.backend.agent(handle).current, "the upgrade")
    assert stage.backend.agent(handle).wire == future
    await talk(cat, b"still here\n")


def set_version(version: int) -> Callable[[Path], None]:
    return lambda package: replace_in(
        package / "wire.py", f"\nVERSION = {version - 1}\n", f"\nVERSION = {version}\n"
    )


async def test_agent_of_a_later_release_is_a_broken_container_that_is_left_alone(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was taken back to an older release says so, and ends nobody's processes."""
    await reopen(stage, monkeypatch, changed(tmp_path, set_version(wire.VERSION + 1)))
    with monkeypatch.context() as patch:
        patch.setattr(wire, "VERSION", wire.VERSION + 1)
        handle = await stage.create()
        pid = stage.backend.pid(handle)
    lost = await reopen(stage, monkeypatch, build_runtime_bundle)
    assert "another release" in lost[handle]
    assert f"version {wire.VERSION + 1}" in lost[handle]
    os.kill(pid, 0)
    other = await stage.create()
    assert await exit_of(await stage.start(other, "true")) == (0, None)


async def test_upgrade_that_fails_leaves_the_container_whole(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason can be asked for; processes can be started as before."""
    handle = await stage.create()
    cat = await stage.start(handle, "cat")
    bad = append("agent/handover.py", "def take_over(*_): raise OSError('no luck')")
    assert await reopen(stage, monkeypatch, changed(tmp_path, bad)) == {}
    cat = await stage.adopt(handle, cat)
    await stage.backend.adopted(handle)
    await eventually(lambda: stage.backend.agent(handle).problem != "", "the attempt")
    assert "no luck" in stage.backend.agent(handle).problem
    await talk(cat, b"still\n")
    assert await exit_of(await stage.start(handle, "true")) == (0, None)


async def test_what_the_journal_does_not_know_is_ended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """E.g. the archiver of a copy whose server was killed: its input would stay open for ever."""
    handle = await stage.create()
    known, unknown = await stage.start(handle, "cat"), await stage.start(handle, "cat")
    assert unknown.id != known.id
    await stage.restart()
    known = await stage.adopt(handle, known)
    await stage.backend.adopted(handle)
    await eventually(lambda: stage.backend.workload_count(handle) == 1, "the end of the unknown process")
    await talk(known, b"known\n")


async def test_stopped_agent_breaks_its_container_only(stage: Stage) -> None:
    """Nobody asks it anything; that it does not answer is found out. Its processes end, so SIGCONT changes nothing."""
    handle, other = await stage.create(), await stage.create()
    sleeper = await stage.start(handle, "sleep", "1000")
    pid = stage.backend.pid(handle)
    os.kill(pid, signal.SIGSTOP)
    await eventually(lambda: stage.heard.broken != [], "the report")
    ((broken, reason),) = stage.heard.broken
    assert (broken, "does not answer" in reason) == (handle, True)
    assert await exit_of(sleeper) == (None, signal.SIGKILL)
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "the end of its processes")
    with pytest.raises(errors.ContainerBroken, match="does not answer"):
        await stage.start(handle, "true")
    assert await exit_of(await stage.start(other, "true")) == (0, None)
    await stage.destroy(handle)
    del stage.facts[handle]


async def test_agent_stopped_while_no_server_ran_is_found_at_the_start(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many attempts as its backlog holds, and more."""
    handle = await stage.create()
    os.kill(stage.backend.pid(handle), signal.SIGSTOP)
    monkeypatch.setattr("garden_py.backend.linux.backend._REATTACH_TIMEOUT_S", 0.2)
    lost = await stage.restart()
    assert "does not answer" in lost[handle]


async def test_agent_whose_socket_was_removed_is_given_up(stage: Stage, config: Config) -> None:
    """Its processes are told to have ended, so they must."""
    handle = await stage.create()
    sleeper = await stage.start(handle, "sleep", "1000")
    for path in (config.run_dir / "agents").iterdir():
        path.unlink()
    lost = await stage.restart()
    assert "cannot be reached" in lost[handle]
    assert await exit_of(await stage.adopt(handle, sleeper)) == (None, signal.SIGKILL)
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "the end of its processes")


async def test_start_that_takes_too_long_does_not_run_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passwd on a file system that hangs would do it; here the gate is opened late."""
    monkeypatch.setattr("garden_py.backend.streams.agent_link.SPAWN_TIMEOUT_S", 0.5)
    monkeypatch.setattr("garden_py.backend.streams.gate.Gate.open", lambda gate: None)
    handle = await stage.create()
    with pytest.raises(errors.ProcessStartFailed, match="did not start"):
        await stage.start(handle, "touch", "/started", id="late")
    monkeypatch.undo()
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "its end")
    assert await exit_of(await stage.start(handle, "ls", "/started", id="late")) == (1, None)
    assert stage.heard.broken == []


# What a taken-over PID 1 may do to the server; `fd` is its connection, `frame` makes frames.
HOSTILE = {
    "garbage": "while True: posix.write(fd, b'x' * 65536)",
    "a huge frame": "posix.write(fd, b'GA' + bytes([1, 4]) + bytes(4) + b'\\xff' * 4 + bytes(4))",
    "endless events": "data = frame(4, 0, {'event': 'exited', 'process': 'x', 'status': 0, 'ended_ns': 0}) * 100\n"
    "while True: posix.write(fd, data)",
    "big events": "data = frame(4, 0, {'event': [None] * 100000})\nwhile True: posix.write(fd, data)",
    "answers to nobody": "data = frame(2, 7, {}) * 1000\nwhile True: posix.write(fd, data)",
    "descriptors": "import _socket\ns = _socket.socket(fileno=fd)\n"
    "while True: s.sendmsg([b'G'], [(1, 1, b'\\0\\0\\0\\0' * 16)])",
    "silence": "signal.pause()",
    "its own end": "posix._exit(0)",
}
_PREPARE = """
import posix, sys, _signal as signal
if sys.argv[1] == "check": posix._exit(0)
from garden_py import wire
from garden_py.agent.handover import unpack
frame = wire.encode_frame
estate = unpack(int(sys.argv[2]))
fd = estate["connections"][0]["fd"]
posix.set_blocking(fd, True)
posix.write(fd, frame(2, estate["asker"][1], {"wire": 2, "build": "hostile"}))
"""


async def take_over_pid_1(stage: Stage, handle: str, script: str) -> None:
    """Have a script run in the agent's place, with the agent's connection."""
    backend = linux(stage)
    bundle = backend._site.bundle
    argv = [*bundle.argv(site.AGENT_TARGET)[:-1], _PREPARE + script]
    with suppress(errors.ContainerBroken):  # it may begin before its answer was seen
        await backend._containers[handle].link.upgrade("hostile", argv, bundle.env)


@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_agent_breaks_its_container_only(stage: Stage, kind: str) -> None:
    """Whatever it sends: the server's memory stays bounded, and others' processes start meanwhile."""
    handle, other = await stage.create(), await stage.create()
    sleeper = await stage.start(handle, "sleep", "1000")
    before = resident_bytes()
    await take_over_pid_1(stage, handle, HOSTILE[kind])
    while not stage.heard.broken:
        async with asyncio.timeout(20):
            assert await exit_of(await stage.start(other, "true")) == (0, None)
            await asyncio.sleep(0)
    ((broken, reason),) = stage.heard.broken
    assert broken == handle
    assert reason
    assert await exit_of(sleeper) == (None, signal.SIGKILL)
    assert resident_bytes() - before < 16 << 20
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "the end of its processes")
    await stage.destroy(handle)
    del stage.facts[handle]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# `answer` is sent as reply to every request.
WRONG: dict[str, Any] = {
    "no pid": "{'fds': []}",
    "a strange pid": "{'pid': 1, 'fds': []}",
    "descriptors that did not come": "{'pid': 7, 'fds': ['stdin', 'stdout', 'stderr']}",
    "not its kind": "{'pid': 7, 'fds': {'stdin': 3}}",
}
_ANSWER = """
decoder = wire.Decoder()
while True:
    for request in decoder.feed(posix.read(fd, 65536)):
        posix.write(fd, frame(2, request.id, %s))
"""


@pytest.mark.parametrize("kind", WRONG)
async def test_wrong_answers_break_the_container(stage: Stage, kind: str) -> None:
    """The caller and everybody else are told that the agent misbehaves."""
    handle = await stage.create()
    await take_over_pid_1(stage, handle, _ANSWER % WRONG[kind])
    with pytest.raises(errors.ContainerBroken, match="misbehaves"):
        await stage.start(handle, "true")
    assert [name for name, _ in stage.heard.broken] == [handle]
    await stage.destroy(handle)
    del stage.facts[handle]


def test_info_tells_of_the_agent(box: Container) -> None:
    """Which build it is, and that there is nothing to upgrade."""
    agent = box.info().agent
    assert agent is not None
    assert (agent.current, agent.problem, agent.wire_version) == (True, "", wire.VERSION)
    assert len(agent.build) == 16
