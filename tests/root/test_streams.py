"""Output by offset, input once, and everything in between: no byte lost, none twice."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from kit.garden import PATIENCE, details_of, sh, wait_until

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import Container, ExitStatus, NotFound, OutOfRange, OutputChunk, Stream

pytestmark = pytest.mark.root

MIB = 1 << 20
RETENTION = 64 << 10
Requests = Iterator[pb.RunProcessRequest]


def attach(handle: str, process_id: str, **offsets: int) -> pb.AttachProcessRequest:
    return pb.AttachProcessRequest(
        attach=pb.AttachProcessRequest.Attach(handle=handle, process_id=process_id, **offsets)
    )


def counted(count: int) -> bytes:
    """What `seq 1 count` writes."""
    return "".join(f"{n}\n" for n in range(1, count + 1)).encode()


def test_reader_gets_exactly_the_rest(box: Container) -> None:
    """From any offset, of either stream, as often as asked."""
    box.start(sh("seq 1 5000; seq 1 100 >&2"), id="p")
    box.wait("p", PATIENCE)
    everything = counted(5000)
    for offset in (0, 1, 4096, len(everything) - 1, len(everything)):
        found = b"".join(chunk.data for chunk in box.read_output("p", offset=offset, follow=True))
        assert found == everything[offset:]
    errors = b"".join(chunk.data for chunk in box.read_output("p", Stream.STDERR, follow=True))
    assert errors == counted(100)
    limited = b"".join(chunk.data for chunk in box.read_output("p", offset=10, limit_bytes=77))
    assert limited == everything[10:87]


def test_chunks_carry_their_offsets(box: Container) -> None:
    """Each begins where the one before has ended, per stream."""
    at = {Stream.STDOUT: 0, Stream.STDERR: 0}
    for chunk in box.run(sh("for n in 1 2 3 4 5; do seq 1 3000; seq 1 1000 >&2; done")):
        assert chunk.offset == at[chunk.stream]
        at[chunk.stream] += len(chunk.data)
    assert at == {Stream.STDOUT: 5 * len(counted(3000)), Stream.STDERR: 5 * len(counted(1000))}


@pytest.mark.parametrize("offset", [7, 1 << 40])
def test_offset_beyond_the_end_is_refused(box: Container, offset: int) -> None:
    """With the end, so that a client can tell a mistake from a wait."""
    box.run(["echo", "hello"], id="p").output()
    with pytest.raises(OutOfRange) as refused:
        list(box.read_output("p", offset=offset))
    assert (refused.value.first_offset, refused.value.end_offset) == (0, 6)
    with pytest.raises(NotFound):
        list(box.read_output("unknown"))


def test_two_attached_clients_see_the_same(box: Container) -> None:
    """AT2: from their offsets on, both streams and the exit."""
    box.start(sh("echo before; read x; seq 1 1000; seq 1 10 >&2; exit 3"), id="p")
    wait_until(lambda: box.processes()[0].stdout_bytes == 7, "the first line")
    first = box.attach("p")
    second = box.attach("p", stdout_offset=None, stderr_offset=None)
    second.stdin.write(b"go\n")
    one, two = first.output(), second.output()
    assert one.stdout == b"before\n" + counted(1000)
    assert two.stdout == counted(1000)
    assert one.stderr == two.stderr == counted(10)
    assert one.exit.code == two.exit.code == 3


def test_client_that_leaves_harms_nobody(box: Container) -> None:
    """S6: the process goes on, and who comes back misses nothing."""
    process = box.run(sh("echo one; read x; echo two"), id="p")
    assert next(iter(process)).data == b"one\n"
    process.close()
    again = box.attach("p", stdout_offset=4)
    again.stdin.write(b"\n")
    assert again.output().stdout == b"two\n"


def test_detached_process_is_followed_by_who_comes(box: Container) -> None:
    """StartProcess, then ReadOutput with follow: what is there and what comes, to the end."""
    box.start(sh("for n in 1 2 3; do echo $n; sleep 0.05; done"), id="p")
    assert b"".join(chunk.data for chunk in box.read_output("p", follow=True)) == b"1\n2\n3\n"
    assert b"".join(chunk.data for chunk in box.read_output("p")) == b"1\n2\n3\n"


def test_unread_output_does_not_hold_the_process(box: Container) -> None:
    """S8: without a reader the oldest goes; later readers are told from where on there is something."""
    box.start(sh("seq 1 200000"), id="p", output_retention_bytes=RETENTION)
    status = box.wait("p", PATIENCE)
    assert status is not None
    assert status.code == 0
    everything = counted(200_000)
    wait_until(lambda: box.processes()[0].stdout_closed, "the end of the stream")
    assert box.processes()[0].stdout_bytes == len(everything)
    with pytest.raises(OutOfRange) as dropped:
        list(box.read_output("p"))
    first = dropped.value.first_offset
    assert first is not None
    assert 0 < len(everything) - first <= RETENTION
    assert b"".join(chunk.data for chunk in box.read_output("p", offset=first)) == everything[first:]


def test_slow_reader_misses_nothing(box: Container, stub: garden_pb2_grpc.GardenStub) -> None:
    """With a reader attached the process waits for it, however little is retained."""
    release = threading.Event()

    def requests() -> Iterator[pb.RunProcessRequest]:
        spec = pb.ProcessSpec(id="p", path="seq", args=["1", "2000000"], output_retention_bytes=RETENTION)
        yield pb.RunProcessRequest(start=pb.RunProcessRequest.Start(handle=box.handle, spec=spec))
        release.wait(60)

    events = stub.RunProcess(requests())
    digest, size = hashlib.sha256(), 0
    assert next(events).HasField("started")
    # Long enough for pipes, buffers and flow control to be full: the process must be waiting, not done.
    wait_until(lambda: stable(lambda: box.processes()[0].stdout_bytes), "standstill")
    assert not box.processes()[0].stdout_closed
    exit_code = None
    for event in events:
        if event.HasField("output"):
            assert event.output.offset == size
            digest.update(event.output.data)
            size += len(event.output.data)
        elif event.HasField("exited"):
            exit_code = event.exited.code
    release.set()
    assert exit_code == 0
    assert digest.digest() == hashlib.sha256(counted(2_000_000)).digest()


_seen: dict[str, int] = {}


def stable(read: Callable[[], int]) -> bool:
    """Whether a number did not change since the last look."""
    now = read()
    before, _seen["now"] = _seen.get("now", -1), now
    return now == before and now > 0


def test_big_output_arrives_whole(box: Container) -> None:
    """200 MB through the whole path, compared by digest with what the container computes."""
    script = "dd if=/dev/zero bs=1M count=190 2>/dev/null; seq 1 1400000"
    digest = hashlib.sha256()
    size = 0
    process = box.run(sh(script), id="big")
    for chunk in process:
        digest.update(chunk.data)
        size += len(chunk.data)
    assert process.wait(PATIENCE).code == 0
    expected = bytes(190 * MIB) + counted(1_400_000)
    assert size == len(expected) > 200_000_000
    assert digest.digest() == hashlib.sha256(expected).digest()


def test_big_input_arrives_whole(box: Container) -> None:
    """32 MiB into a process, whose digest of it is the same."""
    data = bytes(range(256)) * (32 * MIB // 256)
    process = box.run(["sha256sum"])
    process.stdin.write(data)
    process.stdin.close()
    assert process.output().stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_repeated_input_is_fed_once(box: Container, stub: garden_pb2_grpc.GardenStub) -> None:
    """A retried chunk is recognised by its offset, on another stream too."""
    box.start(["cat"], id="p")

    def feed(*inputs: pb.Stdin) -> Iterator[pb.AttachProcessRequest]:
        yield attach(box.handle, "p", stdout_offset=0)
        for each in inputs:
            yield pb.AttachProcessRequest(input=pb.ProcessInput(stdin=each))

    first = stub.AttachProcess(feed(pb.Stdin(data=b"abcd", offset=0)))
    assert next(first).HasField("started")
    assert next(first).output.data == b"abcd"
    first.cancel()
    again = (pb.Stdin(data=b"abcd", offset=0), pb.Stdin(data=b"cdef", offset=2, close=True))
    second = list(stub.AttachProcess(feed(*again), timeout=20))
    assert b"".join(event.output.data for event in second) == b"abcdef"


@pytest.mark.parametrize("stdin", [pb.Stdin(data=b"x", offset=5), pb.Stdin(close=True, offset=5)])
def test_gap_in_the_input_is_refused(
    box: Container, stub: garden_pb2_grpc.GardenStub, stdin: pb.Stdin
) -> None:
    """The process would read what nobody has written, or take for whole what is not."""
    box.start(["cat"], id="p")

    def feed() -> Iterator[pb.AttachProcessRequest]:
        yield attach(box.handle, "p")
        yield pb.AttachProcessRequest(input=pb.ProcessInput(stdin=stdin))

    with pytest.raises(grpc.RpcError) as refused:
        list(stub.AttachProcess(feed(), timeout=20))
    assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert details_of(refused.value)[0] == "OFFSET_OUT_OF_RANGE"
    assert box.processes()[0].exit is None


def test_background_child_keeps_the_stream_open(box: Container) -> None:
    """Exited and closed are two facts: output of the child comes after its parent's exit."""
    process = box.run(sh("(sleep 0.3; echo late) & echo early"))
    seen: list[str] = []
    for event in process.events():
        if isinstance(event, OutputChunk):
            seen.append(event.data.decode().strip())
        else:
            assert isinstance(event, ExitStatus)
            seen.append(f"exit {event.code}")
    assert seen == ["early", "exit 0", "late"]


