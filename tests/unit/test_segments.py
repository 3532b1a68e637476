"""Segment files: every byte at its offset, bounded, and still there after a crash."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from garden_py.backend.streams.pump import Pump
from garden_py.backend.streams.segments import Intake, SegmentLog
from garden_py.model.errors import HostFault, OffsetOutOfRange

RETENTION = 64 << 10  # four segments of 16 KiB
SEGMENT = 16 << 10


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        try:
            os.close(fd)
        except OSError:  # closed by the test, as its subject
            continue


def pattern(start: int, size: int) -> bytes:
    """Bytes that tell their offset."""
    return b"".join(n.to_bytes(4, "big") for n in range(start // 4, (start + size) // 4))


def fill(log: SegmentLog, pipe: tuple[int, int], size: int) -> None:
    """Write and take size bytes, in pieces that fit a pipe."""
    for start in range(log.end_offset, log.end_offset + size, 4096):
        assert os.write(pipe[1], pattern(start, 4096)) == 4096
        while (intake := log.take(pipe[0])) is Intake.TOOK:
            pass
        assert intake is Intake.EMPTY


def test_bytes_keep_their_offsets_over_segments(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """Reading from anywhere gives the bytes of that place, across the files' borders."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=1 << 20)
    fill(log, pipe, 600 << 10)
    assert len(list(tmp_path.iterdir())) == 3
    for offset in (0, 4, 256 << 10, (256 << 10) - 4, 500_000, 600 << 10):
        reader = log.open_reader(offset)
        found = b""
        while data := reader.read_nowait(100_000):
            found += data
        assert found == pattern(offset, (600 << 10) - offset)
        reader.close()


