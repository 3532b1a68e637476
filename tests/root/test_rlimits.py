"""Resource limits (getrlimit(2)) as limits of containers and processes: at the start, changed and read live.

All values are below what a server has itself, so that they can be given on every machine; above it, see
test_resource_limits.py.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from garden_image import garden_door_of, garden_server_with
from kit.cgroups import cgroups_of, matching, pids_in
from kit.garden import PATIENCE, events_of, sh, text_of, wait_until
from kit.garden_http import GardenHttp
from kit.rights import may_raise_limits, raises_limits
from kit.server import ServerProcess, running_server

from garden_py.client import (
    Container,
    ContainerSpec,
    EventKind,
    FailedPrecondition,
    GardenClient,
    InvalidArgument,
    Limits,
    ProcessSpec,
    Sidecar,
    Tty,
)

pytestmark = pytest.mark.root

SHOW = "ulimit -n; ulimit -Hn"
FEW_TASKS = Limits(pids=9)


def rlimits(**values: int) -> Limits:
    return Limits(rlimits=values)


def files_in(box: Container, **fields: Any) -> set[str]:
    """Soft and hard limit of open files of a new process."""
    return set(text_of(box, SHOW, **fields).split())


def sleeper(seconds: int, **fields: Any) -> ProcessSpec:
    """A process that sleeps; how long tells which it is."""
    return ProcessSpec("sleep", (str(seconds),), **fields)


def family(seconds: int, **fields: Any) -> ProcessSpec:
    """A shell with a child and an orphan that sleep."""
    return ProcessSpec("sh", ("-c", f"sleep {seconds} & (sleep {seconds} &); wait"), **fields)


def files_of(box: Container, seconds: int | None = None) -> list[tuple[int, int]]:
    """Soft and hard limit of open files, from the kernel, of those who sleep so long, or of all but the agents."""
    found = []
    tops = cgroups_of(box.handle)
    groups = [group for top in tops for each in ("work", "p-*") for group in matching(top, each)]
    pids = {pid for group in groups for pid in pids_in(group)}
    for pid in pids:
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
            lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if seconds is None or argv == ["sleep", str(seconds)]:
            found += [(int(line.split()[3]), int(line.split()[4])) for line in lines if "open files" in line]
    return found


def start(box: Container, spec: ProcessSpec, seconds: int, count: int) -> None:
    """Start a process and wait until so many sleep so long."""
    box.start(spec)
    wait_until(lambda: len(files_of(box, seconds)) == count, "its processes to be there")


def refusal_of(change: Callable[..., object], *args: object) -> str:
    """The message of a change that is refused for its rlimits."""
    with pytest.raises(FailedPrecondition) as caught:
        change(*args)
    assert (caught.value.code, caught.value.metadata["field"]) == ("LIMIT_REFUSED", "limits.rlimits")
    return str(caught.value)


# --- at the start


@pytest.mark.cgroup2
@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_a_containers_are_its_processes(garden: GardenClient, privileged: bool) -> None:
    """Soft and hard, for any user, with a terminal or not; what a process states itself wins, one by one."""
    with garden.create(ContainerSpec(privileged=privileged, limits=rlimits(nofile=200, fsize=4096))) as box:
        assert box.limits().rlimits == box.info().spec.limits.rlimits == {"nofile": 200, "fsize": 4096}
        for user in ("", "1000:1000"):
            assert files_in(box, user=user) == {"200"}
            assert set(box.run(sh(SHOW), tty=Tty(), user=user).output().stdout.split()) == {b"200"}
        assert files_in(box, rlimits={"nofile": 100}) == {"100"}
        shown = text_of(box, "grep size /proc/self/limits", rlimits={"nofile": 100})
        assert next(line for line in shown.splitlines() if "file size" in line).split()[3:5] == ["4096"] * 2


def test_garden_door_has_them_too(no_trace: None, tmp_path: Path) -> None:
    """A process's own win there likewise."""
    with garden_server_with(tmp_path) as server, GardenClient(server.address) as garden:
        door = GardenHttp(garden_door_of(server))
        with garden.create(ContainerSpec(limits=rlimits(nofile=200, core=0))) as box:
            assert door.text_of(box.handle, "ulimit -n; ulimit -c") == "200\n0\n"
            assert door.text_of(box.handle, "ulimit -n; ulimit -c", rlimits={"nofile": 100}) == "100\n0\n"
            box.update_limits(rlimits(nofile=150))
            assert door.text_of(box.handle, "ulimit -n") == "150\n"


