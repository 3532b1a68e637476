"""Events on disk, so that a watcher's cursor is good for a later server too.

    events/00001795671755630700.jsonl     {"after": 1795671755630700}
                                          {"cursor": …, "at_ns": …, "kind": "PROCESS_EXITED", …}
    events/00001795671799999999.jsonl     the next 5,000

A file's first line says after which cursor nothing is missing in it and those that follow. Each event is one write(2)
before any watcher sees it, so it survives the server's end however it comes. Events of connections have files of their
own below, `connections/`: a container can cause any number of them, and they push out each other only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import structlog

from garden_py.model.codec import dump_exit, load_exit
from garden_py.service.events import KEPT_EVENTS, Event, EventKind

log = structlog.get_logger()
EVENTS_PER_FILE = KEPT_EVENTS // 2
_FILES_KEPT = 3  # the one being written, and two full ones: all that a server keeps


class EventLog:
    """The events of one state directory.

    Args:
        directory: made if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1
        self._written = 0

    def load(self) -> tuple[int, list[Event]]:
        """What is there: the cursor after which nothing is missing, and the events since; (0, []) for nothing."""
        after, events = 0, list[Event]()
        for path in self._files():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a last line may have been cut by the server's end
            try:
                first, *lines = whole.splitlines()
                begin = int(json.loads(first)["after"])
                found = [_load(json.loads(line)) for line in lines]
            except (ValueError, KeyError, TypeError) as error:
                log.warning("events.unreadable", file=str(path), error=str(error))
                after, events = 0, []
                continue
            after = after or begin
            events += found
            self._go_on(path, len(whole), len(found))
        return after, events

    def _go_on(self, path: Path, size: int, written: int) -> None:
        """Write behind what is in a file."""
        self.close()
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._written = written

    def begin(self, after: int) -> None:
        """Write down that nothing has happened before a cursor, and that all that follows will be there."""
        try:
            self._begin(after)
        except OSError as error:
            log.warning("events.not_written", error=str(error))
            self._give_up()

    def append(self, event: Event) -> None:
        """Write an event down. If that fails, no later server has it or what was before it, and the log says so."""
        try:
            if self._fd < 0 or self._written >= EVENTS_PER_FILE:
                self._begin(event.cursor - 1)
            _write(self._fd, _dump(event))
            self._written += 1
        except OSError as error:
            log.warning("events.not_written", error=str(error))
            self._give_up()

    def clear(self) -> None:
        """Forget all: of before a reboot, after which the last ones may not have reached the disk."""
        self.close()
        for path in self._files():
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop writing; twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob("*.jsonl"))

    def _begin(self, after: int) -> None:
        """A new file. What is before it is complete: all of it has been written, or there is none."""
        self.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / f"{after:020d}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        _write(self._fd, {"after": after})
        self._written = 0
        for old in self._files()[:-_FILES_KEPT]:
            old.unlink()

    def _give_up(self) -> None:
        try:
            self.clear()
        except OSError as error:
            log.error("events.not_cleared", error=str(error))


def _write(fd: int, value: dict[str, Any]) -> None:
    data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
    if os.write(fd, data) != len(data):
        raise OSError("an event was cut")


def _dump(event: Event) -> dict[str, Any]:
    return {
        "cursor": event.cursor,
        "at_ns": event.at_ns,
        "kind": event.kind.value,
        "handle": event.handle,
        "process_id": event.process_id,
        "exit": None if event.exit is None else dump_exit(event.exit),
        "details": event.details,
    }


def _load(value: dict[str, Any]) -> Event:
    exit_ = value["exit"]
    return Event(
        value["cursor"],
        value["at_ns"],
        EventKind(value["kind"]),
        value["handle"],
        value["process_id"],
        None if exit_ is None else load_exit(exit_),
        value["details"],
    )
