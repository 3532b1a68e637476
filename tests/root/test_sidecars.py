"""Sidecars when something goes wrong: restarts, dead agents, destroys in the middle, bad requests; nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.garden import text_of, wait_until
from kit.places import open_to_all
from kit.server import ServerProcess, running_server
from own_server import own_garden, own_server

from garden_py.backend.linux.sidecars import runtime_id_of
from garden_py.client import (
    BindMount,
    Container,
    ContainerSpec,
    ContainerState,
    GardenClient,
    GardenError,
    Limits,
    ProcessSpec,
    Sidecar,
    Tty,
)

pytestmark = pytest.mark.root

__all__ = ["own_garden", "own_server"]  # the fixtures `server` and `garden`


@pytest.fixture
def image(server: ServerProcess) -> str:
    """The embedded root file system serves as a sidecar's as well."""
    (found,) = (server.place / "state/rootfs").iterdir()
    return str(found)


def pea(image: str, script: str, id: str, **sidecar: object) -> ProcessSpec:
    return ProcessSpec("sh", ("-c", script), id=id, sidecar=Sidecar(image, **sidecar))  # type: ignore[arg-type]


def assert_gone(server: ServerProcess, box: Container, id: str) -> None:
    """Directory, cgroups and runtime record of a sidecar are gone, though its container lives."""
    record = runtime_id_of("*", id)

    def left() -> list[str]:
        found = [
            *(server.place / "state/containers" / box.handle / "sidecars").glob(id),
            *(server.place / "run/runc").glob(record),
        ]
        for top in cgroups_of(box.handle):
            for directory, names, _ in os.walk(top):
                found += [Path(directory, name) for name in names if name.endswith(f"-{id}")]
        return list(map(str, found))

    wait_until(lambda: not left(), f"the end of {left()}")


@pytest.mark.parametrize("own_limits", [False, True])
def test_ends_with_its_process_and_takes_along_what_that_has_left(
    server: ServerProcess, garden: GardenClient, image: str, own_limits: bool
) -> None:
    """A child in the background holds stdout: the exit is told, the child is ended, and the stream closes."""
    with garden.create() as box:
        done = box.run(pea(image, "sleep 1000 & echo last words", "main", own_limits=own_limits)).output()
        assert (done.exit.code, done.stdout) == (0, b"last words\n")
        assert_gone(server, box, "main")
        assert not text_of(box, "ps | grep '[s]leep 1000' || true")
        # its id stays taken, its output and exit can be read
        assert box.wait("main").code == 0
        assert b"".join(chunk.data for chunk in box.read_output("main")) == b"last words\n"


@pytest.mark.parametrize("end", [ServerProcess.kill, ServerProcess.stop])
def test_survives_a_restart_of_the_server(
    server: ServerProcess, garden: GardenClient, image: str, end: Callable[[ServerProcess], object]
) -> None:
    """Output, input, exit, metrics and signals of a sidecar go on; one that ended meanwhile is known and removed."""
    box = garden.create(ContainerSpec(handle="steady", limits=Limits(memory_bytes=64 << 20)))
    writer = box.start(pea(image, "for i in $(seq 200); do echo line $i; sleep 0.01; done; exit 7", "writer"))
    lasting = box.start(pea(image, "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done", "lasting"))
    short = box.start(pea(image, "sleep 0.2; exit 3", "short", own_limits=True))
    wait_until(
        lambda: all(each.stdout_bytes for each in box.processes() if each.id != "short"), "some output"
    )
    end(server)
    threading.Event().wait(0.3)  # `short` ends without a server
    server.start()
    output = box.attach(writer.id, stdout_offset=0).output()
    assert output.stdout.decode().splitlines() == [f"line {i}" for i in range(1, 201)]
    assert output.exit.code == 7
    assert box.wait(short.id).code == 3
    (metrics,) = garden.metrics(processes=[(box.handle, lasting.id)])
    assert (metrics.process_id, metrics.error) == ("lasting", "")
    assert metrics.pids >= 1
    box.signal(lasting.id, "TERM")
    assert box.wait(lasting.id).code == 9
    for id in ("writer", "short", "lasting"):
        assert_gone(server, box, id)


