"""The input side: in order, at most once per byte, and never in the way of the process's end."""

from __future__ import annotations

import asyncio
import os

import pytest

from garden_py.backend.streams.stdin import StdinFeed
from garden_py.model.errors import NoTty, OffsetOutOfRange, OffsetUnknown, StdinClosed
from garden_py.model.process import WindowSize


async def test_full_pipe_makes_the_writer_wait() -> None:
    """Nothing is buffered for a process that does not read; what was accepted arrives whole and in order."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    feed = StdinFeed("p", write_fd, is_tty=False)
    data = os.urandom(4 << 20)
    writing = asyncio.ensure_future(feed.write(data, 0))
    await asyncio.sleep(0)
    assert not writing.done()
    found = bytearray()
    while len(found) < len(data):
        found += await asyncio.to_thread(os.read, read_fd, 1 << 20)
    await asyncio.wait_for(writing, 10)
    assert bytes(found) == data
    assert feed.accepted == len(data)
    await feed.close()
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)


async def test_writers_take_turns() -> None:
    """Two clients' chunks do not mix inside a chunk."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    feed = StdinFeed("p", write_fd, is_tty=False)
    size = 1 << 20
    writing = asyncio.gather(feed.write(b"a" * size, None), feed.write(b"b" * size, None))
    found = bytearray()
    while len(found) < 2 * size:
        found += await asyncio.to_thread(os.read, read_fd, 1 << 20)
    await writing
    assert bytes(found) in (b"a" * size + b"b" * size, b"b" * size + b"a" * size)
    feed.release()
    os.close(read_fd)


async def test_data_for_a_process_that_reads_no_more_is_dropped() -> None:
    """The exit tells; a client in the middle of sending must not get an error of its own."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    feed = StdinFeed("p", write_fd, is_tty=False)
    os.close(read_fd)
    await feed.write(b"into the void", 0)
    await feed.write(b" and more", 13)
    assert feed.accepted == 22


async def test_release_wakes_a_waiting_writer() -> None:
    """When the process ends, whoever waits for room in its pipe goes on."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    feed = StdinFeed("p", write_fd, is_tty=False)
    writing = asyncio.ensure_future(feed.write(b"x" * (4 << 20), None))
    await asyncio.sleep(0)
    feed.release()
    await asyncio.wait_for(writing, 10)
    feed.release()
    os.close(read_fd)


async def test_offsets_make_a_retry_harmless() -> None:
    """Known bytes are skipped, a gap is refused, and the end is final."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    feed = StdinFeed("p", write_fd, is_tty=False)
    await feed.write(b"abc", 0)
    await feed.write(b"abcdef", 0)
    await feed.write(b"bc", 1)
    with pytest.raises(OffsetOutOfRange, match=r"stdin goes on at offset 6.* 7 leaves a gap"):
        await feed.write(b"x", 7)
    with pytest.raises(OffsetOutOfRange, match=r"stdin goes on at offset 6.* 7 leaves a gap"):
        await feed.close(7)
    assert os.read(read_fd, 100) == b"abcdef"
    await feed.close(6)
    await feed.close()
    await feed.write(b"abc", 0)  # a late repetition, no new byte
    with pytest.raises(StdinClosed):
        await feed.write(b"g", 6)
    os.close(read_fd)


async def test_offset_is_refused_when_the_count_is_not_known() -> None:
    """After a restart of the server a byte must not be fed twice on a guess."""
    feed = StdinFeed("p", -1, is_tty=False, counted=False)
    assert feed.accepted is None
    with pytest.raises(OffsetUnknown):
        await feed.write(b"abc", 0)
    await feed.write(b"abc", None)


async def test_pipe_has_no_window() -> None:
    """A size for what is no terminal is the caller's mistake."""
    feed = StdinFeed("p", -1, is_tty=False)
    with pytest.raises(NoTty):
        feed.resize(WindowSize(1, 1))
