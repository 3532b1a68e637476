"""The journal: rows survive the process that wrote them, and nothing half written is read."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from garden_py.backend.journal import (
    SCHEMA_VERSION,
    Journal,
    JournalDamaged,
    JournalTooNew,
    open_journal,
    read_journal,
)
from garden_py.model.codec import (
    dump_container_spec,
    dump_exit,
    dump_process_spec,
    load_container_spec,
    load_exit,
    load_process_spec,
)
from garden_py.model.errors import HostFault
from garden_py.model.files import BindMount, MountMode
from garden_py.model.lifecycle import State
from garden_py.model.limits import Limits
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule
from garden_py.model.process import ExitStatus, ProcessSpec, WindowSize
from garden_py.model.spec import ContainerSpec, PortMapping, Transport
from garden_py.service.ports import ContainerRow, ProcessRow

FULL_SPEC = ContainerSpec(
    handle="box",
    image="/srv/image",
    privileged=True,
    env=("A=ä", "B="),
    properties=(("k", "v"),),
    bind_mounts=(BindMount("/a", "/b", MountMode.READ_WRITE),),
    limits=Limits(memory_bytes=1 << 40, cpu_weight=1, cpu_quota_us=0, cpu_period_us=None, pids=5),
    grace_time_s=1.5,
    port_mappings=(PortMapping(1, 2, Transport.UDP),),
    egress=EgressPolicy(
        DefaultAction.DENY,
        (
            parse_egress_rule("tcp:10.0.0.0/8,10.1.0.1-10.1.0.9:80,443-445 log"),
            parse_egress_rule("deny icmp:*:8/0"),
            parse_egress_rule("all:[2001:db8::/32]"),
        ),
        generation=2,
    ),
    hostname="host",
)
FULL_PROCESS = ProcessSpec(
    path="/bin/sh",
    id="p",
    args=("-c", "true\n", ""),
    env=("X=y",),
    dir="/tmp",
    user="1:2",
    tty=WindowSize(5, 6),
    rlimits=(("nofile", (1 << 64) - 1),),
    limits=Limits(pids=3),
    output_retention_bytes=1 << 20,
)


def container_row(handle: str = "box", created_ns: int = 1, state: State = State.ACTIVE) -> ContainerRow:
    return ContainerRow(handle, state, "", "request", created_ns, dump_container_spec(FULL_SPEC), {"pid": 7})


def process_row(handle: str = "box", id_: str = "p", started_ns: int = 1) -> ProcessRow:
    return ProcessRow(handle, id_, "request", started_ns, 42, dump_process_spec(FULL_PROCESS), None)


def test_rows_survive_their_writer(tmp_path: Path) -> None:
    """A second journal on the same file, without the first having been closed, reads every row."""
    with closing(Journal(tmp_path / "journal.db")) as first:
        first.save_container(container_row())
        first.save_process(process_row())
        first.write_meta("key", "value")
        with closing(Journal(tmp_path / "journal.db")) as second:
            assert second.containers() == [container_row()]
            assert second.processes("box") == [process_row()]
            assert second.read_meta("key") == "value"


def test_specs_and_exits_survive_json() -> None:
    """Every field comes back as it was, big numbers and nested rules among them."""
    assert load_container_spec(dump_container_spec(FULL_SPEC)) == FULL_SPEC
    assert load_process_spec(dump_process_spec(FULL_PROCESS)) == FULL_PROCESS
    for status in (ExitStatus(0, None), ExitStatus(None, 9, True, 1 << 60, "killed: out of memory")):
        assert load_exit(dump_exit(status)) == status
    assert load_container_spec(dump_container_spec(ContainerSpec())) == ContainerSpec()


def test_saving_again_updates(tmp_path: Path) -> None:
    """A row is replaced in what can change; what is fixed at the start stays."""
    with closing(Journal(tmp_path / "journal.db")) as journal:
        journal.save_container(container_row())
        changed = replace(
            container_row(),
            state=State.UNKILLABLE,
            state_reason="stuck",
            facts={"pid": 8},
            spec={},
            notable=("Out of memory", "and again"),
        )
        journal.save_container(changed)
        assert journal.containers() == [changed]
        journal.save_process(process_row())
        ended = replace(process_row(), pid=43, exit=dump_exit(ExitStatus(3, None)))
        journal.save_process(ended)
        assert journal.processes("box") == [ended]


def test_forgetting_takes_the_processes_along(tmp_path: Path) -> None:
    """No process outlives its container's row; forgetting twice is fine."""
    with closing(Journal(tmp_path / "journal.db")) as journal:
        for handle in ("box", "other"):
            journal.save_container(container_row(handle))
            journal.save_process(process_row(handle))
        journal.forget_container("box")
        journal.forget_container("box")
        journal.forget_process("other", "absent")
        assert journal.processes("box") == []
        assert journal.processes("other") == [process_row("other")]