def test_quiet_stream_has_no_file(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """A thousand silent processes must not cost a thousand files."""
    log = SegmentLog(tmp_path / "streams", "stdout", retention_bytes=RETENTION)
    assert log.take(pipe[0]) is Intake.EMPTY
    assert not (tmp_path / "streams").exists()
    os.close(pipe[1])
    assert log.take(pipe[0]) is Intake.CLOSED
    assert log.closed
    assert not (tmp_path / "streams").exists()


def test_retention_drops_whole_segments(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """Never more than the bound is kept, and what is gone is refused with the first offset that is not."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    fill(log, pipe, 10 * SEGMENT)
    kept = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert kept <= RETENTION
    assert log.first_offset == log.end_offset - kept == 6 * SEGMENT
    with pytest.raises(OffsetOutOfRange) as gone:
        log.open_reader(log.first_offset - 1)
    assert (gone.value.first_offset, gone.value.end_offset) == (6 * SEGMENT, 10 * SEGMENT)
    assert log.open_reader(log.first_offset).read_nowait(8) == pattern(6 * SEGMENT, 8)


def test_reader_holds_a_full_stream_back(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """With a reader attached nothing it has still to read is dropped: the pipe fills instead."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    reader = log.open_reader(0)
    fill(log, pipe, RETENTION)
    os.write(pipe[1], b"one more")
    assert log.take(pipe[0]) is Intake.HELD
    called: list[str] = []
    log.call_when_reader_moves(lambda: called.append("moved"))
    found = reader.read_nowait(SEGMENT - 8)
    assert called == [], "the oldest segment is still needed"
    while len(found) < SEGMENT:
        found += reader.read_nowait(SEGMENT - len(found))
    assert found == pattern(0, SEGMENT)
    assert called == ["moved"]
    assert log.take(pipe[0]) is Intake.TOOK
    assert log.first_offset == SEGMENT


def test_slowest_reader_is_waited_for(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """What the others read meanwhile is no reason to try again."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    slow, quick = log.open_reader(0), log.open_reader(0)
    fill(log, pipe, RETENTION)
    os.write(pipe[1], b"one more")
    assert log.take(pipe[0]) is Intake.HELD
    called: list[str] = []
    log.call_when_reader_moves(lambda: called.append("moved"))
    while quick.read_nowait(RETENTION):
        assert called == []
    assert len(slow.read_nowait(SEGMENT)) == SEGMENT
    assert called == ["moved"]
    assert log.take(pipe[0]) is Intake.TOOK
    for reader in (slow, quick):
        reader.close()


def test_leaving_reader_lets_the_stream_go_on(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """A client that is gone holds nobody."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    reader = log.open_reader(0)
    fill(log, pipe, RETENTION)
    os.write(pipe[1], b"one more")
    assert log.take(pipe[0]) is Intake.HELD
    called: list[str] = []
    log.call_when_reader_moves(lambda: called.append("left"))
    reader.close()
    assert called == ["left"]
    assert log.take(pipe[0]) is Intake.TOOK
    reader.close()


def test_stream_is_recovered_from_its_files(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """After a SIGKILL the sizes of the files say what had arrived, and writing goes on behind it."""
    first = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    fill(first, pipe, 5 * SEGMENT + 4096)
    fill_other = SegmentLog(tmp_path, "stderr", retention_bytes=RETENTION)
    assert fill_other.end_offset == 0
    again = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    assert (again.first_offset, again.end_offset) == (first.first_offset, first.end_offset)
    fill(again, pipe, SEGMENT)
    reader = again.open_reader(again.first_offset)
    found = b""
    while data := reader.read_nowait(1 << 20):
        found += data
    assert found == pattern(again.first_offset, again.end_offset - again.first_offset)


def test_less_retention_on_a_full_disk_does_not_begin_the_stream_anew(
    tmp_path: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's default was lowered: one old segment alone is beyond it, but says where the stream is."""
    earlier = SegmentLog(tmp_path, "stdout", retention_bytes=1 << 20)
    fill(earlier, pipe, 512 << 10)
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    assert os.write(pipe[1], b"more") == 4
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", _disk_full)
        assert log.take(pipe[0]) is Intake.DISK_FULL
    assert SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION).end_offset == 512 << 10
    assert log.take(pipe[0]) is Intake.TOOK
    assert log.end_offset == (512 << 10) + 4


def _disk_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "no space left")


def test_deleted_stream_leaves_no_file(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """A forgotten process gives its disk space back."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    fill(log, pipe, 3 * SEGMENT)
    log.close()
    log.delete()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_pipe_is_refused(tmp_path: Path) -> None:
    """A descriptor from inside a container is not believed to be what it should be."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Invalid argument"):
        log.take(file.fileno())


async def test_pump_moves_everything_and_tells_the_end(tmp_path: Path) -> None:
    """More than a pipe holds, through a busy pump, arrives whole; the end is told once."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    log = SegmentLog(tmp_path, "stdout", retention_bytes=16 << 20)
    ended = asyncio.Event()
    Pump(read_fd, log, on_end=ended.set, on_error=pytest.fail)
    size = 4 << 20

    def write() -> None:
        view = memoryview(pattern(0, size))
        while view:
            view = view[os.write(write_fd, view) :]
        os.close(write_fd)

    await asyncio.gather(asyncio.to_thread(write), asyncio.wait_for(ended.wait(), 20))
    assert log.closed
    assert log.end_offset == size
    reader = log.open_reader(0)
    found = bytearray()
    while data := await reader.read(1 << 20):
        found += data
    assert found == pattern(0, size)


async def test_pump_takes_a_full_pipe_whose_writer_has_gone(tmp_path: Path) -> None:
    """Much output and its end in one turn: what a busy process looks like after a restart of the server."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION * 4)
    assert os.write(write_fd, pattern(0, 65536)) == 65536
    os.close(write_fd)
    ended: list[bool] = []
    Pump(read_fd, log, on_end=lambda: ended.append(True), on_error=pytest.fail).drain()
    assert (log.end_offset, log.closed, ended) == (65536, True, [True])


async def test_pump_waits_for_a_slow_reader(tmp_path: Path) -> None:
    """A reader that starts late still gets every byte of a stream larger than its retention."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    reader = log.open_reader(0)
    Pump(read_fd, log, on_end=lambda: None, on_error=pytest.fail)
    size = 1 << 20

    def write() -> None:
        view = memoryview(pattern(0, size))
        while view:
            view = view[os.write(write_fd, view) :]
        os.close(write_fd)

    async def read() -> bytes:
        found = bytearray()
        while data := await reader.read(10_000):
            found += data
        return bytes(found)

    _, found = await asyncio.wait_for(asyncio.gather(asyncio.to_thread(write), read()), 20)
    assert found == pattern(0, size)


async def test_pump_reports_a_descriptor_that_misbehaves(tmp_path: Path) -> None:
    """The stream ends with a reason instead of spinning or raising into the event loop."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    told: list[str] = []
    pump = Pump(ours, log, on_end=pytest.fail, on_error=told.append)
    directory = os.open(tmp_path, os.O_RDONLY)
    os.dup2(directory, ours)
    os.close(directory)
    os.close(theirs)
    pump.drain()
    assert len(told) == 1
    assert log.closed


def test_segment_removed_by_hand_is_told(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """A typed error that names the file, not a bug of the server."""
    log = SegmentLog(tmp_path, "stdout", retention_bytes=RETENTION)
    fill(log, pipe, 4096)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(HostFault, match=str(tmp_path)):
        log.open_reader(0).read_nowait(4096)
