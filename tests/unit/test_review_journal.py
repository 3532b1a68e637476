"""A journal that cannot be written, as on a full disk; and rows that come too late."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest
from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.backend.journal import Journal
from garden_py.backend.streams.segments import Intake, SegmentLog
from garden_py.model import errors
from garden_py.model.lifecycle import State
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import ContainerSpec, PortMapping

SLEEP = ProcessSpec(path="sleep", id="p", args=("1000",))


class FullDisk(Journal):
    """A journal in memory on a disk that fills up and becomes free again.

    Attributes:
        writable: after how many further changes there is no room; None: there is always room.
    """

    writable: int | None = None

    def _execute(self, statement, values=()):  # type: ignore[no-untyped-def]
        if self.writable is not None and not statement.startswith("SELECT"):
            if self.writable == 0:
                raise errors.HostFault("journal", "database or disk is full")
            self.writable -= 1
        return super()._execute(statement, values)


@pytest.fixture
def journal() -> FullDisk:
    return FullDisk(":memory:")


def test_full_disk_is_a_fault_of_the_host(tmp_path: Path) -> None:
    """A caller can act on that; "internal error: OperationalError" tells nobody anything."""
    journal = Journal(tmp_path / "journal.db")
    journal.write_meta("k", "v")
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(errors.HostFault, match="disk is full"):
        journal.write_meta("k2", "v" * 100_000)
    assert journal.read_meta("k") == "v"
    journal.close()


@in_virtual_time
async def test_create_without_room_in_the_journal_leaves_nothing(journal: FullDisk) -> None:
    """At whichever step the disk is full: no container, no lease, and the handle is free again."""
    server = Server(journal=journal)
    core = await server.start()
    for writes in range(3):  # the row, its facts, the state it ends in
        journal.writable = writes
        with pytest.raises(errors.HostFault):
            await core.containers.create(ContainerSpec(handle="box", port_mappings=(PortMapping(0, 80),)))
        journal.writable = None
        await asyncio.sleep(60)
        assert len(core.registry) == 0
        assert not server.host.containers
        assert not server.host.addresses
        assert not server.host.ports
        assert not journal.containers()
    await core.containers.create(ContainerSpec(handle="box"))


@in_virtual_time
async def test_destroy_needs_no_room_in_the_journal(journal: FullDisk) -> None:
    """It is how a full disk is emptied; the row goes when it can, and nothing is given back twice."""
    server = Server(journal=journal)
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    journal.writable = 0
    with pytest.raises(errors.HostFault):
        await core.containers.destroy("box")
    assert not server.host.containers
    journal.writable = None
    await core.containers.create(ContainerSpec(handle="next"))
    await asyncio.sleep(60)
    assert [row.handle for row in journal.containers()] == ["next"]
    assert len(server.host.addresses) == 1
    assert server.backend.calls.count(("destroy", "box")) == 1


@in_virtual_time
async def test_exit_is_told_at_once_and_written_when_there_is_room(journal: FullDisk) -> None:
    """Waiters and watchers do not suffer from a full disk, and no exit is forgotten."""
    server = Server(journal=journal)
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="box"))
    await core.processes.start("box", SLEEP)
    journal.writable = 0
    server.host.containers["box"].processes["p"].finish(code=3)
    assert ("PROCESS_EXITED", "box") in server.events()
    assert journal.processes("box")[0].exit is None
    journal.writable = None
    await asyncio.sleep(2)
    assert journal.processes("box")[0].exit is not None


@in_virtual_time
async def test_change_that_outlives_its_container_writes_no_row(journal: FullDisk) -> None:
    """The row would name the leases, or be the row, of a later container, and the next server would destroy that."""
    server = Server(journal=journal)
    core = await server.start()
    old = await core.containers.create(ContainerSpec(handle="box"))
    await core.containers.destroy("box")
    with pytest.raises(errors.ContainerNotFound):
        core.registry.save(old)
    await core.containers.create(ContainerSpec(handle="box"))
    with pytest.raises(errors.ContainerNotFound):
        core.registry.save(old)
    assert journal.containers()[0].state is State.ACTIVE


@in_virtual_time
async def test_destroy_waits_for_a_change_under_way_and_lets_no_other_begin(journal: FullDisk) -> None:
    """A port mapped behind a destroy's back would stay mapped, to the next container with that address."""
    server = Server(journal=journal)
    core = await server.start()
    container = await core.containers.create(ContainerSpec(handle="box"))
    await container.changing.acquire()
    late = asyncio.ensure_future(core.containers.map_port("box", PortMapping(0, 80)))
    await settle()
    destroying = asyncio.ensure_future(core.containers.destroy("box"))
    await settle()
    assert ("destroy", "box") not in server.backend.calls
    container.changing.release()
    await destroying
    with pytest.raises(errors.ContainerBusy):
        await late
    assert not server.host.ports


@in_virtual_time
async def test_destroy_does_not_wait_for_a_change_that_hangs(journal: FullDisk) -> None:
    """Destroy always ends."""
    server = Server(journal=journal)
    core = await server.start()
    container = await core.containers.create(ContainerSpec(handle="box"))
    await container.changing.acquire()
    await core.containers.destroy("box")
    assert not server.host.containers


def test_output_waits_for_a_descriptor_as_for_room_on_the_disk(tmp_path: Path) -> None:
    """Neither a full disk nor too many open files at the start of a segment may cost the bytes in the pipe."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    os.write(writing, b"late")
    log = SegmentLog(tmp_path / "p", "stdout", retention_bytes=1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        assert log.take(reading) is Intake.DISK_FULL
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert log.take(reading) is Intake.TOOK
    assert log.end_offset == 4
    log.close()
    os.close(reading)
    os.close(writing)
