"""The cgroup driver systemd, where systemd is PID 1: containers in a scope, and limits that are not its business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.garden import events_of, text_of, wait_until
from kit.patience import FACTOR
from kit.plant import Site
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.backend.cgroup import scope
from garden_py.backend.cgroup.layout import probe_hierarchies
from garden_py.backend.oci.facts import probe_host_facts
from garden_py.client import Container, ContainerSpec, ContainerState, EventKind, GardenClient, Limits

OBSTACLE = scope.find_obstacle(probe_host_facts().cgroup_version)
pytestmark = [pytest.mark.root, pytest.mark.cgroup2]
needs_systemd = pytest.mark.skipif(bool(OBSTACLE), reason=f"systemd cannot be used: {OBSTACLE}")
SLICE, PLACE = "gt-cells.slice", Path("/sys/fs/cgroup/gt.slice/gt-cells.slice")
FLAGS = ("--cgroup-driver", "systemd", "--cgroup-slice", SLICE, "--janitor-interval-s", "0")
MIB = 1 << 20
TIMEOUT_S = 60 * FACTOR
LIMITS = Limits(memory_bytes=64 * MIB, cpu_weight=33, cpu_quota_us=50_000, cpu_period_us=100_000, pids=50)


@pytest.fixture(scope="module")
def server(no_trace: None) -> Iterator[ServerProcess]:
    """One for all, for starts take long where systemd is; the last tests restart and stop it."""
    before = snapshot()
    with running_server(*FLAGS) as server:
        yield server
    systemctl("stop", "gt.slice")  # slices stay, as slices do
    assert_no_trace(before)


@pytest.fixture
def garden(server: ServerProcess) -> Iterator[GardenClient]:
    """A client of that."""
    with GardenClient(server.address) as garden:
        yield garden


def unit_of(server: ServerProcess) -> str:
    return f"garden-{Site(server).tag}.scope"


def systemctl(*words: str) -> str:
    done = subprocess.run(
        ["systemctl", *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout


def properties(unit: str, *names: str) -> dict[str, str]:
    """What systemd says of a unit; also of one that it does not know."""
    lines = systemctl("show", "--property", ",".join(names), unit).splitlines()
    return dict(line.split("=", 1) for line in lines)


def is_gone(unit: str) -> bool:
    """Not even remembered as failed."""
    return properties(unit, "LoadState")["LoadState"] == "not-found"


def directory_of(handle: str) -> Path:
    (found,) = cgroups_of(handle)
    return found


@needs_systemd
def test_containers_are_in_one_delegated_scope(server: ServerProcess, garden: GardenClient) -> None:
    """Of the server's slice; systemd's own tools show them, with their processes, and set no limit of its own."""
    unit = unit_of(server)
    with garden.create(ContainerSpec(handle="shown")) as box:
        box.start(["sleep", "4711"])
        found = properties(unit, "ActiveState", "Slice", "Delegate", "TasksMax", "Transient")
        assert found == {
            "ActiveState": "active",
            "Slice": SLICE,
            "Delegate": "yes",
            "TasksMax": "infinity",
            "Transient": "yes",
        }
        assert directory_of("shown") == PLACE / unit / "shown"
        assert f"/gt.slice/{SLICE}/{unit}/shown/init" in Path(f"/proc/{box.info().pid}/cgroup").read_text()
        status = systemctl("--no-pager", "--full", "status", unit)
        assert "shown" in status
        assert "sleep 4711" in status
        listed = subprocess.run(
            ["systemd-cgls", "--no-pager", "--unit", unit], capture_output=True, text=True, check=True
        )
        assert "shown" in listed.stdout
    assert cgroups_of("shown") == []
    assert properties(unit, "ActiveState") == {"ActiveState": "active"}


@needs_systemd
def test_limits_outlive_what_systemd_does_to_its_units(server: ServerProcess, garden: GardenClient) -> None:
    """Those of the create and those changed since, through a reload, a reexec, and a limit on the whole scope."""
    unit = unit_of(server)
    with garden.create(ContainerSpec(limits=LIMITS)) as box:
        assert as_made(box) == LIMITS
        systemctl("daemon-reload")
        assert as_made(box) == LIMITS
        changed = Limits(
            memory_bytes=96 * MIB, cpu_weight=44, cpu_quota_us=70_000, cpu_period_us=100_000, pids=60
        )
        box.update_limits(changed)
        systemctl("set-property", "--runtime", unit, "CPUWeight=50", "MemoryMax=2G", "TasksMax=5000")
        systemctl("daemon-reload")
        systemctl("daemon-reexec")
        assert as_made(box) == changed
        assert (PLACE / unit / "memory.max").read_text() == f"{2 << 30}\n"
        with garden.create(ContainerSpec(limits=LIMITS)) as other:
            assert as_made(other) == LIMITS


def as_made(box: Container) -> Limits:
    """The limits in force, as far as LIMITS states them."""
    found = box.limits()
    return Limits(
        **{name: getattr(found, name) for name, value in vars_of(LIMITS).items() if value is not None}
    )


def vars_of(limits: Limits) -> dict[str, int | None]:
    return {name: getattr(limits, name) for name in type(limits).__dataclass_fields__}


@needs_systemd
def test_out_of_memory_takes_the_workload_alone(server: ServerProcess, garden: GardenClient) -> None:
    """An OOM kill in its scope is no reason for systemd to end it, or to call it failed."""
    with garden.create(ContainerSpec(limits=Limits(memory_bytes=32 * MIB))) as box, garden.create() as other:
        events = events_of(garden, box.handle)
        hog = box.run(["tail", "/dev/zero"]).output()
        assert (hog.exit.signal, hog.exit.out_of_memory) == (9, True)
        assert next(e for e in events if e.kind is EventKind.OUT_OF_MEMORY).handle == box.handle
        assert text_of(box, "echo alive") == "alive\n"
        assert text_of(other, "echo alive") == "alive\n"
        assert properties(unit_of(server), "ActiveState", "Result") == {
            "ActiveState": "active",
            "Result": "success",
        }


@needs_systemd
def test_leaks_in_the_scope_are_found_and_its_holder_is_none(
    server: ServerProcess, garden: GardenClient
) -> None:
    """A group of nobody's with a process in it."""
    place = f"gt.slice/{SLICE}/{unit_of(server)}/lost"
    with garden.create(), subprocess.Popen(["sleep", "1000"]) as sleeper:
        assert list(garden.check_leaks()) == []
        lost = Path("/sys/fs/cgroup", place)
        (lost / "work").mkdir(parents=True)
        (lost / "work" / "cgroup.procs").write_text(str(sleeper.pid))
        found = {(leak.kind.name, leak.name) for leak in garden.check_leaks(remove=True) if leak.removed}
        assert found == {("CGROUP", place), ("PROCESS", str(sleeper.pid))}
        assert not lost.exists()
        assert list(garden.check_leaks()) == []


