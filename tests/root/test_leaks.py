"""What is on the host and belongs to nobody is found and removed; what is somebody else's is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit import plant
from kit.garden import events_of, text_of, wait_until
from kit.patience import FACTOR
from kit.plant import Site
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import (
    ContainerSpec,
    ContainerState,
    EventKind,
    GardenClient,
    GardenError,
    Leak,
    LeakDirection,
)

pytestmark = pytest.mark.root
STORM_S = 6.0 * FACTOR


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    """A server of the test's own that looks for leaks only when it is told to."""
    before = snapshot()
    with running_server("--janitor-interval-s", "0") as server:
        yield server
    assert_no_trace(before)


def names(leaks: list[Leak], direction: LeakDirection = LeakDirection.ORPHAN) -> set[plant.Name]:
    return {(leak.kind.name, leak.name) for leak in leaks if leak.direction is direction}


def doctor(server: ServerProcess, *flags: str) -> tuple[int, list[dict[str, object]]]:
    """(exit code, findings) of the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "garden_py", "doctor", "--leaks", "-o", "json",
         "--state-dir", str(Site(server).state), *flags],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_server_that_is_named_for_any_command_is_asked(server: ServerProcess) -> None:
    """And not the one on the default state directory."""
    for before, after in ((["--address", server.address], []), ([], ["--address", server.address])):
        argv = [sys.executable, "-m", "garden_py", *before, "doctor", "--leaks", "-o", "json", *after]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout) == []


def test_the_server_that_the_environment_names_is_asked(server: ServerProcess, tmp_path: Path) -> None:
    """As by every other command; a state directory that is named says more."""
    argv = [sys.executable, "-m", "garden_py", "doctor", "--leaks", "-o", "json"]
    environ = {**os.environ, "GARDEN_ADDRESS": server.address}
    asked = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environ, check=True)
    assert json.loads(asked.stdout) == []
    for unused in (tmp_path, tmp_path / "missing"):
        named = [*argv, "--state-dir", str(unused)]
        done = subprocess.run(named, capture_output=True, text=True, timeout=60, env=environ)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"garden doctor: no garden server has used {unused}\n"


def test_exactly_the_orphans_are_found_and_removed(server: ServerProcess) -> None:
    """One of each kind, beside a live container and beside things that only look like the server's."""
    site = Site(server)
    with GardenClient(server.address) as garden, ExitStack() as planted, garden.create() as live:
        port = live.map_port(8080)
        with garden.create(ContainerSpec(privileged=True)) as privileged:
            assert list(garden.check_leaks()) == []
            events = events_of(garden)
            ours = set(planted.enter_context(plant.orphans(site)))
            ours.add(planted.enter_context(plant.launcher_of_a_dead_server(site)))
            ours.add(planted.enter_context(plant.mount_in_the_launcher(site)))
            theirs = planted.enter_context(plant.lookalikes(site))

            seen = list(garden.check_leaks())
            assert names(seen) == ours | theirs
            assert {(leak.kind.name, leak.name) for leak in seen if leak.kept_because} == theirs
            assert {leak.handle for leak in seen if leak.kind.name in ("CGROUP", "PROCESS", "LINK")} >= {
                "lost"
            }
            assert names(seen, LeakDirection.MISSING) == set()
            assert all(plant.exists(name, site) for name in ours), "looking changes nothing"

            removed = list(garden.check_leaks(remove=True))
            assert {(leak.kind.name, leak.name) for leak in removed if leak.removed} == ours, removed
            assert not [name for name in ours if plant.exists(name, site)]
            assert all(plant.exists(name, site) for name in theirs)
            assert names(list(garden.check_leaks())) == theirs

            told = [next(events) for _ in range(len(ours | theirs))]
            assert {event.kind for event in told} == {EventKind.LEAK_FOUND}
            assert text_of(live, "echo alive") == "alive\n"
            assert text_of(privileged, "echo alive") == "alive\n"
            assert port in live.info().mapped_ports
            assert live.info().state is ContainerState.ACTIVE


def test_stopped_server_is_examined_without_it(server: ServerProcess) -> None:
    """From the journal alone; its containers go on, and none of theirs is taken for a leak."""
    site = Site(server)
    with GardenClient(server.address) as garden, ExitStack() as planted:
        live = garden.create()
        live.map_port(8080)
        assert doctor(server) == (0, [])
        server.kill()
        assert doctor(server) == (0, [])
        ours = set(planted.enter_context(plant.orphans(site)))
        ours.add(planted.enter_context(plant.launcher_of_a_dead_server(site)))
        theirs = planted.enter_context(plant.lookalikes(site))
        code, found = doctor(server)
        assert code == 1
        assert {(leak["kind"], leak["name"]) for leak in found} == ours | theirs
        code, found = doctor(server, "--fix")
        assert code == 1, "somebody else's things are left"
        assert {(leak["kind"], leak["name"]) for leak in found if leak["removed"]} == ours, found
        assert not [name for name in ours if plant.exists(name, site)]
        planted.close()
        assert doctor(server) == (0, [])
        server.start()
        assert text_of(live, "echo alive") == "alive\n"
        assert list(garden.check_leaks()) == []


