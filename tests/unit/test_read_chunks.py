"""ReadOutput's chunks: in order, to the end that was asked for, and read ahead of the one who takes them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc.streams import CHUNK_BYTES, read_chunks
from garden_py.backend.streams.segments import SegmentLog
from garden_py.model.errors import HostFault
from garden_py.observe.metrics import Metrics

RETENTION = 1 << 20  # four segments of as much as a chunk


def stored(directory: Path, size: int) -> tuple[SegmentLog, bytes]:
    """A stream that has so many bytes, as an earlier server has left it, and those bytes."""
    content = b"".join(n.to_bytes(4, "big") for n in range(size // 4))
    for start in range(0, size, CHUNK_BYTES):
        (directory / f"stdout.{start:020d}").write_bytes(content[start : start + CHUNK_BYTES])
    return SegmentLog(directory, "stdout", retention_bytes=RETENTION), content


async def taken(log: SegmentLog, offset: int, end: int | None, *, turns: int, follow: bool = False) -> bytes:
    """All that is told, to one who lets the loop turn so often before asking for more."""
    reader = log.open_reader(offset)
    found = b""
    async with aclosing(read_chunks(reader, pb.STDOUT, end, Metrics(), follow=follow)) as chunks:
        async for encoded in chunks:
            chunk = pb.OutputChunk.FromString(encoded)
            assert chunk.offset == offset + len(found)
            found += chunk.data
            for _ in range(turns):
                await asyncio.sleep(0)
    reader.close()
    return found


@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("end", [None, 101, CHUNK_BYTES, CHUNK_BYTES + 5])
async def test_every_byte_once_and_none_behind_the_end(tmp_path: Path, turns: int, end: int | None) -> None:
    log, content = stored(tmp_path, 3 * CHUNK_BYTES + 400)
    assert await taken(log, 100, end, turns=turns) == content[100:end]


async def test_next_chunk_is_read_while_the_last_one_is_sent(tmp_path: Path) -> None:
    log, _ = stored(tmp_path, 3 * CHUNK_BYTES)
    reader = log.open_reader(0)
    async with aclosing(read_chunks(reader, pb.STDOUT, None, Metrics(), follow=False)) as chunks:
        await anext(chunks)
        assert reader.offset == CHUNK_BYTES
        await asyncio.sleep(0)
        assert reader.offset == 2 * CHUNK_BYTES
        await asyncio.sleep(0)
        assert reader.offset == 2 * CHUNK_BYTES, "and no more than one"
    reader.close()


async def test_one_that_leaves_leaves_nothing_to_be_read(tmp_path: Path) -> None:
    """The reader is closed then; to read on would open its file again."""
    log, _ = stored(tmp_path, 3 * CHUNK_BYTES)
    reader = log.open_reader(0)
    async with aclosing(read_chunks(reader, pb.STDOUT, None, Metrics(), follow=True)) as chunks:
        await anext(chunks)
    await asyncio.sleep(0)
    assert reader.offset == CHUNK_BYTES
    reader.close()


async def test_what_was_read_ahead_of_a_failure_is_told_before_it(tmp_path: Path) -> None:
    log, content = stored(tmp_path, 2 * CHUNK_BYTES)
    (tmp_path / f"stdout.{CHUNK_BYTES:020d}").unlink()
    reader = log.open_reader(0)
    async with aclosing(read_chunks(reader, pb.STDOUT, None, Metrics(), follow=False)) as chunks:
        assert pb.OutputChunk.FromString(await anext(chunks)).data == content[:CHUNK_BYTES]
        await asyncio.sleep(0)
        with pytest.raises(HostFault, match="read output"):
            await anext(chunks)
    reader.close()


async def test_follower_gets_what_comes_later(tmp_path: Path) -> None:
    log, content = stored(tmp_path, 400)
    told = asyncio.create_task(taken(log, 0, None, turns=1, follow=True))
    await asyncio.sleep(0)
    assert not told.done()
    log.close()
    assert await told == content
