"""The promise of the client: whatever breaks in between, the caller sees every byte once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from kit.fake_server import RunningFake, flood_bytes, serve_fake

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import (
    AsyncGardenClient,
    ContainerSpec,
    DataLoss,
    FailedPrecondition,
    GardenClient,
    OutOfRange,
    Output,
    ProcessFailed,
    RetryPolicy,
    Stream,
    Unavailable,
)
from garden_py.client.follow import Follower
from garden_py.client.values import OutputChunk

IMPATIENT = RetryPolicy(first_delay_s=0.001, max_delay_s=0.001, total_s=0.01)
QUICK = RetryPolicy(first_delay_s=0.001, max_delay_s=0.01, total_s=5.0)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen within 10 s")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[RunningFake]:
    with serve_fake(tmp_path) as running:
        yield running


@pytest.fixture
def client(fake: RunningFake) -> Iterator[GardenClient]:
    with GardenClient(fake.address, retry=QUICK) as connected:
        connected.create(ContainerSpec(handle="c"))
        yield connected


def test_output_of_a_stream_that_breaks_three_times_is_whole(fake: RunningFake, client: GardenClient) -> None:
    """Each new stream begins at the offset reached, and says so to the server."""
    fake.garden.breaks.extend([3, 1, 2])
    process = client.container("c").run(["flood", "1000000"])
    assert process.output().stdout == flood_bytes(1_000_000)
    offsets = [attach.stdout_offset for attach in fake.garden.containers["c"].processes[process.id].attaches]
    assert offsets == sorted(offsets)
    assert len(offsets) == 3


def test_input_written_into_a_breaking_stream_arrives_once(fake: RunningFake, client: GardenClient) -> None:
    """What the server had accepted before the break is not fed again; what it had not is."""
    fake.garden.stdin_breaks.extend([2, 1])
    process = client.container("c").run(["cat"])
    data = flood_bytes(3_000_000)
    process.stdin.write(data)
    process.stdin.close()
    assert process.output().stdout == data
    assert len(fake.garden.containers["c"].processes[process.id].attaches) == 2


def test_a_replay_that_comes_too_late_does_not_cost_the_output(
    fake: RunningFake, client: GardenClient
) -> None:
    """The server may refuse input after the end of stdin, and ends the stream with it; the output goes on."""
    process = client.container("c").run(["sleep"])
    seen_by_server = fake.garden.containers["c"].processes[process.id]
    process.stdin.write(b"all of it")
    process.stdin.close()
    until(lambda: seen_by_server.stdin_closed)
    process._leave_exchange()  # as a broken connection does; reading needs a new one
    outputs: list[Output] = []
    reader = threading.Thread(target=lambda: outputs.append(process.output()))
    reader.start()
    until(lambda: seen_by_server.refusals == 1)
    assert process.signal("TERM")
    reader.join(timeout=30)
    assert outputs[0].exit.signal == 15


def test_a_second_writer_does_not_reuse_offsets(fake: RunningFake, client: GardenClient) -> None:
    """Who joins later does not know how much was written before; its first byte is not the stream's first."""
    container = client.container("c")
    first = container.run(["cat"])
    first.stdin.write(b"first ")
    assert next(iter(first)).data == b"first "
    first.close()
    second = container.attach(first.id)
    second.stdin.write(b"second")
    second.stdin.close()
    assert second.output().stdout == b"first second"


async def test_the_asynchronous_client_resumes_output_and_input(fake: RunningFake) -> None:
    """Both faces make the same promise."""
    fake.garden.breaks.extend([3, 1])
    data = flood_bytes(2_000_000)
    async with AsyncGardenClient(fake.address, retry=QUICK) as client, await client.create() as container:
        flood = await container.run(["flood", "1000000"])
        assert (await flood.output()).stdout == flood_bytes(1_000_000)
        fake.garden.stdin_breaks.extend([1, 2])
        cat = await container.run(["cat"])
        await cat.stdin.write(data)
        await cat.stdin.close()
        assert (await cat.output()).stdout == data


def test_a_server_that_stays_away_is_given_up_on(fake: RunningFake) -> None:
    """Tries are bounded: the caller gets the error, not a hang."""
    with GardenClient(fake.address, retry=IMPATIENT) as client:
        container = client.create()
        fake.garden.breaks.extend([1] * 100)
        process = container.run(["sleep"])
        with pytest.raises(Unavailable):
            process.output()


def test_the_start_itself_is_not_retried(fake: RunningFake, client: GardenClient) -> None:
    """Whether the process runs is not known then; the caller decides, with a request id."""
    fake.garden.breaks.append(0)
    with pytest.raises(Unavailable):
        client.container("c").run(["sleep"])


def test_waiting_keeps_unread_output_readable(client: GardenClient) -> None:
    """`wait` must neither block on unread output, nor pile it up, nor lose it."""
    process = client.container("c").run(["flood", "20000000"])
    assert process.wait().code == 0
    assert process.output().stdout == flood_bytes(20_000_000)