@needs_systemd
def test_scope_that_somebody_stops_is_made_again(server: ServerProcess, garden: GardenClient) -> None:
    """Its containers are broken, and told so; the next one has a new scope."""
    unit = unit_of(server)
    victim = garden.create()
    systemctl("stop", unit)
    wait_until(lambda: victim.info().state is ContainerState.BROKEN, "the end")
    with garden.create(ContainerSpec(handle="after")) as box:
        assert text_of(box, "echo alive") == "alive\n"
        assert directory_of("after") == PLACE / unit / "after"
        victim.destroy()
        assert text_of(box, "echo alive") == "alive\n"
        holder = holder_of(unit)
        os.kill(holder, 9)
        wait_until(lambda: not Path(f"/proc/{holder}").exists(), "its end")
        with garden.create():  # the scope has been kept by a container, and gets another holder
            assert holder_of(unit) != holder
    assert properties(unit, "ActiveState") == {"ActiveState": "active"}


def holder_of(unit: str) -> int:
    return int((PLACE / unit / scope.HOLDER / "cgroup.procs").read_text())


@needs_systemd
def test_next_servers_take_over_whatever_their_driver_and_the_last_one_leaves_nothing(
    server: ServerProcess,
) -> None:
    """A container stays where it was made, and the scope as it is until a server stops without containers."""
    unit, tag = unit_of(server), Site(server).tag
    with GardenClient(server.address) as garden:
        old = garden.create(ContainerSpec(handle="old", limits=LIMITS))
        process, pid, holder = old.start(["sleep", "1000"]), old.info().pid, holder_of(unit)
        kill_and_start(server, driver="cgroupfs")
        new = garden.create(ContainerSpec(handle="new"))
        assert directory_of("new") == Path("/sys/fs/cgroup", f"garden-{tag}", "new")
        assert directory_of("old") == PLACE / unit / "old"
        assert as_made(old) == LIMITS
        assert list(garden.check_leaks()) == []
        kill_and_start(server, driver="systemd")
        assert process.id in {each.id for each in old.processes()}
        assert (old.info().pid, holder_of(unit)) == (pid, holder)
        assert text_of(new, "echo alive") == "alive\n"
        for box in (old, new):
            box.destroy()
    assert server.stop() == 0
    assert is_gone(unit)


def kill_and_start(server: ServerProcess, *, driver: str) -> None:
    server.kill()
    server.flags[server.flags.index("--cgroup-driver") + 1] = driver
    server.start()


@needs_systemd
def test_scope_without_server_and_containers_is_an_orphan(server: ServerProcess) -> None:
    """What a killed server leaves; the doctor finds it by the journal's word, and has systemd end it."""
    if server.process is not None:
        server.stop()
    left = scope.Scope(probe_hierarchies(2), SLICE, Site(server).tag)
    left.hold()
    state = str(Site(server).state)
    done = subprocess.run(
        [sys.executable, "-m", "garden_py", "doctor", "--leaks", "--fix", "-o", "json", "--state-dir", state],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert [(leak["kind"], leak["name"]) for leak in json.loads(done.stdout)] == [("CGROUP", left.path)]
    assert is_gone(left.unit)
    server.has_served = False  # no other one has to be started that would destroy its containers


@pytest.mark.skipif(not OBSTACLE, reason="systemd runs here")
def test_server_refuses_where_systemd_cannot_be_used(tmp_path: Path) -> None:
    """It does not start, and says why."""
    argv = [sys.executable, "-m", "garden_py", "server", "--cgroup-driver", "systemd"]
    argv += ["--state-dir", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2
    assert f"garden server: --cgroup-driver: systemd cannot be used: {OBSTACLE}" in done.stderr