def agent_of(handle: str, id: str) -> int:
    """The pid of a sidecar's agent."""
    for directory in cgroups_of(handle):
        file = directory / f"agent-{id}" / "cgroup.procs"
        if file.exists() and (pids := file.read_text().split()):
            return int(pids[0])
    raise AssertionError(f"{id} has no agent")


def test_agent_that_is_killed_costs_its_own_process_only(
    server: ServerProcess, garden: GardenClient, image: str
) -> None:
    """The process is ended and says why; the container and other sidecars are as before."""
    with garden.create() as box:
        victim = box.start(pea(image, "sleep 1000", "victim"))
        other = box.start(pea(image, "sleep 1000", "other"))
        os.kill(agent_of(box.handle, "victim"), signal.SIGKILL)
        exit = box.wait(victim.id)
        assert exit.signal == signal.SIGKILL
        assert "agent" in exit.reason
        assert_gone(server, box, "victim")
        assert box.info().state is ContainerState.ACTIVE
        assert [each.id for each in box.processes() if each.exit is None] == [other.id]


def test_agent_that_died_without_a_server_is_known(
    server: ServerProcess, garden: GardenClient, image: str
) -> None:
    """What its process was is told after the start; the container is taken over as always."""
    with garden.create() as box:
        box.start(pea(image, "sleep 1000", "victim"))
        pid = agent_of(box.handle, "victim")
        server.kill()
        os.kill(pid, signal.SIGKILL)
        server.start()
        assert box.wait("victim").signal == signal.SIGKILL
        assert_gone(server, box, "victim")
        assert text_of(box, "echo fine") == "fine\n"


def test_container_can_be_destroyed_while_sidecars_start(
    server: ServerProcess, garden: GardenClient, image: str
) -> None:
    """Either it came first or it never was; nothing of it is left on the host (which the fixture checks)."""
    for round_ in range(6):
        box = garden.create()
        outcomes: list[str] = []

        def start(number: int, box: Container = box, outcomes: list[str] = outcomes) -> None:
            try:
                box.start(pea(image, "sleep 1000", f"p{number}"))
                outcomes.append("started")
            except GardenError as error:
                outcomes.append(error.code)

        threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        threads[0].join(0.01 + 0.02 * round_)
        box.destroy()
        for thread in threads:
            thread.join(20)
        assert len(outcomes) == 4
        assert set(outcomes) <= {
            "started", "CONTAINER_BROKEN", "CONTAINER_BUSY", "CONTAINER_NOT_FOUND", "HOST_FAULT",
        }  # fmt: skip
    assert not list((server.place / "run/runc").glob("*"))


