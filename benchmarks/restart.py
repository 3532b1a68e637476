"""A restart of the server beside 250 containers: from the signal to the first answered call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import grpc
from bare_grpc import running_bare_server
from kit.server import ServerProcess, running_server
from measure import Samples, alternate, timed_ms
from report import Row, at_most
from setting import Setting

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc

CONTAINERS = 250
WRITING = 50
ROUNDS = 5


def measure_restart(setting: Setting) -> Iterator[Row]:
    """SIGTERM and SIGKILL in turns; every fifth container runs a process that writes and has a reader that follows."""
    with _crowded_server() as server:
        subjects = {
            "SIGTERM": lambda: _restart_ms(server, server.stop),
            "SIGKILL": lambda: _restart_ms(server, server.kill),
            "bare": lambda: _bare_start_ms(server.place),
        }
        taken = alternate(subjects, rounds=min(ROUNDS, setting.rounds), warm_up=1)
    for how in ("SIGTERM", "SIGKILL"):
        yield _row(how, taken)


def _row(how: str, taken: dict[str, Samples]) -> Row:
    what = f"{how} → first call answered, {CONTAINERS} containers"
    return Row(what, "ms", taken[how], "bare grpc.aio, start", taken["bare"], (at_most(3000),))


@contextmanager
def _crowded_server() -> Iterator[ServerProcess]:
    with running_server("--log-level", "info", network_pool="10.248.0.0/22") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]

            def make(number: int) -> None:
                handle = stub.CreateContainer(pb.CreateContainerRequest(), timeout=60).handle
                script = "while :; do echo tick; sleep 0.1; done" if number < WRITING else "true"
                spec = pb.ProcessSpec(id="p", path="sh", args=["-c", script])
                stub.StartProcess(pb.StartProcessRequest(handle=handle, spec=spec), timeout=60)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(make, range(CONTAINERS)))
        yield server


def _restart_ms(server: ServerProcess, end: Callable[[], object]) -> float:
    """From the signal, with readers on every writing process, to the answer of a list that has all containers."""
    with _followers(server.address):
        begin = time.perf_counter()
        end()
        server.start()
        with grpc.insecure_channel(server.address) as channel:
            stub = garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]
            found = len(stub.ListContainers(pb.ListContainersRequest(), timeout=60).containers)
        took_ms = (time.perf_counter() - begin) * 1e3
    if found != CONTAINERS:
        raise RuntimeError(f"{found} of {CONTAINERS} containers are there after the restart")
    return took_ms


@contextmanager
def _followers(address: str) -> Iterator[None]:
    with ExitStack() as stack, grpc.insecure_channel(address) as channel:
        stub = garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]
        listed = stub.ListContainers(pb.ListContainersRequest(), timeout=60).containers
        for container in listed:
            processes = stub.ListProcesses(pb.ListProcessesRequest(handle=container.handle), timeout=60)
            if any(not process.HasField("exit") for process in processes.processes):
                request = pb.ReadOutputRequest(handle=container.handle, process_id="p", follow=True)
                reader = Thread(target=_read_until_broken, args=(stub.ReadOutput(request),))
                reader.start()
                stack.callback(reader.join)
        yield


def _read_until_broken(chunks: Iterator[pb.OutputChunk]) -> None:
    try:
        for _ in chunks:
            pass
    except grpc.RpcError:
        return  # the server has gone, as it should


def _bare_start_ms(place: Path) -> float:
    """The same interpreter starts a gRPC server without a container in the world, which answers a call."""

    def start() -> None:
        with running_bare_server(place) as stub:
            stub.Ping(pb.PingRequest(), timeout=60)

    return timed_ms(start)
