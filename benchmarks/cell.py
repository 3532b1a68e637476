"""The server under test as the measurements see it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from kit.server import ServerProcess, running_server
from measure import timed_ms

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import GardenClient


@dataclass(frozen=True, slots=True)
class Cell:
    """A running server with a raw stub and a client of it.

    Attributes:
        stub: generated code on a blocking channel, nothing around it.
    """

    server: ServerProcess
    stub: garden_pb2_grpc.GardenStub
    client: GardenClient

    @property
    def address(self) -> str:
        """Of the gRPC door."""
        return self.server.address

    def create(self) -> pb.Container:
        """A container of all defaults: embedded busybox, network, no limits."""
        container: pb.Container = self.stub.CreateContainer(pb.CreateContainerRequest(), timeout=60)
        return container

    def destroy(self, handle: str) -> None:
        """Destroy a container."""
        self.stub.DestroyContainer(pb.DestroyContainerRequest(handle=handle), timeout=60)

    @contextmanager
    def container(self) -> Iterator[str]:
        """The handle of a container that lasts as long as the context."""
        handle = self.create().handle
        try:
            yield handle
        finally:
            self.destroy(handle)

    def run_ms(self, handle: str, *argv: str) -> float:
        """Run a process; how long until its exit was seen."""
        return run_ms(self.stub, run_request(handle, *argv))

    def config_of(self, handle: str) -> Path:
        """The OCI configuration that the server wrote for a container."""
        return self.server.place / "state" / "containers" / handle / "config.json"

    @property
    def agents(self) -> Path:
        """Where the server keeps the agent's runtime bundles."""
        return self.server.place / "state" / "agent"

    @property
    def image(self) -> Path:
        """The embedded root file system."""
        (found,) = (self.server.place / "state" / "rootfs").iterdir()
        return found


@contextmanager
def running_cell(runtime: str, *flags: str, network_pool: str = "") -> Iterator[Cell]:
    """A server in a temporary directory with pools of its own, and connections to it."""
    with (
        running_server(
            "--log-level", "info", "--runtime", runtime, *flags, network_pool=network_pool
        ) as server,
        grpc.insecure_channel(server.address) as channel,
        GardenClient(server.address) as client,
    ):
        yield Cell(server, garden_pb2_grpc.GardenStub(channel), client)  # type: ignore[no-untyped-call]


def run_request(handle: str, path: str, *args: str) -> pb.RunProcessRequest:
    """The first message of RunProcess."""
    spec = pb.ProcessSpec(path=path, args=args)
    return pb.RunProcessRequest(start=pb.RunProcessRequest.Start(handle=handle, spec=spec))


def run_ms(
    stub: garden_pb2_grpc.GardenStub,
    first: pb.RunProcessRequest,
    rest: Iterable[pb.RunProcessRequest] = (),
    *,
    stdout_bytes: int = 0,
) -> float:
    """Run a process with a raw stub.

    Args:
        stub: of a server, real or bare.
        first: from run_request.
        rest: input.
        stdout_bytes: how much it must write.

    Returns:
        Milliseconds from the call until the exit status was seen.
    """

    def requests() -> Iterator[pb.RunProcessRequest]:
        yield first
        yield from rest

    begin = time.perf_counter()
    received, exited_ms, code = 0, None, None
    for event in stub.RunProcess(requests(), timeout=120):
        match event.WhichOneof("event"):
            case "output" if event.output.stream == pb.STDOUT:
                received += len(event.output.data)
            case "exited":
                exited_ms = (time.perf_counter() - begin) * 1e3
                code = event.exited.code
    if exited_ms is None or code != 0 or received != stdout_bytes:
        raise RuntimeError(f"{first.start.spec.path}: exit {code}, {received} of {stdout_bytes} bytes")
    return exited_ms


def ping_ms(stub: garden_pb2_grpc.GardenStub) -> float:
    """The smallest call there is."""
    return timed_ms(lambda: stub.Ping(pb.PingRequest(), timeout=10))