def test_sidecars_have_them_but_beside_the_containers_limits(
    garden_server: ServerProcess, garden: GardenClient
) -> None:
    """Those with own_limits have only what they state themselves."""
    (image,) = (garden_server.place / "state/rootfs").iterdir()
    with garden.create(ContainerSpec(limits=rlimits(nofile=200))) as box:
        for own_limits in (False, True):
            spec = ProcessSpec("sh", ("-c", SHOW), sidecar=Sidecar(str(image), own_limits=own_limits))
            assert (set(box.run(spec).output().stdout.split()) == {b"200"}) is not own_limits


# --- changed while they run


@pytest.mark.cgroup2
def test_change_reaches_what_runs_and_what_will(garden: GardenClient) -> None:
    """Children, orphans and those that are counted by themselves; not PID 1."""
    with garden.create(ContainerSpec(limits=rlimits(nofile=300))) as box:
        start(box, family(1000, id="family"), 1000, 2)
        start(box, sleeper(1000, id="counted", limits=FEW_TASKS), 1000, 3)
        agent, events = Path(f"/proc/{box.info().pid}/limits").read_text(), events_of(garden, box.handle)
        now = {"nofile": 200, "fsize": 1 << 30}
        assert box.update_limits(rlimits(**now)).rlimits == now
        changed = next(each for each in events if each.kind is EventKind.LIMITS_CHANGED)
        assert (changed.handle, changed.process_id) == (box.handle, "")
        assert set(files_of(box)) == {(200, 200)}
        assert files_in(box) == {"200"}
        assert box.limits("family").rlimits == box.limits("counted").rlimits == now
        now = {"nofile": 150, "fsize": 1 << 30}
        assert box.update_limits(rlimits(nofile=150)).rlimits == now
        assert set(files_of(box)) == {(150, 150)}
        assert Path(f"/proc/{box.info().pid}/limits").read_text() == agent
        assert box.limits().rlimits == box.info().spec.limits.rlimits == now


@pytest.mark.cgroup2
def test_what_a_process_states_itself_stays(garden: GardenClient) -> None:
    """In that resource, and down to its orphans, also when it has ended itself."""
    own = {"nofile": 280}
    with garden.create(ContainerSpec(limits=rlimits(nofile=300))) as box:
        start(box, family(1000, id="own", rlimits=own), 1000, 2)
        start(box, sleeper(1000, limits=FEW_TASKS, rlimits=own), 1000, 3)
        box.run(sh("sleep 1000 >/dev/null 2>&1 &"), rlimits=own).wait(PATIENCE)
        box.update_limits(rlimits(nofile=200, core=0))
        assert files_of(box, 1000) == [(280, 280)] * 4
        assert box.limits("own").rlimits == {"nofile": 280, "core": 0}


@pytest.mark.cgroup2
def test_change_of_one_process_is_its_descendants(garden: GardenClient) -> None:
    """And nobody else's; from then on it is what the process states itself."""
    with garden.create() as box:
        start(box, family(1001, id="tree"), 1001, 2)
        start(box, family(1002, id="counted", limits=FEW_TASKS), 1002, 2)
        start(box, family(1003, id="other"), 1003, 2)
        before = files_of(box, 1003)
        for seconds, process_id in ((1001, "tree"), (1002, "counted")):
            assert box.update_limits(rlimits(nofile=120), process_id).rlimits == {"nofile": 120}
            assert files_of(box, seconds) == [(120, 120)] * 2
        assert files_of(box, 1003) == before
        stated = {process.id: dict(process.spec.rlimits) for process in box.processes()}
        assert stated == {"tree": {"nofile": 120}, "counted": {"nofile": 120}, "other": {}}
        box.update_limits(rlimits(nofile=110))
        assert files_of(box, 1001) + files_of(box, 1002) == [(120, 120)] * 4
        assert files_of(box, 1003) == [(110, 110)] * 2
        box.update_limits(rlimits(core=0), "tree")
        assert box.limits("tree").rlimits == {"nofile": 120, "core": 0}