def test_what_a_killed_server_without_containers_shared_is_removed(server: ServerProcess) -> None:
    """Nobody needs its anchor link, table and cgroup until it comes back, and then it makes them."""
    site = Site(server)
    with GardenClient(server.address) as garden:
        garden.create().destroy()
        server.kill()
        plant.run("ip", "link", "add", f"gdn{site.tag}-zz", "type", "bridge")
        with ExitStack() as undo:
            undo.callback(plant.run, "ip", "link", "del", f"gdn{site.tag}-zz")
            assert doctor(server, "--fix")[0] == 1, "it is told, and kept"
            assert plant.exists(("LINK", f"gdn{site.tag}-zz"), site)
        server.start()
        server.kill()
        code, found = doctor(server)
        assert code == 1
        left = {str(leak["name"]) for leak in found}
        rubbish = {
            name for name in left if name.startswith("trash/")
        }  # the server was killed at its sweeping
        assert left - rubbish == {f"gdn-{site.tag}", f"table inet garden_{site.tag}", f"garden-{site.tag}"}
        assert doctor(server, "--fix")[0] == 0
        assert doctor(server) == (0, [])
        server.start()
        assert list(garden.check_leaks()) == []
        with garden.create() as container:
            assert text_of(container, "echo alive") == "alive\n"


def test_what_is_taken_from_a_live_container_is_missing(server: ServerProcess) -> None:
    """It is told with its container, cannot be removed, and the container can be destroyed all the same."""
    site = Site(server)
    with GardenClient(server.address) as garden:
        container = garden.create()
        handle, address = container.handle, container.info().container_ip
        number = int(address.rpartition(".")[2])
        link = f"gdn{site.tag}-{number:x}"
        mapped = container.map_port(8080)
        (record,) = (site.run_dir / "runc").iterdir()
        (agent,) = (site.run_dir / "agents").iterdir()
        plant.run("ip", "link", "del", link)
        plant.run("nft", "flush", "set", "inet", f"garden_{site.tag}", "members")
        plant.run("nft", "flush", "map", "inet", f"garden_{site.tag}", "portmap")
        shutil.rmtree(record)
        agent.unlink()
        shutil.rmtree(site.state / "containers" / handle)
        expected = {
            ("LINK", link),
            ("NFT_ELEMENT", f"member {link} {address}"),
            ("NFT_ELEMENT", f"portmap tcp {mapped.host_port} {address} 8080"),
            ("RUNTIME", record.name),
            ("SOCKET", agent.name),
            ("DIRECTORY", f"containers/{handle}"),
        }
        seen = list(garden.check_leaks(remove=True))
        assert names(seen, LeakDirection.MISSING) == expected
        assert names(seen) == set()
        assert {leak.handle for leak in seen} == {handle}
        assert not any(leak.removed for leak in seen)
        plant.run("nft", "delete", "table", "inet", f"garden_{site.tag}")
        shared = {("NFT_CHAIN", f"table inet garden_{site.tag}")}
        gone = {name for name in expected if name[0] == "NFT_ELEMENT"}
        assert names(list(garden.check_leaks()), LeakDirection.MISSING) == expected - gone | shared
        container.destroy()
        assert names(list(garden.check_leaks()), LeakDirection.MISSING) == shared


def test_create_does_not_take_the_place_of_somebody_elses_directory(server: ServerProcess) -> None:
    """Neither the create nor its undoing touches it."""
    with (
        GardenClient(server.address) as garden,
        plant.lookalikes(Site(server)),
        pytest.raises(GardenError, match=r"todo\.txt"),
    ):
        garden.create(ContainerSpec(handle="notes"))


def metrics_of(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_janitor_cleans_up_at_start(no_trace: None) -> None:
    """What an earlier server has left is gone soon after the next one serves, and is counted."""
    before, port = snapshot(), 19_100
    with running_server("--metrics", f"127.0.0.1:{port}", "--janitor-interval-s", "60") as server:
        site = Site(server)
        with GardenClient(server.address) as garden:
            live = garden.create()
            server.kill()
            with plant.orphans(site) as planted:
                server.start()
                wait_until(lambda: not [n for n in planted if plant.exists(n, site)], "the janitor's work")
                wait_until(
                    lambda: metrics_of(port).get('garden_leaks_removed_total{kind="link"}') == 1, "the count"
                )
                found = metrics_of(port)
                assert found['garden_leaks_found_total{direction="orphan",kind="cgroup"}'] == 1
                assert found['garden_containers{state="active"}'] == 1
                assert found["garden_leak_check_seconds_count"] >= 2
            assert text_of(live, "echo alive") == "alive\n"
    assert_no_trace(before)


def test_storm_of_creates_and_destroys_shows_no_leak(no_trace: None) -> None:
    """A janitor that looks five times a second never takes a life in progress for a leftover."""
    before, port = snapshot(), 19_101
    with running_server("--metrics", f"127.0.0.1:{port}", "--janitor-interval-s", "0.2") as server:
        until = time.monotonic() + STORM_S
        lives: list[str] = []
        failures: list[BaseException] = []

        def live() -> None:
            try:
                with GardenClient(server.address) as garden:
                    while time.monotonic() < until:
                        with garden.create() as container:
                            container.map_port(80)
                            assert text_of(container, "echo alive") == "alive\n"
                            lives.append(container.handle)
            except BaseException as failure:  # noqa: BLE001 - told below
                failures.append(failure)

        threads = [threading.Thread(target=live) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(lives) > 10
        found = metrics_of(port)
        assert found["garden_leak_check_seconds_count"] >= 3
        assert found["garden_creates_total"] == found["garden_destroys_total"] == len(lives)
        assert [name for name in found if name.startswith("garden_leaks_")] == []
        assert found["garden_janitor_failures_total"] == 0
        with GardenClient(server.address) as garden:
            assert list(garden.check_leaks()) == []
    assert_no_trace(before)
