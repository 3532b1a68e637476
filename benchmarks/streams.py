"""Bytes per second out of a process and into one, beside a gRPC server that does nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
from cell import run_ms, run_request
from measure import alternate
from report import Row, ratio_at_least
from setting import Setting

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.api.grpc.streams import CHUNK_BYTES

STDOUT_BYTES = 512 << 20
STDIN_BYTES = 256 << 20
_PEER = "bare grpc.aio"
_MARKS = (ratio_at_least(0.7, later=True),)
_WRITER = f"exec dd if=/dev/zero bs=256k count={STDOUT_BYTES >> 18} 2>/dev/null"


def measure_stdout(setting: Setting) -> Iterator[Row]:
    """Zeros through RunProcess, and through ReadOutput with follow."""
    stub, bare = setting.cell.stub, setting.bare
    with setting.cell.container() as handle:
        found = alternate(
            {
                "run": lambda: _run_mb_s(stub, run_request(handle, "sh", "-c", _WRITER)),
                "bare run": lambda: _run_mb_s(bare, run_request("", "", str(STDOUT_BYTES))),
                "read": lambda: _follow_mb_s(stub, handle),
                "bare read": lambda: _bare_read_mb_s(bare),
            },
            rounds=setting.throughput_rounds,
            warm_up=1,
        )
    yield Row("stdout, RunProcess", "MB/s", found["run"], _PEER, found["bare run"], _MARKS)
    yield Row("stdout, ReadOutput follow", "MB/s", found["read"], _PEER, found["bare read"], _MARKS)


def measure_stdin(setting: Setting) -> Iterator[Row]:
    """Zeros into `cat` until it has exited."""

    def garden() -> float:
        first = run_request(handle, "sh", "-c", "exec cat >/dev/null")
        return _mb_s(STDIN_BYTES, run_ms(setting.cell.stub, first, _stdin()))

    def bare() -> float:
        return _mb_s(STDIN_BYTES, run_ms(setting.bare, run_request("", "", "0"), _stdin()))

    with setting.cell.container() as handle:
        found = alternate({"garden": garden, "bare": bare}, rounds=setting.throughput_rounds, warm_up=1)
    yield Row("stdin, RunProcess", "MB/s", found["garden"], _PEER, found["bare"], _MARKS)


def _mb_s(count: int, took_ms: float) -> float:
    """Megabytes (10^6) per second."""
    return count / 1e6 / (took_ms / 1e3)


def _run_mb_s(stub: garden_pb2_grpc.GardenStub, first: pb.RunProcessRequest) -> float:
    return _mb_s(STDOUT_BYTES, run_ms(stub, first, stdout_bytes=STDOUT_BYTES))


def _stdin() -> Iterator[pb.RunProcessRequest]:
    """A generator, as a client has it; a new message for each chunk on both sides."""
    zeros = bytes(CHUNK_BYTES)
    for offset in range(0, STDIN_BYTES, CHUNK_BYTES):
        yield _input(pb.Stdin(data=zeros, offset=offset))
    yield _input(pb.Stdin(close=True, offset=STDIN_BYTES))


def _input(stdin: pb.Stdin) -> pb.RunProcessRequest:
    return pb.RunProcessRequest(input=pb.ProcessInput(stdin=stdin))


def _follow_mb_s(stub: garden_pb2_grpc.GardenStub, handle: str) -> float:
    """Start a detached process, be attached before it writes (output without a reader is bounded), then let it."""
    gate = f"rm -f /tmp/go; mkfifo /tmp/go; echo; read _ </tmp/go; {_WRITER}"
    spec = pb.ProcessSpec(path="sh", args=["-c", gate])
    process = stub.StartProcess(pb.StartProcessRequest(handle=handle, spec=spec), timeout=60)
    chunks = stub.ReadOutput(
        pb.ReadOutputRequest(handle=handle, process_id=process.id, follow=True), timeout=120
    )
    expected = STDOUT_BYTES + len(next(chunks).data)
    begin = time.perf_counter()
    run_ms(stub, run_request(handle, "sh", "-c", "echo >/tmp/go"))
    return _mb_s(STDOUT_BYTES, _drain_ms(chunks, begin, expected))


def _bare_read_mb_s(stub: garden_pb2_grpc.GardenStub) -> float:
    begin = time.perf_counter()
    chunks = stub.ReadOutput(pb.ReadOutputRequest(limit_bytes=STDOUT_BYTES), timeout=120)
    return _mb_s(STDOUT_BYTES, _drain_ms(chunks, begin, STDOUT_BYTES))


def _drain_ms(chunks: grpc.CallIterator[pb.OutputChunk], begin: float, expected: int) -> float:
    end = 0
    for chunk in chunks:
        end = chunk.offset + len(chunk.data)
    if end != expected:
        raise RuntimeError(f"the stream ended at {end}, not at {expected}")
    return (time.perf_counter() - begin) * 1e3
