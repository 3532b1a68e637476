"""Calls that are under way when the server is told to stop: completed, or ended with a status that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from kit.garden import details_of, open_stub, sh, wait_until
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import ContainerSpec, GardenClient

pytestmark = pytest.mark.root
Stub = garden_pb2_grpc.GardenStub


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    """A server of the test's own."""
    before = snapshot()
    with running_server() as server:
        yield server
    assert_no_trace(before)


LASTING: dict[str, Callable[[Stub], Iterator[Any]]] = {
    "attach": lambda stub: stub.AttachProcess(
        iter(
            [
                pb.AttachProcessRequest(
                    attach=pb.AttachProcessRequest.Attach(handle="box", process_id="p", stdout_offset=0)
                )
            ]
        ),
        timeout=60,
    ),
    "read": lambda stub: stub.ReadOutput(
        pb.ReadOutputRequest(handle="box", process_id="p", stream=pb.STDOUT, follow=True), timeout=60
    ),
    "watch": lambda stub: stub.WatchEvents(pb.WatchEventsRequest(), timeout=60),
}


def test_calls_that_would_last_are_ended_with_a_typed_status(server: ServerProcess) -> None:
    """UNAVAILABLE and SHUTTING_DOWN: a client knows that it can resume at the next server."""
    with GardenClient(server.address) as garden, open_stub(server.address) as stub:
        garden.create(ContainerSpec(handle="box")).start(sh("echo hello; sleep 1000"), id="p")
        waiting = stub.WaitProcess.future(pb.WaitProcessRequest(handle="box", process_id="p"), timeout=60)
        streams = {name: call(stub) for name, call in LASTING.items()}
        for stream in streams.values():
            next(stream)  # it is under way, and so is what was asked before it on the same connection
        assert server.stop() == 0
        for name, stream in streams.items():
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, name
            assert details_of(caught.value)[0] == "SHUTTING_DOWN", name
        with pytest.raises(grpc.RpcError) as caught:
            waiting.result(20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value)[0] == "SHUTTING_DOWN"
        server.start()


def test_reader_that_reads_nothing_does_not_hold_up_the_stop(server: ServerProcess) -> None:
    """Its call is stuck in a full connection, where no status reaches it; the others' end in time."""
    with GardenClient(server.address) as garden, open_stub(server.address) as stub:
        garden.create(ContainerSpec(handle="box")).start(["yes"], id="p")
        request = pb.ReadOutputRequest(handle="box", process_id="p", stream=pb.STDOUT, follow=True)
        stuck = stub.ReadOutput(request, timeout=60)
        next(stuck)
        assert server.stop() == 0
        stuck.cancel()
        server.start()


def test_stop_among_creates_leaves_no_container_that_nobody_asked_for(server: ServerProcess) -> None:
    """Of creates without a name, those that were answered are there afterwards, and no others."""
    answered: set[str] = set()

    def create_until_it_fails(_: int) -> grpc.RpcError:
        with open_stub(server.address) as stub:
            while True:
                try:
                    answered.add(stub.CreateContainer(pb.CreateContainerRequest(), timeout=60).handle)
                except grpc.RpcError as error:
                    return error

    for _ in range(3):
        before = len(answered)
        with ThreadPoolExecutor(8) as pool:
            failures = [pool.submit(create_until_it_fails, number) for number in range(8)]
            wait_until(lambda before=before: len(answered) > before + 3, "some containers")
            assert server.stop() == 0
            for failure in failures:
                assert failure.result(30).code() is grpc.StatusCode.UNAVAILABLE
        server.start()
        with GardenClient(server.address) as garden:
            wait_until(
                lambda garden=garden: {c.handle for c in garden.list(all_states=True)} == answered,
                "the removal of what nobody knows",
            )