def test_sidecars_are_changed_with_the_container_or_alone(
    garden_server: ServerProcess, garden: GardenClient
) -> None:
    """One that is beside its container's limits only alone."""
    (image,) = (garden_server.place / "state/rootfs").iterdir()
    with garden.create(ContainerSpec(limits=rlimits(nofile=300))) as box:
        start(box, family(1001, id="within", sidecar=Sidecar(str(image))), 1001, 2)
        start(box, family(1002, id="beside", sidecar=Sidecar(str(image), own_limits=True)), 1002, 2)
        before = files_of(box, 1002)
        box.update_limits(rlimits(nofile=200))
        assert files_of(box, 1001) == [(200, 200)] * 2
        assert files_of(box, 1002) == before
        assert box.limits("beside").rlimits == {}
        assert box.update_limits(rlimits(nofile=100), "beside").rlimits == {"nofile": 100}
        assert files_of(box, 1002) == [(100, 100)] * 2
        assert files_of(box, 1001) == [(200, 200)] * 2


@pytest.mark.parametrize("process_id", ["", "forks"], ids=["container", "process"])
def test_nobody_escapes_by_forking(garden: GardenClient, process_id: str) -> None:
    """Who is forked while the processes are looked through is found by the next look, or has it from its parent."""
    forks = 'for i in 1 2 3 4; do while :; do sh -c "sh -c true; true"; done & done; wait'
    with garden.create(ContainerSpec(limits=Limits(pids=60, rlimits={"nofile": 300}))) as box:
        box.start(ProcessSpec("sh", ("-c", forks), id="forks"))
        wait_until(lambda: len(files_of(box)) > 5, "some to be there")
        for number in range(299, 259, -1):
            box.update_limits(rlimits(nofile=number), process_id)
            assert set(files_of(box)) == {(number, number)}


def test_starts_under_way_get_them_too(garden: GardenClient) -> None:
    """Whoever is started while the limits change may begin with those from before, and gets the new ones."""
    with garden.create(ContainerSpec(limits=rlimits(nofile=300))) as box, ThreadPoolExecutor(4) as pool:
        for number in range(299, 279, -1):
            starts = [pool.submit(box.start, sleeper(1000)) for _ in range(3)]
            box.update_limits(rlimits(nofile=number))
            for each in starts:
                each.result()
            assert set(files_of(box, 1000)) == {(number, number)}


def test_copies_are_not_held_to_them(garden: GardenClient) -> None:
    """The files are the caller's, and who copies them is the server's; nor does a change reach a copy under way."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("before", "after"):
            entry = tarfile.TarInfo(name)
            entry.size = 100_000
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    archive = buffer.getvalue()

    with garden.create(ContainerSpec(limits=rlimits(fsize=4096))) as box:

        def chunks() -> Iterator[bytes]:
            yield archive[:101_000]
            wait_until(lambda: files_of(box), "the archiver to be there")
            box.update_limits(rlimits(fsize=2048))
            yield archive[101_000:]

        box.stream_in(chunks(), path="/")
        assert text_of(box, "wc -c < /before; wc -c < /after").split() == ["100000"] * 2
        assert box.run(sh("cat /before > /copy")).output().exit.shell_code == 128 + 25  # SIGXFSZ


# --- read


def test_what_is_read_is_the_kernels(garden: GardenClient) -> None:
    """A process that has lowered its own soft limit is told by that; the container's is what was stated."""
    with garden.create(ContainerSpec(limits=rlimits(nofile=300))) as box:
        next(iter(box.run(sh("ulimit -Sn 250; echo done; sleep 1000"), id="modest")))
        assert box.limits("modest").rlimits == {"nofile": 250}
        assert box.limits().rlimits == {"nofile": 300}


