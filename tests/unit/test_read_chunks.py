"""ReadOutput's chunks: in order, to the end that was asked for, and read ahead of the one who takes them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc import streams
from garden_py.api.grpc.streams import CHUNK_BYTES, read_chunks
from garden_py.backend.streams.segments import Intake, SegmentLog
from garden_py.model.errors import HostFault
from garden_py.observe.metrics import Metrics

RETENTION = 1 << 20  # four segments of as much as a chunk


def stored(directory: Path, size: int) -> tuple[SegmentLog, bytes]:
    """A stream that has so many bytes, as an earlier server has left it, and those bytes."""
    content = b"".join(n.to_bytes(4, "big") for n in range(size // 4))
    for start in range(0, size, CHUNK_BYTES):
        (directory / f"stdout.{start:020d}").write_bytes(content[start : start + CHUNK_BYTES])
    return SegmentLog(directory, "stdout", retention_bytes=RETENTION), content


def told(log: SegmentLog, **request: Any) -> AsyncGenerator[bytes, None]:
    """What the caller of ReadOutput gets."""
    return read_chunks(log, pb.ReadOutputRequest(stream=pb.STDOUT, **request), Metrics())


async def collected(log: SegmentLog, *, offset: int = 0, turns: int = 0, **request: Any) -> bytes:
    """All of it, by one who lets the loop turn so often before asking for more."""
    found = b""
    async for encoded in told(log, offset=offset, **request):
        chunk = pb.OutputChunk.FromString(encoded)
        assert chunk.offset == offset + len(found)
        found += chunk.data
        for _ in range(turns):
            await asyncio.sleep(0)
    return found


def next_offset(log: SegmentLog) -> int:
    """Where the log's only reader goes on."""
    (reader,) = log._readers
    return reader.offset


@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("limit", [0, 1, CHUNK_BYTES - 100, CHUNK_BYTES, CHUNK_BYTES + 5, 4 * CHUNK_BYTES])
async def test_every_byte_once_and_no_more_than_asked_for(tmp_path: Path, turns: int, limit: int) -> None:
    log, content = stored(tmp_path, 3 * CHUNK_BYTES + 400)
    expected = content[100 : 100 + limit] if limit else content[100:]
    assert await collected(log, offset=100, limit_bytes=limit, turns=turns) == expected
    assert not log._readers, "who has left holds nobody back"


async def test_next_chunk_is_read_while_the_last_one_is_sent(tmp_path: Path) -> None:
    log, _ = stored(tmp_path, 4 * CHUNK_BYTES)
    async with aclosing(told(log)) as chunks:
        await anext(chunks)
        assert next_offset(log) == CHUNK_BYTES
        await asyncio.sleep(0)
        assert next_offset(log) == 2 * CHUNK_BYTES
        await asyncio.sleep(0)
        assert next_offset(log) == 2 * CHUNK_BYTES, "and no more than one"


async def test_one_that_leaves_leaves_no_file_open(tmp_path: Path) -> None:
    log, _ = stored(tmp_path, 3 * CHUNK_BYTES)
    before = os.listdir("/proc/self/fd")
    async with aclosing(told(log, follow=True)) as chunks:
        await anext(chunks)
    await asyncio.sleep(0)
    assert os.listdir("/proc/self/fd") == before


async def test_what_was_read_before_a_failure_is_told_before_it(tmp_path: Path) -> None:
    log, content = stored(tmp_path, 2 * CHUNK_BYTES)
    (tmp_path / f"stdout.{CHUNK_BYTES:020d}").unlink()
    async with aclosing(told(log)) as chunks:
        assert pb.OutputChunk.FromString(await anext(chunks)).data == content[:CHUNK_BYTES]
        await asyncio.sleep(0)
        with pytest.raises(HostFault, match="read output"):
            await anext(chunks)


@pytest.mark.parametrize("turns", [0, 3])
async def test_follower_gets_what_comes_later(tmp_path: Path, turns: int) -> None:
    log, content = stored(tmp_path, CHUNK_BYTES + 400)
    following = asyncio.create_task(collected(log, turns=turns, follow=True))
    for _ in range(20):
        await asyncio.sleep(0)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.write(write_fd, b"later")
    assert log.take(read_fd) is Intake.TOOK
    log.wake_readers()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not following.done()
    os.close(write_fd)
    assert log.take(read_fd) is Intake.CLOSED
    assert await following == content + b"later"
    os.close(read_fd)


async def test_a_piece_of_a_chunk_is_left_to_grow(tmp_path: Path) -> None:
    """Who writes lines would be told of in many small messages else."""
    log, _ = stored(tmp_path, CHUNK_BYTES + 400)
    async with aclosing(told(log)) as chunks:
        await anext(chunks)
        await asyncio.sleep(0)
        assert next_offset(log) == CHUNK_BYTES


async def test_what_slow_callers_hold_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come late are read for when they ask, until others have gone or taken theirs."""
    monkeypatch.setattr(streams, "_AHEAD_MOST", 2)
    log, content = stored(tmp_path, 3 * CHUNK_BYTES)
    async with AsyncExitStack() as callers:
        slow = [await callers.enter_async_context(aclosing(told(log))) for _ in range(3)]
        for chunks in slow:
            await anext(chunks)
        await asyncio.sleep(0)
        assert sorted(reader.offset for reader in log._readers) == [CHUNK_BYTES] + 2 * [2 * CHUNK_BYTES]
        assert await collected(log, turns=3) == content
    assert streams._Chunks._held == 0
    async with aclosing(told(log)) as chunks:
        await anext(chunks)
        await asyncio.sleep(0)
        assert next_offset(log) == 2 * CHUNK_BYTES