def test_server_that_is_killed_during_a_start_leaves_nothing_of_it(
    server: ServerProcess, garden: GardenClient, image: str
) -> None:
    """The next server removes what was begun; the id can be used."""
    with garden.create() as box:
        for wait_s in (0.005, 0.02, 0.04, 0.06):
            starting = subprocess.Popen(
                [
                    ".venv/bin/garden",
                    "run",
                    "-d",
                    "--image",
                    image,
                    "--id",
                    "cut",
                    box.handle,
                    "sleep",
                    "1000",
                ],
                env={**os.environ, "GARDEN_ADDRESS": server.address},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            place = server.place / "state/containers" / box.handle / "sidecars/cut"
            wait_until(place.exists, "its directory")
            threading.Event().wait(wait_s)
            server.kill()
            starting.wait(30)
            server.start()
            if any(each.id == "cut" for each in box.processes()):
                box.signal("cut", "KILL")
                box.wait("cut")
                assert_gone(server, box, "cut")
                return
            assert_gone(server, box, "cut")
        assert box.run(pea(image, "echo now", "cut")).output().stdout == b"now\n"


def test_bad_requests_change_nothing(
    server: ServerProcess, garden: GardenClient, image: str, tmp_path: Path
) -> None:
    """Each names its field; nothing is begun."""
    with garden.create() as box:
        bad = {
            "spec.sidecar.image": Sidecar(""),
            "spec.sidecar.bind_mounts[0].source": Sidecar(image, (BindMount("relative", "/x"),)),
            "spec.sidecar.bind_mounts[0].destination": Sidecar(image, (BindMount("/tmp", "/proc/x"),)),
        }
        for field, sidecar in bad.items():
            with pytest.raises(GardenError) as caught:
                box.start(ProcessSpec("true", sidecar=sidecar))
            assert [violation.field for violation in caught.value.fields] == [field]
        for missing in (Sidecar("/no/such/image"), Sidecar(image, (BindMount("/no/such/source", "/x"),))):
            with pytest.raises(GardenError, match="does not exist"):
                box.start(ProcessSpec("true", sidecar=missing))
        with pytest.raises(GardenError, match="not found"):
            box.start(ProcessSpec("no-such-program", sidecar=Sidecar(image), id="absent"))
        assert box.processes() == []
        assert_gone(server, box, "absent")


def test_image_that_nothing_can_be_mounted_in(
    server: ServerProcess, garden: GardenClient, tmp_path: Path
) -> None:
    """It is told as that, nothing is left, and the id can be used again."""
    broken = tmp_path / "image"
    broken.mkdir()
    open_to_all(tmp_path)
    (broken / "proc").symlink_to("/etc")
    (broken / "dev").write_text("a file")
    with garden.create() as box:
        with pytest.raises(GardenError) as caught:
            box.start(pea(str(broken), "true", "p"))
        assert caught.value.code == "IMAGE_INVALID"
        assert_gone(server, box, "p")


def test_many_at_once(server: ServerProcess, garden: GardenClient, image: str) -> None:
    """Twelve sidecars started in one moment, each with its own output and exit."""
    with garden.create() as box:
        ended: dict[int, tuple[int | None, bytes]] = {}

        def run(number: int) -> None:
            done = box.run(
                pea(image, f"echo {number} >/tmp/n; cat /tmp/n; exit {number}", f"p{number}")
            ).output()
            ended[number] = (done.exit.code, done.stdout)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert ended == {number: (number, b"%d\n" % number) for number in range(12)}
        for number in ended:
            assert_gone(server, box, f"p{number}")


def test_terminal_s_last_words_are_not_lost(server: ServerProcess, garden: GardenClient, image: str) -> None:
    """They pass through the agent, which has to live until they have."""
    with garden.create() as box:
        for number in range(12):
            spec = ProcessSpec("seq", ("1", "2000"), id=f"t{number}", tty=Tty(), sidecar=Sidecar(image))
            done = box.run(spec).output()
            assert done.stdout.decode().split() == [str(each) for each in range(1, 2001)]
            assert_gone(server, box, f"t{number}")


def test_command_line(server: ServerProcess, garden: GardenClient, image: str) -> None:
    """`garden run --image`, `garden metrics HANDLE/PROCESS`, and the refusal of options without an image."""

    def cli(*argv: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "GARDEN_ADDRESS": server.address}
        return subprocess.run(
            [".venv/bin/garden", *argv], env=env, capture_output=True, text=True, timeout=30
        )

    with garden.create() as box:
        done = cli(
            "run", "--image", image, "-v", f"{image}/bin:/s", box.handle, "sh", "-c", "ls -d /s/sh; exit 5"
        )
        assert (done.returncode, done.stdout) == (5, "/s/sh\n")
        cli(
            "run",
            "-d",
            "--id",
            "bg",
            "--image",
            image,
            "--own-limits",
            "-m",
            "32M",
            box.handle,
            "sleep",
            "100",
        )
        shown = cli("metrics", f"{box.handle}/bg").stdout.splitlines()[1].split()
        assert (shown[0], shown[3]) == (f"{box.handle}/bg", "32.0M")
        assert cli("run", "--own-limits", box.handle, "true").returncode != 0


def test_isolation_is_the_containers_whatever_the_server_is_told_later(no_trace: None) -> None:
    """A sidecar that is started after a restart with other settings is walled off as its container was made."""
    with running_server("--no-new-privileges") as server, GardenClient(server.address) as garden:
        (image,) = (server.place / "state/rootfs").iterdir()
        box = garden.create()
        server.stop()
        server.flags.remove("--no-new-privileges")
        at = server.flags.index("--uid-pool-start") + 1
        server.flags[at] = str(int(server.flags[at]) + 65_536 * 20)
        server.start()
        assert text_of(box, "cat /proc/self/uid_map") == text_of(
            box, "cat /proc/self/uid_map", sidecar=Sidecar(str(image))
        )
        for sidecar in (None, Sidecar(str(image))):
            assert text_of(box, "grep NoNewPrivs /proc/self/status", sidecar=sidecar).split() == [
                "NoNewPrivs:",
                "1",
            ]
