"""The record of what exists, what is half done and what is allocated: SQLite, one transaction per step.

Written before a step is taken, so that after a SIGKILL the next server knows what may exist. It need not survive a
power cut (after another boot nothing runs any more), so no write waits for the disk; one that a power cut has torn is
put aside, see `open_journal`.

Source: sqlite.org/pragma.html: journal_mode WAL with synchronous OFF survives an application crash.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import structlog

from garden_py.model.errors import GardenError, HostFault
from garden_py.model.lifecycle import State
from garden_py.service.ports import ContainerRow, ProcessRow

log = structlog.get_logger()
SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE containers (
    handle TEXT PRIMARY KEY, state TEXT NOT NULL, state_reason TEXT NOT NULL, request_id TEXT NOT NULL,
    created_ns INTEGER NOT NULL, spec TEXT NOT NULL, facts TEXT NOT NULL, notable TEXT NOT NULL
) STRICT;
CREATE TABLE processes (
    handle TEXT NOT NULL REFERENCES containers ON DELETE CASCADE, id TEXT NOT NULL, request_id TEXT NOT NULL,
    started_ns INTEGER NOT NULL, pid INTEGER NOT NULL, spec TEXT NOT NULL, exit TEXT,
    PRIMARY KEY (handle, id)
) STRICT;
"""
_STEPS = {1: "ALTER TABLE containers ADD COLUMN notable TEXT NOT NULL DEFAULT '[]'"}
"""What makes the next schema of one."""


_ALL_CONTAINERS = "SELECT * FROM containers ORDER BY created_ns, handle"
SETTINGS = "settings"  # key of what somebody who finds the journal has to know: see wiring.py


class JournalTooNew(GardenError):
    """The journal was written by a newer version of the server."""

    code = "journal_too_new"


class JournalDamaged(GardenError):
    """The journal cannot be read, and what it knew may still run."""

    code = "journal_damaged"


