"""A process's input between client and pipe: what the kernel knows of it when a server is killed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from garden_py.backend.streams.spool import NoSpool, Spool
from garden_py.backend.streams.stdin import StdinFeed
from garden_py.model.errors import OffsetOutOfRange, StdinClosed


class Keeper:
    """What the agent is to a spool: a descriptor of the same open file description."""

    def __init__(self) -> None:
        self.fd = -1

    async def keep(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def give_back(self) -> Spool:
        return Spool(os.dup(self.fd))


def new_pipe() -> tuple[int, int, int]:
    """(read end, write end, the agent's duplicate of the write end)."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    return read_fd, write_fd, os.dup(write_fd)


async def read_exactly(fd: int, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        data = await asyncio.to_thread(os.read, fd, min(1 << 16, count - len(found)))
        assert data, f"the input ended after {len(found)} bytes"
        found += data
    return bytes(found)


async def test_another_server_goes_on_where_the_killed_one_stopped() -> None:
    """Accepted, partly fed, and then nobody closes anything in good order: every byte arrives once."""
    keeper, (read_fd, write_fd, duplicate) = Keeper(), new_pipe()
    data = os.urandom(700_000)
    first = StdinFeed("p", write_fd, is_tty=False, keep=keeper.keep)
    await first.write(data[:600_000], 0)
    found = await read_exactly(read_fd, 100_000)
    first.release()

    second = StdinFeed("p", duplicate, is_tty=False, spool=keeper.give_back(), keep=keeper.keep)
    assert second.accepted == 600_000
    with pytest.raises(OffsetOutOfRange):
        await second.write(b"x", 600_001)
    await second.write(data[500_000:], 500_000)
    await second.close()
    found += await read_exactly(read_fd, 600_000)
    assert found == data
    assert os.read(read_fd, 1) == b""
    second.release()
    os.close(read_fd)
    os.close(keeper.fd)


async def test_end_of_input_is_remembered() -> None:
    """The client has said that there is no more; what was accepted before still comes first."""
    keeper, (read_fd, write_fd, duplicate) = Keeper(), new_pipe()
    data = b"x" * 1_800_000  # more than the pipe holds
    first = StdinFeed("p", write_fd, is_tty=False, keep=keeper.keep)
    await first.write(data, 0)
    await first.close()
    first.release()
    ended: list[bool] = []
    second = StdinFeed(
        "p", duplicate, is_tty=False, spool=keeper.give_back(), on_end=lambda: ended.append(True)
    )
    with pytest.raises(StdinClosed):
        await second.write(b"more", len(data))
    assert ended == []
    assert await read_exactly(read_fd, len(data)) == data
    assert await asyncio.to_thread(os.read, read_fd, 1) == b""
    assert ended == [True]
    second.release()
    os.close(read_fd)
    os.close(keeper.fd)


async def test_typed_end_of_a_terminal_is_no_byte_of_the_client() -> None:
    """^D is ours: the offset that a client is told does not count it, before and after a restart."""
    keeper, (read_fd, write_fd, duplicate) = Keeper(), new_pipe()
    first = StdinFeed("p", write_fd, is_tty=True, keep=keeper.keep)
    await first.write(b"exit\n", 0)
    await first.close()
    assert first.accepted == 5
    first.release()
    second = StdinFeed("p", duplicate, is_tty=True, spool=keeper.give_back())
    assert second.accepted == 5
    await second.close()
    assert os.read(read_fd, 100) == b"exit\n\x04"
    second.release()
    os.close(read_fd)
    os.close(keeper.fd)


async def test_memory_is_given_back_while_the_input_flows() -> None:
    """What has been read is freed; what still waits in the pipe is not harmed by that."""
    keeper, (read_fd, write_fd, duplicate) = Keeper(), new_pipe()
    feed = StdinFeed("p", write_fd, is_tty=False, keep=keeper.keep)
    data = os.urandom(24 << 20)
    writing = asyncio.ensure_future(feed.write(data, 0))
    found = await read_exactly(read_fd, 20 << 20)
    assert os.fstat(keeper.fd).st_blocks * 512 < 6 << 20
    found += await read_exactly(read_fd, 4 << 20)
    await writing
    assert found == data
    feed.release()
    for fd in (read_fd, duplicate, keeper.fd):
        os.close(fd)


async def test_many_small_pieces_do_not_wait_for_a_reader() -> None:
    """A pipe has few slots; keys typed at a program that is busy must not hold back the signal behind them."""
    read_fd, write_fd, duplicate = new_pipe()
    feed = StdinFeed("p", write_fd, is_tty=False)
    async with asyncio.timeout(10):
        for number in range(2000):
            await feed.write(b"%04d" % number, 4 * number)
    assert await read_exactly(read_fd, 8000) == b"".join(b"%04d" % number for number in range(2000))
    feed.release()
    os.close(read_fd)
    os.close(duplicate)


async def test_dropped_input_is_counted_in_the_spool() -> None:
    """A process that closed its stdin: after a restart the client's offset is no gap."""
    keeper, (read_fd, write_fd, duplicate) = Keeper(), new_pipe()
    first = StdinFeed("p", write_fd, is_tty=False, keep=keeper.keep)
    await first.write(b"read", 0)
    assert os.read(read_fd, 10) == b"read"
    os.close(read_fd)
    await first.write(b"into the void", 4)
    await first.write(b" and more", 17)
    first.release()
    second = StdinFeed("p", duplicate, is_tty=False, spool=keeper.give_back())
    assert second.accepted == 26
    await second.write(b"!", 26)
    second.release()
    os.close(keeper.fd)


async def test_refused_keeping_reaches_the_writer() -> None:
    """Input that nobody else holds would be fed twice or never after a restart."""
    read_fd, write_fd, duplicate = new_pipe()

    async def refuse(fd: int) -> None:
        raise OSError("no descriptor is free")

    feed = StdinFeed("p", write_fd, is_tty=False, keep=refuse)
    with pytest.raises(OSError, match="no descriptor is free"):
        await feed.write(b"x", 0)
    assert feed.accepted == 0
    feed.release()
    os.close(read_fd)
    os.close(duplicate)


def test_files_of_others_are_no_spool(tmp_path: Path) -> None:
    """The agent may hand over anything; a read from a file system of its own making might never return."""
    (tmp_path / "file").write_bytes(b"x")
    read_fd, write_fd = os.pipe()
    with (tmp_path / "file").open("rb+") as file:
        for fd in (file.fileno(), read_fd, write_fd):
            try:
                spool = Spool(fd)
            except NoSpool:
                continue
            pytest.fail(f"{os.readlink(f'/proc/self/fd/{spool.fd}')} was taken for a spool")
    os.close(read_fd)
    os.close(write_fd)


async def test_cut_spool_ends_the_feeding() -> None:
    """Only the agent can do that, and it harms its own process alone: no loop without end, no error."""
    keeper, (read_fd, write_fd, duplicate) = Keeper(), new_pipe()
    feed = StdinFeed("p", write_fd, is_tty=False, keep=keeper.keep)
    data = b"x" * 1_800_000
    await feed.write(data, 0)
    os.ftruncate(keeper.fd, 0)
    await read_exactly(read_fd, 1 << 20)
    async with asyncio.timeout(10):
        await feed.write(b"y" * 10, len(data))
    assert feed.accepted == len(data) + 10
    feed.release()
    for fd in (read_fd, duplicate, keeper.fd):
        os.close(fd)