def test_rows_come_oldest_first(tmp_path: Path) -> None:
    """Recovery and lists follow the order of creation."""
    with closing(Journal(tmp_path / "journal.db")) as journal:
        for handle, age in (("a", 3), ("b", 1), ("c", 2)):
            journal.save_container(container_row(handle, age))
        assert [row.handle for row in journal.containers()] == ["b", "c", "a"]
        for id_, age in (("x", 9), ("y", 5)):
            journal.save_process(process_row("a", id_, age))
        assert [row.id for row in journal.processes("a")] == ["y", "x"]


def test_process_needs_its_container(tmp_path: Path) -> None:
    """A row that belongs to nothing is a bug and is refused by the database."""
    with (
        closing(Journal(tmp_path / "journal.db")) as journal,
        pytest.raises(sqlite3.IntegrityError),
    ):
        journal.save_process(process_row("nobody"))


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    """An older server must not write into what it does not understand."""
    with closing(sqlite3.connect(tmp_path / "journal.db")) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(JournalTooNew):
        Journal(tmp_path / "journal.db")


def test_older_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    """The containers of an earlier release go on under this one; nothing of their rows is lost."""
    path = tmp_path / "journal.db"
    with closing(Journal(path)) as journal:
        journal.save_container(container_row())
        journal.save_process(process_row())
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("ALTER TABLE containers DROP COLUMN notable")
        database.execute("PRAGMA user_version = 1")
    assert read_journal(path)[0] == [container_row()], "as `garden doctor --leaks` reads it"
    for _ in range(2):
        with closing(Journal(path)) as journal:
            assert journal.containers() == [container_row()]
            assert journal.processes("box") == [process_row()]
            journal.save_container(container_row("new"))
            journal.forget_container("new")


def test_journal_is_private(tmp_path: Path) -> None:
    """It holds containers' environment variables."""
    with closing(Journal(tmp_path / "journal.db")):
        assert (tmp_path / "journal.db").stat().st_mode & 0o077 == 0


def tear(path: Path) -> None:
    """What a power cut can do to a database that was not synced."""
    with path.open("r+b") as file:
        file.seek(0)
        file.write(b"\xff" * 512)


def test_damaged_journal_is_put_aside_after_a_reboot_only(tmp_path: Path) -> None:
    """After a reboot nothing runs that it knew; otherwise containers might, and nobody would ever remove them."""
    path = tmp_path / "journal.db"
    with closing(Journal(path)) as journal:
        journal.save_container(ContainerRow("box", State.ACTIVE, "", "", 1, {}, {}))
    tear(path)
    with pytest.raises(JournalDamaged, match="reboot"):
        open_journal(path, rebooted=False)
    with closing(open_journal(path, rebooted=True)) as journal:
        assert journal.containers() == []
        journal.save_container(ContainerRow("box", State.ACTIVE, "", "", 1, {}, {}))
    assert (tmp_path / "journal.db.damaged").exists()
    with closing(open_journal(path, rebooted=False)) as journal:
        assert len(journal.containers()) == 1


def test_journal_in_use_by_somebody_else_is_not_called_damaged(tmp_path: Path) -> None:
    """Putting it aside would lose it."""
    (tmp_path / "journal.db").mkdir()
    with pytest.raises(HostFault):
        open_journal(tmp_path / "journal.db", rebooted=True)