def open_journal(path: Path, *, rebooted: bool) -> Journal:
    """The journal of a state directory.

    Args:
        path: of its database.
        rebooted: the machine was rebooted since it was written. If it cannot be read then, it is put aside and an
            empty one takes its place: nothing that it knew runs any more, and directories without a row are removed.

    Raises:
        JournalDamaged: it cannot be read, and the machine was not rebooted.
    """
    try:
        return Journal(path)
    except (
        sqlite3.OperationalError
    ) as error:  # locked, read-only, no space: nothing that setting it aside would mend
        raise HostFault("journal", f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        if not rebooted:
            raise JournalDamaged(
                f"{path} is damaged ({error}); containers may be running that only it knows. "
                "Restore it, or reboot the machine and start again"
            ) from error
        aside = path.with_name(f"{path.name}.damaged")
        log.error("journal.damaged", error=str(error), kept_as=str(aside))
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.rename(aside)
        return Journal(path)


def _containers(rows: Iterable[sqlite3.Row]) -> list[ContainerRow]:
    return [
        ContainerRow(
            handle=row["handle"],
            state=State(row["state"]),
            state_reason=row["state_reason"],
            request_id=row["request_id"],
            created_ns=row["created_ns"],
            spec=json.loads(row["spec"]),
            facts=json.loads(row["facts"]),
            notable=tuple(json.loads(row["notable"])) if "notable" in row.keys() else (),  # noqa: SIM118 - no mapping
        )
        for row in rows
    ]


def read_journal(path: Path) -> tuple[list[ContainerRow], dict[str, Any]]:
    """The containers and the last server's settings in a journal that no server has open; nothing is written.

    Raises:
        HostFault: there is no journal, or it cannot be read.
    """
    try:
        database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.OperationalError as error:
        raise HostFault("journal", f"{path}: {error}") from error
    with closing(database):
        database.row_factory = sqlite3.Row
        try:
            rows = _containers(database.execute(_ALL_CONTAINERS))
            found = database.execute("SELECT value FROM meta WHERE key = ?", (SETTINGS,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise HostFault("journal", f"{path}: {error}") from error
    return rows, {} if found is None else json.loads(found["value"])


class Journal:
    """Rows of containers and processes; see service/ports.py for their meaning.

    Values are JSON made by `model`'s codecs (model/codec.py); this module does not look into them. Every method that
    reads or writes rows raises HostFault when SQLite cannot, e.g. on a full disk; nothing has changed then.
    """

    def __init__(self, path: Path | str) -> None:
        if isinstance(path, Path):
            path.touch(mode=0o600)  # it holds containers' environment variables
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate()
            self._check()
        except BaseException:
            self._db.close()
            raise

    def _check(self) -> None:
        """Read every row once: damage is to be found now, not in the middle of a call."""
        for table in ("meta", "containers", "processes"):
            for _ in self._db.execute(f"SELECT * FROM {table}"):  # noqa: S608 - names from the line above
                pass

    def file_sizes(self) -> dict[str, float]:
        """Bytes of its files, by what they are; of a journal in memory none."""
        place = self._db.execute("PRAGMA database_list").fetchone()["file"]
        if not place:
            return {}
        files = {"database": place, "log": f"{place}-wal"}
        return {name: os.stat(file).st_size for name, file in files.items() if os.path.exists(file)}

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self._db.close()

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise JournalTooNew(f"the journal has schema {version}; this server knows up to {SCHEMA_VERSION}")
        if version == SCHEMA_VERSION:
            return
        whole = filter(None, (part.strip() for part in _SCHEMA.split(";")))
        with self._transaction():
            for statement in (
                whole if version == 0 else [_STEPS[each] for each in range(version, SCHEMA_VERSION)]
            ):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise HostFault("journal", str(error)) from error

    def read_meta(self, key: str) -> str | None:
        """A value that belongs to the whole server."""
        row = self._execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row["value"])

    def write_meta(self, key: str, value: str) -> None:
        """Set such a value."""
        self._execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def save_container(self, row: ContainerRow) -> None:
        """Insert or replace a container's row."""
        self._execute(
            "INSERT INTO containers VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (handle) DO UPDATE SET "
            "state = excluded.state, state_reason = excluded.state_reason, "
            "spec = excluded.spec, facts = excluded.facts, notable = excluded.notable",
            (
                row.handle, row.state.value, row.state_reason, row.request_id, row.created_ns,
                json.dumps(row.spec), json.dumps(row.facts), json.dumps(row.notable),
            ),
        )  # fmt: skip

    def forget_container(self, handle: str) -> None:
        """Remove a container's row and those of its processes; absent is fine."""
        self._execute("DELETE FROM containers WHERE handle = ?", (handle,))

    def containers(self) -> list[ContainerRow]:
        """All containers, oldest first."""
        return _containers(self._execute(_ALL_CONTAINERS))

    def save_process(self, row: ProcessRow) -> None:
        """Insert or replace a process's row."""
        self._execute(
            "INSERT INTO processes VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (handle, id) DO UPDATE SET "
            "pid = excluded.pid, spec = excluded.spec, exit = excluded.exit",
            (
                row.handle, row.id, row.request_id, row.started_ns, row.pid,
                json.dumps(row.spec), None if row.exit is None else json.dumps(row.exit),
            ),
        )  # fmt: skip

    def save_exit(self, handle: str, process_id: str, pid: int, status: dict[str, Any]) -> None:
        """Complete a process's row with its pid and how it ended."""
        self._execute(
            "UPDATE processes SET pid = ?, exit = ? WHERE handle = ? AND id = ?",
            (pid, json.dumps(status), handle, process_id),
        )

    def forget_process(self, handle: str, process_id: str) -> None:
        """Remove a process's row; absent is fine."""
        self._execute("DELETE FROM processes WHERE handle = ? AND id = ?", (handle, process_id))

    def processes(self, handle: str) -> list[ProcessRow]:
        """A container's processes, oldest first."""
        rows = self._execute("SELECT * FROM processes WHERE handle = ? ORDER BY started_ns, id", (handle,))
        return [
            ProcessRow(
                handle=row["handle"],
                id=row["id"],
                request_id=row["request_id"],
                started_ns=row["started_ns"],
                pid=row["pid"],
                spec=json.loads(row["spec"]),
                exit=None if row["exit"] is None else json.loads(row["exit"]),
            )
            for row in rows
        ]
