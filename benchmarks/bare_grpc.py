"""The least a gRPC server can do for the same messages: the peer of streams and of small calls.

Run as `python bare_grpc.py SOCKET` it is that server, in a process of its own like the real one. It speaks the same
protocol, so the same client code measures both; it has no containers, no processes and no files.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.api.grpc.streams import CHUNK_BYTES

_ZEROS = bytes(CHUNK_BYTES)


class BareGarden(garden_pb2_grpc.GardenServicer):
    """Zeros out, nothing in.

    RunProcess: `spec.args[0]` is how many bytes of stdout to send; then it takes stdin to its end, and exits.
    ReadOutput: `limit_bytes` is how many.
    """

    async def Ping(self, request: pb.PingRequest, context: object) -> pb.PingResponse:
        """Answer."""
        return pb.PingResponse(server_version="bare")

    async def ReadOutput(
        self, request: pb.ReadOutputRequest, context: object
    ) -> AsyncIterator[pb.OutputChunk]:
        """Stream zeros."""
        for offset in range(0, request.limit_bytes, CHUNK_BYTES):
            yield pb.OutputChunk(offset=offset, data=_ZEROS)

    async def RunProcess(
        self, requests: AsyncIterator[pb.RunProcessRequest], context: object
    ) -> AsyncIterator[pb.ProcessEvent]:
        """Stream zeros out, or take stdin in."""
        first = await anext(requests)
        yield pb.ProcessEvent(started=pb.Process())
        for offset in range(0, int(first.start.spec.args[0]), CHUNK_BYTES):
            yield pb.ProcessEvent(output=pb.OutputChunk(offset=offset, data=_ZEROS))
        async for message in requests:
            if message.input.stdin.close:
                break
        yield pb.ProcessEvent(exited=pb.ExitStatus(code=0))


@contextmanager
def running_bare_server(place: Path) -> Iterator[garden_pb2_grpc.GardenStub]:
    """Start the server on a socket in place; a stub of it."""
    path = place / "bare.sock"
    process = subprocess.Popen(
        [sys.executable, __file__, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the bare gRPC server did not start")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            yield garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


async def _serve(path: str) -> None:
    server = grpc.aio.server()
    garden_pb2_grpc.add_GardenServicer_to_server(BareGarden(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)  # whoever started us closes it
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
