"""What every backend promises about processes: their output by offset, their input, their end."""

from __future__ import annotations

import asyncio
import signal

import pytest
from kit.stage import Stage, eventually, exit_of, output_of, read_all, read_exactly

from garden_py.model import errors
from garden_py.model.process import OutputStream, WindowSize

STDOUT, STDERR = OutputStream.STDOUT, OutputStream.STDERR


async def test_exit_is_told_once_and_known_for_ever(stage: Stage) -> None:
    """The exit status is state: any number of waiters, before and after the exit."""
    handle = await stage.create()
    process = await stage.start(handle, "sh", "-c", "exit 7")
    first, second = await asyncio.gather(exit_of(process), exit_of(process))
    assert first == second == (7, None)
    assert await exit_of(process) == (7, None)
    assert process.exit is not None
    assert process.exit.exited_ns >= process.started_ns > 0
    await eventually(lambda: stage.heard.exits == [(handle, process.id)], "the report of the exit")


async def test_a_start_that_cannot_be_recorded_is_none(stage: Stage) -> None:
    """A program that no journal knows must never run: after a restart nobody could tell of its exit."""
    handle = await stage.create()

    def refuse() -> None:
        raise errors.HostFault("journal", "the disk is full")

    with pytest.raises(errors.HostFault, match="the disk is full"):
        await stage.start(handle, "cat", id="p", record=refuse)
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "the end of what was prepared")
    assert stage.heard.exits == []
    recorded: list[str] = []
    process = await stage.start(handle, "sh", "-c", "exit 7", id="p", record=lambda: recorded.append("p"))
    assert await exit_of(process) == (7, None)
    assert recorded == ["p"]


async def test_streams_are_separate_and_complete(stage: Stage) -> None:
    """Both streams can be read after the process is gone."""
    process = await stage.start(await stage.create(), "sh", "-c", "echo to stdout; echo to stderr >&2")
    assert await exit_of(process) == (0, None)
    assert await output_of(process) == (b"to stdout\n", b"to stderr\n")
    assert process.output(STDOUT).closed
    assert process.output(STDERR).closed


async def test_output_is_addressed_by_offset(stage: Stage) -> None:
    """A reader that comes later, or again, gets exactly the rest."""
    process = await stage.start(await stage.create(), "echo", "0123456789")
    await exit_of(process)
    log = process.output(STDOUT)
    assert await read_all(log) == b"0123456789\n"
    assert await read_all(log, 4) == b"456789\n"
    assert await read_all(log, 11) == b""
    assert (log.first_offset, log.end_offset) == (0, 11)
    with pytest.raises(errors.OffsetOutOfRange) as refused:
        log.open_reader(12)
    assert (refused.value.first_offset, refused.value.end_offset) == (0, 11)


async def test_reader_waits_for_output_and_for_the_end(stage: Stage) -> None:
    """Read gives at least one byte while the stream is open, and nothing only at its end."""
    process = await stage.start(await stage.create(), "cat")
    reader = process.output(STDOUT).open_reader(0)
    assert reader.read_nowait(100) == b""
    reading = asyncio.ensure_future(reader.read(100))
    await process.write_stdin(b"late", None)
    assert await asyncio.wait_for(reading, 10) == b"late"
    assert reader.offset == 4
    ending = asyncio.ensure_future(reader.read(100))
    await process.close_stdin()
    assert await asyncio.wait_for(ending, 10) == b""
    reader.close()
    assert await exit_of(process) == (0, None)


async def test_wake_is_set_by_output_and_by_exit(stage: Stage) -> None:
    """One event is enough to follow two streams and the process."""
    process = await stage.start(await stage.create(), "cat")
    wake = asyncio.Event()
    readers = [process.output(stream).open_reader(0, wake) for stream in (STDOUT, STDERR)]
    wake.clear()
    await process.write_stdin(b"x", None)
    await asyncio.wait_for(wake.wait(), 10)
    wake.clear()
    await process.signal(9, group=False)
    await asyncio.wait_for(wake.wait(), 10)
    for reader in readers:
        reader.close()


async def test_stdin_arrives_in_order_and_ends(stage: Stage) -> None:
    """Cat ends when its input does, and has written all of it."""
    process = await stage.start(await stage.create(), "cat")
    for piece in (b"one ", b"two ", b"three"):
        await process.write_stdin(piece, None)
    await process.close_stdin()
    assert await exit_of(process) == (0, None)
    assert (await output_of(process))[0] == b"one two three"


async def test_repeated_stdin_is_fed_once(stage: Stage) -> None:
    """A client whose connection broke sends its last chunk again; the process must not read it twice."""
    process = await stage.start(await stage.create(), "cat")
    await process.write_stdin(b"abcd", 0)
    await process.write_stdin(b"abcd", 0)
    await process.write_stdin(b"cdef", 2)
    with pytest.raises(errors.OffsetOutOfRange) as gap:
        await process.write_stdin(b"later", 100)
    assert gap.value.end_offset == 6
    with pytest.raises(errors.OffsetOutOfRange):
        await process.close_stdin(100)  # the process would take half of its input for all of it
    await process.close_stdin(6)
    await process.close_stdin(6)
    assert (await output_of(process))[0] == b"abcdef"


async def test_input_after_its_end_is_refused(stage: Stage) -> None:
    """Dropping it silently would lose the caller's bytes."""
    process = await stage.start(await stage.create(), "sleep", "1000")
    await process.close_stdin()
    with pytest.raises(errors.StdinClosed):
        await process.write_stdin(b"x", None)
    await process.close_stdin()
    await process.signal(9, group=False)