def test_events_of_a_run_are_complete(box: Container, stub: garden_pb2_grpc.GardenStub) -> None:
    """Started first, output before exited, one closed per stream with its length."""

    def requests() -> Requests:
        spec = pb.ProcessSpec(path="sh", args=["-c", "echo out; echo err >&2; exit 4"])
        yield pb.RunProcessRequest(start=pb.RunProcessRequest.Start(handle=box.handle, spec=spec))

    events = list(stub.RunProcess(requests(), timeout=20))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert sorted(kinds[1:]) == ["closed", "closed", "exited", "output", "output"]
    assert kinds.index("exited") > max(i for i, kind in enumerate(kinds) if kind == "output")
    closed = {event.closed.stream: event.closed.length for event in events if event.HasField("closed")}
    assert closed == {pb.STDOUT: 4, pb.STDERR: 4}


def test_attach_to_a_finished_process_tells_everything(box: Container) -> None:
    """AT3: output, exit and closes, as if one had been there."""
    box.run(sh("echo out; exit 9"), id="p").output()
    done = box.attach("p").output()
    assert (done.stdout, done.exit.code) == (b"out\n", 9)
    tail = box.attach("p", stdout_offset=None, stderr_offset=None).output()
    assert (tail.stdout, tail.exit.code) == (b"", 9)
    with pytest.raises(NotFound) as unknown:
        box.attach("unknown")
    assert unknown.value.code == "PROCESS_NOT_FOUND"


def test_destroy_ends_open_streams(box: Container) -> None:
    """X4: whoever follows is told of the end, with the output until then."""
    process = box.run(sh("echo up; sleep 1000"))
    assert next(iter(process)).data == b"up\n"
    box.destroy()
    assert process.output().exit.signal == 9


def test_many_quiet_processes_cost_little(box: Container) -> None:
    """Fifty sleepers with open streams, all answered when they are ended."""
    processes = [box.run(["sleep", "1000"]) for _ in range(50)]
    box.stop(kill=True)
    assert {process.output().exit.signal for process in processes} == {9}
