"""All that the measurements work on, brought up once and taken down at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bare_grpc import running_bare_server
from bare_runtime import BareRuntime, bare_runtime, prepare_bundle, remove_cgroups
from cell import Cell, running_cell

from garden_py.api._pb import garden_pb2_grpc


@dataclass(frozen=True, slots=True)
class Setting:
    """The server, its peers, and how often to measure.

    Attributes:
        cell: the server under test.
        runc: bare runc with a bundle like the server's.
        crun: bare crun with the same bundle.
        bare: stub of the bare gRPC server.
        runtime: of the server under test.
        rounds: samples of a latency.
        throughput_rounds: samples of a throughput, which take seconds each.
    """

    cell: Cell
    runc: BareRuntime
    crun: BareRuntime
    bare: garden_pb2_grpc.GardenStub
    runtime: str
    rounds: int
    throughput_rounds: int


@contextmanager
def open_setting(*, runtime: str, rounds: int) -> Iterator[Setting]:
    """Start the server and the peers.

    Args:
        runtime: of the server.
        rounds: samples of a latency.
    """
    with ExitStack() as stack:
        cell = stack.enter_context(running_cell(runtime))
        place = cell.server.place
        bundle = place / "bare-bundle"
        with cell.container() as handle:
            prepare_bundle(bundle, server_config=cell.config_of(handle), image=cell.image, agents=cell.agents)
        stack.callback(remove_cgroups)  # after both runtimes have let go of theirs
        yield Setting(
            cell=cell,
            runc=stack.enter_context(bare_runtime("runc", place, bundle)),
            crun=stack.enter_context(bare_runtime("crun", place, bundle)),
            bare=stack.enter_context(running_bare_server(place)),
            runtime=runtime,
            rounds=rounds,
            throughput_rounds=max(3, min(5, rounds // 4)),
        )
