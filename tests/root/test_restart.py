"""The server goes away and comes back; containers, processes and their output do not notice."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of, pids_in
from kit.garden import sh, text_of, wait_until
from kit.patience import FACTOR
from kit.server import ServerProcess, running_server
from own_server import own_server

from garden_py.client import (
    ContainerSpec,
    ContainerState,
    EgressAction,
    EgressPolicy,
    EventKind,
    GardenClient,
    Limits,
)

pytestmark = pytest.mark.root

__all__ = ["own_server"]  # the fixtures `server`

ENDINGS: dict[str, Callable[[ServerProcess], object]] = {
    "SIGTERM": ServerProcess.stop,
    "SIGKILL": ServerProcess.kill,
}


@pytest.fixture(params=ENDINGS)
def restart(request: pytest.FixtureRequest) -> Callable[[ServerProcess], None]:
    """End a server one way or the other, and start the next one on the same directories."""

    def end_and_start(server: ServerProcess) -> None:
        ENDINGS[request.param](server)
        server.start()

    return end_and_start


@pytest.mark.parametrize(
    "restart", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.cgroup2)], indirect=True
)
def test_container_is_as_it_was(server: ServerProcess, restart: Callable[[ServerProcess], None]) -> None:
    """Properties, limits, ports, egress, addresses: everything a caller was told still holds."""
    spec = ContainerSpec(
        handle="steady",
        properties={"owner": "me"},
        limits=Limits(memory_bytes=64 << 20),
        egress=EgressPolicy(default_action=EgressAction.DENY),
    )
    with GardenClient(server.address) as garden:
        container = garden.create(spec)
        port = container.map_port(8080)
        container.update_properties({"later": "yes"})
        before = container.info()
        restart(server)
        after = garden.container("steady").info()
        assert after == before
        assert port in after.mapped_ports
        assert container.limits().memory_bytes == 64 << 20
        assert container.egress().default_action is EgressAction.DENY
        assert text_of(container, "hostname") == "steady\n"
        with garden.create() as other:
            assert other.info().container_ip != before.container_ip


def test_output_and_exit_survive(server: ServerProcess, restart: Callable[[ServerProcess], None]) -> None:
    """A process writes while there is no server: not a byte is lost or repeated, and its exit is known."""
    with GardenClient(server.address) as garden:
        container = garden.create()
        process = container.start(sh("for i in $(seq 300); do echo line $i; sleep 0.01; done; exit 42"))
        wait_until(lambda: container.processes()[0].stdout_bytes > 100, "some output")
        restart(server)
        output = container.attach(process.id, stdout_offset=0).output()
        assert output.stdout.decode().splitlines() == [f"line {i}" for i in range(1, 301)]
        assert output.exit.code == 42


def test_input_goes_on_where_it_was(server: ServerProcess, restart: Callable[[ServerProcess], None]) -> None:
    """No byte of stdin is fed twice or lost, whether the process had read it, the pipe held it, or neither."""
    data = random.Random(1).randbytes(9 << 20)
    with GardenClient(server.address) as garden:
        container = garden.create()
        with container.run(sh("sleep 3; sha256sum")) as process:
            for at in range(0, 3 << 20, 1 << 18):
                process.stdin.write(data[at : at + (1 << 18)])
                if at == 1 << 19:
                    restart(server)
            restart(server)
            process.stdin.write(data[3 << 20 :])
            process.stdin.close()
            output = process.output()
        assert output.exit.code == 0
        assert output.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_exit_while_no_server_ran_is_known(server: ServerProcess) -> None:
    """The agent keeps an exit until a server has written it down."""
    with GardenClient(server.address) as garden:
        container = garden.create()
        quick = container.start(["true"])
        assert container.wait(quick.id).code == 0
        process = container.start(sh("sleep 0.3; echo gone by then; exit 9"))
        server.kill()
        wait_until(lambda: not workload_of(container.handle), "the end of the process")
        server.start()
        assert container.wait(process.id).code == 9
        assert container.wait(quick.id).code == 0
        assert b"".join(chunk.data for chunk in container.read_output(process.id)) == b"gone by then\n"


def test_out_of_memory_while_no_server_ran_is_told(server: ServerProcess) -> None:
    """By the event, and among the container's, where Garden's schedulers look for it after the exit."""
    hungry = "sleep 0.5; exec tail /dev/zero"
    with GardenClient(server.address) as garden:
        container = garden.create(ContainerSpec(limits=Limits(memory_bytes=64 << 20)))
        events = garden.events([container.handle])
        cursor = next(events).cursor
        container.start(sh(hungry), id="shared")
        container.start(sh(hungry), id="own", limits=Limits(memory_bytes=8 << 20))
        server.kill()
        wait_until(lambda: not workload_of(container.handle), "the end of the processes")
        server.start()
        for name in ("shared", "own"):
            assert container.wait(name).out_of_memory
        told = []
        for event in garden.events([container.handle], after_cursor=cursor):
            if event.kind is EventKind.OUT_OF_MEMORY:
                told.append(event.process_id)
                if len(told) == 2:
                    break
        assert sorted(told) == ["", "own"]
        for end in ENDINGS.values():
            assert container.info().events == ("Out of memory", "Out of memory")
            end(server)
            server.start()
        assert container.info().events == ("Out of memory", "Out of memory")


def workload_of(handle: str) -> list[int]:
    """Pids of a container's processes without its agent, seen without the help of any server."""
    return [pid for directory in cgroups_of(handle) for pid in pids_in(directory / "work")]


