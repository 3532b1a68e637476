"""With a listening socket that outlives the server, clients wait through a restart instead of failing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from kit.activator import ActivatedServer, running_activated_server
from kit.garden import text_of, wait_until
from kit.patience import FACTOR
from kit.trace import assert_no_trace, snapshot

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import GardenClient

pytestmark = pytest.mark.root
CLIENTS = 20


@pytest.fixture
def server(no_trace: None, tmp_path: Path) -> Iterator[ActivatedServer]:
    """A server of the test's own."""
    before = snapshot()
    with running_activated_server(tmp_path) as server:
        yield server
    assert_no_trace(before)


def relays() -> list[int]:
    """Pids of relay processes."""
    found = subprocess.run(["pgrep", "-f", "garden_py/api/relay.py"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_everything_goes_through_the_given_socket(server: ActivatedServer) -> None:
    """Calls, large streams both ways, and the end of input."""
    with GardenClient(server.address) as garden, garden.create() as container:
        assert text_of(container, "echo hello") == "hello\n"
        data = os.urandom(8 << 20)
        with container.run(["cat"]) as process, ThreadPoolExecutor(1) as pool:

            def feed() -> None:
                process.stdin.write(data)
                process.stdin.close()

            feeding = pool.submit(feed)
            assert process.output().stdout == data
            feeding.result(20)


def test_no_call_fails_while_the_server_is_restarted(server: ActivatedServer) -> None:
    """Twenty clients that call all the time, each on a connection of its own, and take no failure for an answer.

    grpc itself sends a call again that a GOAWAY met before it had left (its "transparent retry", on by default).
    """
    stop = threading.Event()
    answered = [0] * CLIENTS

    def call_all_the_time(number: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            stub = garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]
            while not stop.is_set():
                stub.Ping(pb.PingRequest(), timeout=30 * FACTOR)
                answered[number] += 1

    def wait_for_answers() -> None:
        for call in calls:
            assert not call.done(), call.exception()
        seen = list(answered)
        wait_until(
            lambda: all(now > then for now, then in zip(answered, seen, strict=True)),
            "answers to all clients",
        )

    with ThreadPoolExecutor(CLIENTS) as pool:
        calls = [pool.submit(call_all_the_time, number) for number in range(CLIENTS)]
        try:
            for _ in range(3):
                wait_for_answers()
                server.stop()
                server.start()
            wait_for_answers()
        finally:
            stop.set()
        for call in calls:
            call.result(60 * FACTOR)


def test_calls_after_a_crash_wait_for_the_next_server(server: ActivatedServer) -> None:
    """A call that was under way breaks with the server; none that is made afterwards does."""
    with GardenClient(server.address) as garden:
        container = garden.create()
        server.kill()
        wait_until(lambda: not relays(), "the end of the dead server's relay")
        with ThreadPoolExecutor(CLIENTS) as pool:

            def ask(_: int) -> str:
                options = [("grpc.use_local_subchannel_pool", 1)]
                with grpc.insecure_channel(server.address, options=options) as channel:
                    stub = garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]
                    request = pb.GetContainerRequest(handle=container.handle)
                    return str(stub.GetContainer(request, timeout=30).handle)

            calls = [pool.submit(ask, number) for number in range(CLIENTS)]
            server.start()
            assert {call.result(60) for call in calls} == {container.handle}


def test_relay_that_dies_is_replaced(server: ActivatedServer) -> None:
    """Its connections break; the listener is still there for the next ones."""
    with GardenClient(server.address) as garden:
        garden.ping()
        (first,) = relays()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: [pid for pid in relays() if pid != first], "another relay")
    with GardenClient(server.address) as garden:
        garden.ping()


def test_socket_that_cannot_be_served_is_refused(tmp_path: Path, no_trace: None) -> None:
    """With a sentence, before anything is started."""
    script = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_INET)\n"
        "sock.listen()\n"
        "os.dup2(sock.fileno(), 3)\n"
        "os.set_inheritable(3, True)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'garden_py', 'server', '--state-dir', sys.argv[1]])\n"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "state")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "--listen: the inherited socket is not a listening unix stream socket" in done.stderr