def test_process_without_any_has_none_to_read(garden: GardenClient) -> None:
    """Its rlimits can be set all the same, though it shares its container's other limits."""
    with garden.create() as box:
        box.start(sleeper(1000, id="plain"))
        for call in (
            lambda: box.limits("plain"),
            lambda: box.update_limits(Limits(pids=3, rlimits={"core": 0}), "plain"),
        ):
            with pytest.raises(FailedPrecondition) as caught:
                call()
            assert caught.value.code == "PROCESS_NOT_LIMITED"
        assert box.update_limits(rlimits(core=0), "plain") == box.limits("plain") == rlimits(core=0)


# --- refused


def test_more_than_the_kernel_allows_is_refused(garden: GardenClient) -> None:
    """At create and live, of a container and of a process: named, and nothing else of the call is done either."""
    too_many = int(Path("/proc/sys/fs/nr_open").read_text()) + 1
    asked = Limits(pids=7, rlimits={"core": 0, "nofile": too_many})
    assert f"nofile={too_many}" in refusal_of(garden.create, ContainerSpec(handle="refused", limits=asked))
    assert "refused" not in {each.handle for each in garden.list()}
    with garden.create(ContainerSpec(limits=rlimits(nofile=300))) as box:
        box.start(sleeper(1000, id="counted", limits=FEW_TASKS))
        before = box.limits(), box.limits("counted"), files_of(box)
        for process_id in ("", "counted"):
            assert "fs.nr_open" in refusal_of(box.update_limits, asked, process_id)
        assert (box.limits(), box.limits("counted"), files_of(box)) == before
        assert box.info().spec.limits == rlimits(nofile=300)


@pytest.mark.skipif(may_raise_limits(), reason="root may raise limits here")
def test_without_the_right_hard_limits_do_not_go_up(garden: GardenClient) -> None:
    """Neither above the server's own, nor above that of one process among many, which keeps it from the others too."""
    assert "CAP_SYS_RESOURCE" in refusal_of(garden.create, ContainerSpec(limits=rlimits(nice=40)))
    with garden.create() as box:
        assert "CAP_SYS_RESOURCE" in refusal_of(box.update_limits, rlimits(nice=40))
        box.start(sleeper(1000))
        start(box, ProcessSpec("sh", ("-c", "ulimit -n 50; exec sleep 1001"), id="low"), 1001, 1)
        before = sorted(files_of(box))
        assert "hard limit 50" in refusal_of(box.update_limits, Limits(pids=9, rlimits={"nofile": 100}))
        assert "hard limit 50" in refusal_of(box.update_limits, rlimits(nofile=100), "low")
        assert sorted(files_of(box)) == before
        assert (box.limits().pids, box.limits().rlimits) == (0, {})
        assert box.update_limits(rlimits(nofile=40)).rlimits == {"nofile": 40}
        assert set(files_of(box)) == {(40, 40)}


@pytest.mark.skipif(may_raise_limits(), reason="root may change limits of everybody here")
def test_without_the_right_users_of_the_host_keep_theirs(garden: GardenClient) -> None:
    """As those of a privileged container are; its root, and users of other containers, are no obstacle."""
    with garden.create(ContainerSpec(privileged=True)) as box:
        box.start(sleeper(1001))
        box.update_limits(rlimits(nofile=300))
        assert files_of(box, 1001) == [(300, 300)]
        box.start(sleeper(1002, id="user", user="1000:1000"))
        before = sorted(files_of(box))
        for process_id in ("", "user"):
            assert "of another user" in refusal_of(box.update_limits, rlimits(nofile=200), process_id)
        assert (sorted(files_of(box)), box.limits("user").rlimits) == (before, {"nofile": 300})
    with garden.create() as box:
        box.start(sleeper(1000, user="1000:1000"))
        box.update_limits(rlimits(nofile=200))
        assert files_of(box, 1000) == [(200, 200)]