@pytest.mark.parametrize("group", [False, True])
async def test_signal_ends_a_process(stage: Stage, group: bool) -> None:
    """The end by a signal is told as that, and signalling the dead is harmless."""
    process = await stage.start(await stage.create(), "sleep", "1000")
    assert await process.signal(15, group=group)
    assert await exit_of(process) == (None, 15)
    assert not await process.signal(15, group=group)
    assert process.exit is not None
    assert "SIGTERM" in process.exit.reason


async def test_signal_all_reaches_every_process(stage: Stage) -> None:
    """Stop ends the whole workload and spares PID 1."""
    handle = await stage.create()
    processes = [await stage.start(handle, "sleep", "1000") for _ in range(3)]
    assert stage.backend.workload_count(handle) == 3
    await stage.backend.signal_all(handle, signal.SIGKILL)  # an IntEnum, as callers have it
    assert [await exit_of(process) for process in processes] == [(None, 9)] * 3
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "an empty workload")
    assert await exit_of(await stage.start(handle, "true")) == (0, None)


async def test_window_size_needs_a_terminal(stage: Stage) -> None:
    """A resize that cannot work is refused, one that can is taken, and one too late is told apart."""
    handle = await stage.create()
    plain = await stage.start(handle, "sleep", "1000")
    with pytest.raises(errors.NoTty):
        await plain.resize(WindowSize(10, 20))
    terminal = await stage.start(handle, "sleep", "1000", tty=WindowSize(24, 80))
    await terminal.resize(WindowSize(50, 100))
    await terminal.signal(9, group=False)
    await exit_of(terminal)
    with pytest.raises(errors.ProcessExited):
        await terminal.resize(WindowSize(50, 100))
    await plain.signal(9, group=False)


async def test_terminal_has_one_output(stage: Stage) -> None:
    """With a terminal everything is on stdout; stderr is closed and empty."""
    process = await stage.start(await stage.create(), "true", tty=WindowSize())
    assert await exit_of(process) == (0, None)
    assert await read_all(process.output(STDERR)) == b""
    assert process.output(STDERR).closed


@pytest.mark.parametrize(
    ("path", "user", "error"),
    [
        ("no-such-program", "", errors.ExecutableNotFound),
        ("/no/such/program", "", errors.ExecutableNotFound),
        ("/etc/passwd", "", errors.NotExecutable),
        ("true", "stranger", errors.UserNotFound),
    ],
)
async def test_start_fails_with_its_reason(
    stage: Stage, path: str, user: str, error: type[errors.GardenError]
) -> None:
    """A process that never ran has no exit code, but an error that says why; its id is free again."""
    handle = await stage.create()
    with pytest.raises(error):
        await stage.start(handle, path, user=user, id="mine")
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "an empty workload")
    assert await exit_of(await stage.start(handle, "true", id="mine")) == (0, None)


async def test_environment_is_in_order_and_the_later_wins(stage: Stage) -> None:
    """The container's entries come first, the process's win."""
    handle = await stage.create()
    process = await stage.start(handle, "env", all_env=("A=container", "B=container", "A=process"))
    lines = (await output_of(process))[0].decode().splitlines()
    assert "A=process" in lines
    assert "B=container" in lines
    assert "A=container" not in lines


async def test_forgotten_process_is_gone(stage: Stage) -> None:
    """Its id can be used again."""
    handle = await stage.create()
    process = await stage.start(handle, "echo", "first", id="mine")
    await read_all(process.output(STDOUT))
    await exit_of(process)
    process.exit_recorded()
    await stage.backend.forget_process(handle, "mine")
    await stage.backend.forget_process(handle, "mine")


async def test_processes_survive_a_restart(stage: Stage) -> None:
    """A new server finds the process running and its output complete, then and later."""
    handle = await stage.create()
    process = await stage.start(handle, "sh", "-c", "echo first; read x; echo second; exit 5")
    await read_exactly(process.output(STDOUT), 6)
    assert await stage.restart() == {}
    again = await stage.adopt(handle, process)
    assert again.exit is None
    assert again.pid == process.pid
    await again.write_stdin(b"go on\n", None)
    assert await exit_of(again) == (5, None)
    assert await read_all(again.output(STDOUT)) == b"first\nsecond\n"
    assert stage.heard.exits == [(handle, process.id)]


async def test_exit_recorded_before_a_restart_is_kept(stage: Stage) -> None:
    """What the journal knows is not asked again, and the output is still there."""
    handle = await stage.create()
    process = await stage.start(handle, "echo", "kept")
    await exit_of(process)
    await read_all(process.output(STDOUT))
    process.exit_recorded()
    await stage.restart()
    again = await stage.adopt(handle, process)
    assert await exit_of(again) == (0, None)
    assert await read_all(again.output(STDOUT)) == b"kept\n"


async def test_container_that_died_meanwhile_is_reported_lost(stage: Stage) -> None:
    """A row without a container gives a reason, not an exception, and can be destroyed."""
    handle = await stage.create()
    await stage.backend.destroy(handle, dict(stage.facts[handle]))
    lost = await stage.restart()
    assert set(lost) == {handle}
    assert lost[handle]
    with pytest.raises(errors.ContainerNotFound):
        stage.backend.pid(handle)
    await stage.destroy(handle)