def test_container_whose_pid_1_died_meanwhile_is_broken_and_can_go(server: ServerProcess) -> None:
    """What cannot be taken over is reported with its reason, and destroy works."""
    with GardenClient(server.address) as garden:
        container = garden.create()
        done = container.run(sh("echo kept; exit 3"))
        assert done.output().exit.code == 3
        running = container.start(["sleep", "100"])
        pid = container.info().pid
        server.kill()
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        server.start()
        info = container.info()
        assert info.state is ContainerState.BROKEN
        assert "PID 1" in info.state_reason
        assert container.wait(done.id).code == 3
        assert b"".join(chunk.data for chunk in container.read_output(done.id)) == b"kept\n"
        assert container.wait(running.id).signal == 9
        assert "broken" in container.wait(running.id).reason
        server.kill()
        server.start()
        assert container.wait(done.id).code == 3
        container.destroy()
        assert list(garden.list(all_states=True)) == []


def test_create_cut_short_leaves_nothing(server: ServerProcess) -> None:
    """SIGKILL in the middle of creates: the next server removes what is half made."""
    script = (
        "import sys; from garden_py.client import GardenClient\n"
        "with GardenClient(sys.argv[1]) as g:\n"
        "    print('go', flush=True)\n"
        "    while True: g.create().run(['true']).output()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, server.address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as client:
        assert client.stdout is not None
        client.stdout.readline()
        with GardenClient(server.address) as garden:
            wait_until(lambda: len(list(garden.list())) >= 3, "some containers")
            server.kill()
            client.kill()
            server.start()
            wait_until(
                lambda: all(c.state is ContainerState.ACTIVE for c in garden.list(all_states=True)),
                "the removal of half-made containers",
            )
            for info in list(garden.list()):
                assert text_of(garden.container(info.handle), "echo alive") == "alive\n"


def test_second_server_on_one_state_directory_is_refused(server: ServerProcess) -> None:
    """The message says who has it."""
    done = subprocess.run(
        [sys.executable, "-m", "garden_py", "server", *server.flags],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert f"pid {server.pid}" in done.stderr
    assert "--state-dir" in done.stderr


def test_second_server_on_one_run_directory_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    """It would end the first one's launcher, and take its agents' sockets for rubbish."""
    with GardenClient(server.address) as garden, garden.create() as box:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "garden_py",
                "server",
                *server.flags,
                "--state-dir",
                str(tmp_path / "state"),
            ],
            capture_output=True,
            text=True,
            timeout=30 * FACTOR,
        )
        assert done.returncode == 1
        assert f"pid {server.pid}" in done.stderr
        assert "--run-dir" in done.stderr
        assert box.run(["true"]).output().exit.code == 0
        with garden.create() as another:
            assert another.run(["true"]).output().exit.code == 0


def test_two_servers_side_by_side(server: ServerProcess) -> None:
    """Each sees its own containers only, and the end of one does not touch the other."""
    with (
        running_server() as other,
        GardenClient(server.address) as mine,
        GardenClient(other.address) as theirs,
    ):
        container = mine.create()
        with theirs.create() as guest:
            assert [c.handle for c in theirs.list()] == [guest.handle]
            assert [c.handle for c in mine.list()] == [container.handle]
        other.stop()
        assert text_of(container, "ip -o addr show eth0 | wc -l") == "1\n"
        other.start()


def test_watcher_misses_nothing_through_restarts(no_trace: None) -> None:
    """Its cursor is good for the next server, which tells what happened while there was none."""
    with running_server() as server, GardenClient(server.address) as garden:
        watched = garden.events()
        cursor = next(watched).cursor
        with garden.create(ContainerSpec(handle="watched")) as box:
            process = box.start(["sleep", "1000"])
            server.kill()
            (pid,) = set(workload_of("watched"))
            os.kill(pid, signal.SIGKILL)
            server.start()
            box.update_properties({"still": "here"})
            server.kill()
            server.start()
        kinds = [next(watched).kind for _ in range(5)]
        again = garden.events(["watched"], after_cursor=cursor)
        found = [next(again) for _ in range(5)]
        assert [event.kind for event in found] == kinds
        assert [event.kind for event in found] == [
            EventKind.CONTAINER_CREATED, EventKind.PROCESS_STARTED, EventKind.PROCESS_EXITED,
            EventKind.PROPERTIES_CHANGED, EventKind.CONTAINER_DESTROYED,
        ]  # fmt: skip
        assert found[2].process_id == process.id
        assert found[2].exit is not None
        assert found[2].exit.signal == signal.SIGKILL
