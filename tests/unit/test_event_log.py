"""Events that outlive the server that told them: nothing missing is ever passed off as complete."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from garden_py.model.errors import OffsetOutOfRange
from garden_py.model.process import ExitStatus
from garden_py.service import event_log
from garden_py.service.event_log import EVENTS_PER_FILE, EventLog
from garden_py.service.events import KEPT_CONNECTIONS, KEPT_EVENTS, Event, EventHub, EventKind
from garden_py.wiring import open_events


def server(directory: Path, first_cursor: int) -> tuple[EventLog, EventHub]:
    """What a server that starts does."""
    log = EventLog(directory)
    hub = EventHub(first_cursor, log.append)
    after, events = log.load()
    if after:
        hub.restore(after, events)
    else:
        log.begin(first_cursor)
    return log, hub


async def seen(hub: EventHub, after: int) -> list[Event]:
    found = []
    hub.publish(EventKind.LEAK_FOUND, "end")
    async for event in hub.watch(after):
        if event.handle == "end":
            return found
        found.append(event)
    raise AssertionError


async def test_next_server_goes_on_where_the_last_has_ended(tmp_path: Path) -> None:
    """All that an event holds, in order, also over several restarts."""
    exit_ = ExitStatus(code=None, signal=9, out_of_memory=True, exited_ns=5, reason="killed")
    told: list[Event] = []
    for life in range(6):
        log, hub = server(tmp_path / "events", 1000 * (life + 1))
        hub.publish(EventKind.CONTAINER_CREATED, f"box-{life}", why="test")
        hub.publish(EventKind.PROCESS_EXITED, f"box-{life}", process_id="p", exit=exit_)
        log.close()
    _, hub = server(tmp_path / "events", 10_000)
    told = await seen(hub, 1000)
    assert [(event.handle, event.cursor) for event in told] == [
        (f"box-{life}", 1000 * (life + 1) + number) for life in range(6) for number in (1, 2)
    ]
    assert (told[1].exit, told[0].details, told[1].process_id) == (exit_, {"why": "test"}, "p")
    assert await seen(hub, 6001) == [told[-1]]
    with pytest.raises(OffsetOutOfRange):
        hub.check_cursor(999)


async def test_watcher_that_has_seen_all_waits_for_the_next_servers_first_event(tmp_path: Path) -> None:
    """Its cursor is below that server's own, with nothing between."""
    log, hub = server(tmp_path, 1000)
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    log.close()
    _, hub = server(tmp_path, 2000)
    watching = aiter(hub.watch(1001))
    coming = asyncio.ensure_future(anext(watching))
    await asyncio.sleep(0.01)
    assert not coming.done()
    hub.publish(EventKind.CONTAINER_DESTROYED, "box")
    assert (await asyncio.wait_for(coming, 5)).kind is EventKind.CONTAINER_DESTROYED
    await watching.aclose()  # type: ignore[attr-defined]


async def test_a_server_without_an_event_is_continued_from_too(tmp_path: Path) -> None:
    """Whoever began to watch then has missed nothing."""
    log, hub = server(tmp_path, 1000)
    cursor = hub.cursor
    log.close()
    _, hub = server(tmp_path, 2000)
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    assert [event.handle for event in await seen(hub, cursor)] == ["box"]


@pytest.mark.parametrize("rebooted", [False, True])
async def test_events_of_connections_outlive_the_server_too(tmp_path: Path, rebooted: bool) -> None:
    """In files of their own, in order with the others; of before a reboot there is nothing."""
    directory = tmp_path / "events"
    logs, hub = open_events(directory, rebooted=False)
    begun = hub.cursor
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    hub.publish(EventKind.CONNECTION_DENIED, "box", rule="tcp")
    hub.publish(EventKind.PROCESS_STARTED, "box")
    hub.publish(EventKind.CONNECTION_ALLOWED, "box")
    cursor = hub.cursor
    for log in logs:
        log.close()
    logs, hub = open_events(directory, rebooted=rebooted)
    assert hub.cursor > cursor
    if rebooted:
        with pytest.raises(OffsetOutOfRange):
            hub.check_cursor(begun)
        begun = hub.cursor
    kinds = [event.kind for event in await seen(hub, begun)]
    kept = [
        EventKind.CONTAINER_CREATED,
        EventKind.CONNECTION_DENIED,
        EventKind.PROCESS_STARTED,
        EventKind.CONNECTION_ALLOWED,
    ]
    assert kinds == ([] if rebooted else kept)
    for log in logs:
        log.close()