@raises_limits
@pytest.mark.cgroup2
@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_with_the_right_they_go_up_again(garden: GardenClient, privileged: bool) -> None:
    """Above the server's own, and of processes of any user."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    with garden.create(ContainerSpec(privileged=privileged, limits=rlimits(nofile=50, nice=1))) as box:
        for user in ("", "1000:1000"):
            box.start(sleeper(1000, user=user))
        assert box.update_limits(rlimits(nofile=most, nice=40)).rlimits == {"nofile": most, "nice": 40}
        assert files_of(box) == [(most, most)] * 2
        assert files_in(box, user="1000:1000") == {str(most)}


def test_bad_ones_are_named(garden: GardenClient) -> None:
    """Resources that there are not; and the wrong place of a process that is to be started."""
    bad = rlimits(nofiles=1)
    with garden.create() as box:
        box.start(sleeper(1000, id="p"))
        for call, field in (
            (lambda: garden.create(ContainerSpec(limits=bad)), "spec.limits.rlimits[nofiles]"),
            (lambda: box.update_limits(bad), "limits.rlimits[nofiles]"),
            (lambda: box.update_limits(bad, "p"), "limits.rlimits[nofiles]"),
            (lambda: box.run(["true"], limits=rlimits(nofile=9)), "spec.limits.rlimits"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                call()
            assert [violation.field for violation in caught.value.fields] == [field]


# --- later


def test_they_survive_a_restart(no_trace: None) -> None:
    """Of the container and of a process, changed ones too; and they can be changed again."""
    with running_server() as server, GardenClient(server.address) as garden:
        box = garden.create(ContainerSpec(limits=rlimits(nofile=300)))
        start(box, family(1001, id="tree"), 1001, 2)
        box.start(sleeper(1002))
        box.update_limits(rlimits(nofile=200, core=0))
        box.update_limits(rlimits(nofile=100), "tree")
        server.kill()
        server.start()
        assert box.limits().rlimits == {"nofile": 200, "core": 0}
        assert box.limits("tree").rlimits == {"nofile": 100, "core": 0}
        assert files_in(box) == {"200"}
        box.update_limits(rlimits(nofile=150))
        assert files_of(box, 1001) == [(100, 100)] * 2
        assert files_of(box, 1002) == [(150, 150)]
        box.update_limits(rlimits(nofile=90), "tree")
        assert files_of(box, 1001) == [(90, 90)] * 2


def test_command_line(no_trace: None) -> None:
    """`--rlimit` of create and limits; a table for people and JSON for programs."""
    with running_server() as server, GardenClient(server.address) as garden:

        def garden_cli(*args: str) -> subprocess.CompletedProcess[str]:
            command = [str(Path(sys.executable).with_name("garden")), *args, "--address", server.address]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

        made = garden_cli("create", "--handle", "box", "--rlimit", "nofile=300", "--rlimit", "core=0")
        assert made.stdout == "box\n", made.stderr
        box = garden.container("box")
        assert files_in(box) == {"300"}
        box.start(sleeper(1000, id="worker"))
        shown = garden_cli("limits", "box", "--rlimit", "nofile=200", "--rlimit", "core=0", "-o", "json")
        assert json.loads(shown.stdout)["rlimits"] == {"nofile": 200, "core": 0}
        assert "rlimits core=0 nofile=200" in garden_cli("limits", "box").stdout
        shown = garden_cli("limits", "box", "--process", "worker", "--rlimit", "nofile=100")
        assert shown.stdout == "rlimits core=0 nofile=100\n"
        assert files_of(box, 1000) == [(100, 100)]
        for bad, message in (
            ("nofile=many", "neither a number nor unlimited"),
            ("files=1", "rlimits[files]"),
        ):
            failed = garden_cli("limits", "box", "--rlimit", bad)
            assert failed.returncode != 0
            assert message in failed.stderr
