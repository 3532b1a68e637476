"""The machine was rebooted: nothing of what the journal knows runs any more, and all of it is cleared."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from kit.cgroups import cgroups_of, groups_in
from kit.garden import text_of, wait_until
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.backend.journal import Journal
from garden_py.client import ContainerSpec, ContainerState, GardenClient

pytestmark = pytest.mark.root
ROWS = 150


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    """A server of the test's own."""
    before = snapshot()
    with running_server() as server:
        yield server
    assert_no_trace(before)


def reboot(server: ServerProcess, pids: dict[str, int]) -> None:
    """What a reboot does, as far as it concerns a server that has been killed; run directories are on a tmpfs."""
    subprocess.run(["kill", "-KILL", *map(str, pids.values())], check=True)
    for handle in pids:
        for directory in cgroups_of(handle):
            for path in groups_in(directory):
                wait_until(lambda path=path: not (path / "cgroup.procs").read_text(), "the end of processes")
                path.rmdir()
    shutil.rmtree(server.place / "run")
    (server.place / "state/boot_id").write_text("4ae1c0b2-0000-4000-8000-000000000000\n")


def add_rows(path: Path, count: int) -> None:
    """More containers of before the boot, with directories, addresses and uid ranges of their own."""
    with closing(Journal(path)) as journal:
        row = journal.containers()[0]
        network = row.facts["lease"]["address"].rpartition(".")[0]
        for number in range(count):
            handle, lease = f"stale-{number}", {**row.facts["lease"], "address": f"{network}.{number + 60}"}
            facts = {"lease": lease, "uid_slot": number + 60, "runtime_id": f"stale{number}"}
            journal.save_container(
                replace(row, handle=handle, spec={**row.spec, "handle": handle}, facts={**row.facts, **facts})
            )
            (path.parent / f"containers/{handle}/upper").mkdir(parents=True)


def test_everything_of_before_the_boot_is_cleared_while_the_server_serves(server: ServerProcess) -> None:
    """None is listed, handles come free, a new container can be made meanwhile, and nothing is left."""
    with GardenClient(server.address) as garden:
        for number in range(3):
            container = garden.create(ContainerSpec(handle=f"old-{number}"))
            container.start(["sleep", "1000"])
        pids = {info.handle: info.pid for info in garden.list()}
    server.kill()
    add_rows(server.place / "state/journal.db", ROWS)
    reboot(server, pids)
    server.start()
    with GardenClient(server.address) as garden:
        assert list(garden.list()) == []
        new = garden.create()
        assert text_of(new, "echo works") == "works\n"
        wait_until(
            lambda: [info.handle for info in garden.list(all_states=True)] == [new.handle], "the clearing"
        )
        containers = server.place / "state/containers"
        assert [path.name for path in containers.iterdir()] == [new.handle]
        again = garden.create(ContainerSpec(handle="old-0"))
        assert again.processes() == []
        server.stop()
        server.start()
        assert {info.state for info in garden.list()} == {ContainerState.ACTIVE}


def test_journal_torn_by_a_power_cut_does_not_keep_the_server_down(server: ServerProcess) -> None:
    """It is put aside, and directories that nobody knows are removed; without a reboot the server refuses."""
    journal = server.place / "state/journal.db"
    with GardenClient(server.address) as garden:
        container = garden.create(ContainerSpec(handle="old"))
        pids = {container.handle: container.info().pid}
    server.kill()
    whole = journal.read_bytes(), journal.with_name("journal.db-wal").read_bytes()
    journal.with_name("journal.db-wal").unlink()
    journal.write_bytes(b"\xff" * len(whole[0]))
    with pytest.raises(AssertionError, match=r"journal.db is damaged .*reboot"):
        server.start()
    reboot(server, pids)
    server.start()
    with GardenClient(server.address) as garden:
        assert list(garden.list(all_states=True)) == []
        assert list((server.place / "state/containers").iterdir()) == []
        assert text_of(garden.create(ContainerSpec(handle="old")), "echo works") == "works\n"