def test_waiting_with_a_timeout_leaves_the_process_usable(fake: RunningFake, client: GardenClient) -> None:
    """The stream that the timeout gave up is opened again when it is needed."""
    process = client.container("c").run(["cat"])
    process.stdin.write(b"before ")
    with pytest.raises(TimeoutError):
        process.wait(timedelta(milliseconds=30))
    process.stdin.write(b"after")
    process.stdin.close()
    assert process.output().stdout == b"before after"


def test_a_second_thread_can_wait_while_one_reads(client: GardenClient) -> None:
    """The reader owns the stream; the waiter asks the server."""
    process = client.container("c").run(["sleep"])
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.extend(chunk.data for chunk in process))
    reader.start()
    assert process.signal("TERM")
    assert process.wait().signal == 15
    reader.join(timeout=30)
    assert not reader.is_alive()


def test_leaving_ends_an_iteration_in_another_thread(client: GardenClient) -> None:
    """`close` is how a reader is told to stop."""
    process = client.container("c").run(["sleep"])
    reader = threading.Thread(target=lambda: list(process))
    reader.start()
    process.close()
    reader.join(timeout=30)
    assert not reader.is_alive()
    assert process.exit is None


def test_closing_the_client_leaves_no_thread(fake: RunningFake) -> None:
    """A program that makes many clients must not grow."""
    before = threading.active_count()
    for _ in range(3):
        with GardenClient(fake.address) as client, client.create() as container:
            container.run(["emit", "a", "b", "0"]).output()
            container.run(["sleep"])
    until(lambda: threading.active_count() <= before)  # gRPC's own threads end a moment after the channel


def test_bytes_no_longer_kept_are_an_error_that_says_which_are(
    fake: RunningFake, client: GardenClient
) -> None:
    """Never a silent gap."""
    process = client.container("c").run(["flood", "100"])
    process.output()
    fake.garden.containers["c"].processes[process.id].first_kept[pb.STDOUT] = 40
    with pytest.raises(OutOfRange) as caught:
        client.container("c").attach(process.id, stdout_offset=10).output()
    assert (caught.value.first_offset, caught.value.end_offset) == (40, 100)
    rest = client.container("c").attach(process.id, stdout_offset=40).output()
    assert rest.stdout == flood_bytes(100)[40:]


def test_writing_to_an_ended_process_is_a_typed_error(client: GardenClient) -> None:
    """Not a hang, and not an error of gRPC."""
    process = client.container("c").run(["emit", "", "", "0"])
    process.output()
    with pytest.raises(FailedPrecondition) as caught:
        process.stdin.write(b"x")
    assert caught.value.code == "STDIN_CLOSED"
    process.stdin.close()


def test_output_with_check_raises_for_any_end_but_success(client: GardenClient) -> None:
    """The end of stderr is in the message: that is where programs say why."""
    with pytest.raises(ProcessFailed, match="exit 3: the reason"):
        client.container("c").run(["emit", "", "the reason", "3"]).output(check=True)


def test_read_output_honours_offset_and_limit(client: GardenClient) -> None:
    """Bytes are addressed by offset."""
    container = client.container("c")
    process = container.run(["flood", "1000"])
    process.wait()
    data = b"".join(chunk.data for chunk in container.read_output(process.id, offset=100))
    assert data == flood_bytes(1000)[100:]


def test_events_go_on_after_a_break_without_gap_or_repetition(
    fake: RunningFake, client: GardenClient
) -> None:
    """The cursor of the last event seen is where the next stream begins."""
    fake.garden.events = [pb.Event(cursor=number, kind=pb.Event.PROCESS_EXITED) for number in range(1, 6)]
    fake.garden.event_breaks.extend([3, 2])
    assert [event.cursor for event in client.events()] == [0, 1, 2, 3, 4, 5]


def output_event(offset: int, data: bytes) -> pb.ProcessEvent:
    return pb.ProcessEvent(output=pb.OutputChunk(stream=pb.STDOUT, offset=offset, data=data))


def test_a_chunk_that_overlaps_is_trimmed() -> None:
    """A server may begin before the offset asked for; the caller must not notice."""
    follower = Follower("c", "p", {Stream.STDOUT: 0})
    follower.on_event(output_event(0, b"abc"))
    follower.on_event(output_event(1, b"bcd"))
    follower.on_event(output_event(0, b"ab"))
    assert [follower.take(), follower.take(), follower.take()] == [
        OutputChunk(Stream.STDOUT, 0, b"abc"),
        OutputChunk(Stream.STDOUT, 3, b"d"),
        None,
    ]


def test_a_gap_in_the_stream_is_data_loss() -> None:
    """A server that skips bytes without saying so must not pass for a complete output."""
    follower = Follower("c", "p", {Stream.STDOUT: 0})
    follower.on_event(output_event(0, b"abc"))
    with pytest.raises(DataLoss, match="bytes 3 to 5 of stdout"):
        follower.on_event(output_event(5, b"f"))


def test_a_reader_from_the_end_resumes_from_where_the_end_was() -> None:
    """If the connection breaks before the first byte, what came meanwhile is still asked for."""
    follower = Follower("c", "p", {})
    assert not follower.attach_request().attach.HasField("stdout_offset")
    follower.on_event(pb.ProcessEvent(started=pb.Process(id="p", stdout_bytes=77)))
    assert follower.attach_request().attach.stdout_offset == 77