async def test_a_flood_of_connections_pushes_out_no_other_event(tmp_path: Path) -> None:
    """Neither in memory nor on disk."""
    logs, hub = open_events(tmp_path, rebooted=False)
    begun = hub.cursor
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    for _ in range(KEPT_CONNECTIONS + EVENTS_PER_FILE + 1):
        hub.publish(EventKind.CONNECTION_DENIED, "box")
    for log in logs:
        log.close()
    assert len(list((tmp_path / "connections").iterdir())) == 3
    logs, hub = open_events(tmp_path, rebooted=False)
    found = await seen(hub, begun)
    assert found[0].kind is EventKind.CONTAINER_CREATED
    assert len(found) == 1 + KEPT_CONNECTIONS
    for log in logs:
        log.close()


async def test_retention_is_bounded_on_disk_and_exact_in_memory(tmp_path: Path) -> None:
    """Three files; of what is kept nothing is missing."""
    log, hub = server(tmp_path, 1000)
    for _ in range(3 * EVENTS_PER_FILE + 7):
        hub.publish(EventKind.PROPERTIES_CHANGED, "box")
    log.close()
    assert len(os.listdir(tmp_path)) == 3
    _, hub = server(tmp_path, 10**6)
    oldest = 1000 + 3 * EVENTS_PER_FILE + 7 - KEPT_EVENTS
    assert len(await seen(hub, oldest + 1)) == KEPT_EVENTS - 1
    with pytest.raises(OffsetOutOfRange):
        hub.check_cursor(oldest - 1)


@pytest.mark.parametrize("torn", [b'{"cursor": 12', b"\xff\xfe", b"{"])
async def test_a_cut_line_is_dropped_and_written_over(tmp_path: Path, torn: bytes) -> None:
    """The server was killed in the middle of a write: nobody has seen that event."""
    log, hub = server(tmp_path, 1000)
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    log.close()
    file = tmp_path / os.listdir(tmp_path)[0]
    file.write_bytes(file.read_bytes() + torn)
    log, hub = server(tmp_path, 2000)
    hub.publish(EventKind.CONTAINER_DESTROYED, "box")
    log.close()
    _, hub = server(tmp_path, 3000)
    kinds = [EventKind.CONTAINER_CREATED, EventKind.CONTAINER_DESTROYED]
    assert [event.kind for event in await seen(hub, 1000)] == kinds


@pytest.mark.parametrize(
    "content", [b"", b"\n", b'{"after": "x"}\n', b'{"after": 7}\n{"cursor": 8}\n', b"\0\0\n"]
)
async def test_an_unreadable_file_ends_what_is_known(tmp_path: Path, content: bytes) -> None:
    """A cursor of before is refused; nothing is made up."""
    tmp_path.joinpath(f"{7:020d}.jsonl").write_bytes(content)
    log, hub = server(tmp_path, 2000)
    with pytest.raises(OffsetOutOfRange):
        hub.check_cursor(7)
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    log.close()
    _, hub = server(tmp_path, 3000)
    assert [event.handle for event in await seen(hub, 2000)] == ["box"]


async def test_a_full_disk_breaks_off_and_does_not_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event that was not written would be missing: cursors of before are refused by the next server."""
    log, hub = server(tmp_path, 1000)
    hub.publish(EventKind.CONTAINER_CREATED, "one")
    write = os.write

    def refuse(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_log.os, "write", refuse)
    hub.publish(EventKind.CONTAINER_CREATED, "two")
    monkeypatch.setattr(event_log.os, "write", write)
    hub.publish(EventKind.CONTAINER_CREATED, "three")
    assert [event.handle for event in await seen(hub, 1000)] == ["one", "two", "three"]
    log.close()
    _, hub = server(tmp_path, 2000)
    with pytest.raises(OffsetOutOfRange):
        hub.check_cursor(1001)
    assert [event.handle for event in await seen(hub, 1002)][:1] == ["three"]


def test_a_reboot_forgets(tmp_path: Path) -> None:
    log, hub = server(tmp_path, 1000)
    hub.publish(EventKind.CONTAINER_CREATED, "box")
    log.clear()
    assert EventLog(tmp_path).load() == (0, [])
