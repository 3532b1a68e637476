"""A real `garden server` in a temporary place, and what is needed to talk about it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from garden_py.backend.rootfs.runtime_bundle import build_runtime_bundle
from kit.addresses import first_free
from kit.patience import FACTOR
from kit.sharing import is_apart

READY_TIMEOUT_S = 30.0
_numbers = itertools.count()


@dataclass
class ServerProcess:
    """A server under test.

    Attributes:
        address: of its gRPC door; empty if only a client with certificates can use it.
        place: holds `state`, `run` and `log`.
        flags: command line after `garden server`.
    """

    place: Path
    flags: list[str]
    address: str
    process: subprocess.Popen[str] | None = field(default=None)
    has_served: bool = field(default=False, init=False)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it and wait for its ready line; shows the log if it does not come."""
        log = (self.place / "log").open("a")
        argv = [sys.executable, "-m", "garden_py", "server", "--log-level", "debug", "--log-format", "json"]
        with log:
            self.process = self.spawn(
                [*argv, *self.flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is the test's; the server must live to destroy its containers
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("garden server ready on "):
            self._reap()
            raise AssertionError(f"the server did not start: {line}\n{self.log()[-4000:]}")
        self.has_served = True

    def spawn(self, argv: list[str], **settings: Any) -> subprocess.Popen[str]:
        """Start its process."""
        return subprocess.Popen(argv, **settings)

    def log(self) -> str:
        return (self.place / "log").read_text()

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        assert self.process is not None
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        status = self.process.wait(30 * FACTOR)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        return status


@functools.cache
def built_bundle() -> Path:
    """What a server makes in `<state-dir>/agent` and does not make again: a quarter of its start."""
    place = Path(tempfile.mkdtemp(prefix="gt-agent-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, place)
    build_runtime_bundle(place)
    return place


@contextlib.contextmanager
def running_server(
    *extra: str,
    network_pool: str = "",
    address: str | None = None,
    make: Callable[[Path, list[str], str], ServerProcess] = ServerProcess,
) -> Iterator[ServerProcess]:
    """A server with directories, addresses, ports and uids of its own; at the end its containers are destroyed."""
    number = next(_numbers)
    place = Path(tempfile.mkdtemp(prefix="gt-", dir="/var/tmp"))
    place.chmod(0o755)
    first = os.getpid() * 7 + number + 100 * is_apart()
    slots = [(first + skipped) % 200 for skipped in range(200)]
    skipped, free_pool = first_free(IPv4Network(f"10.{slot + 20}.0.0/24") for slot in slots)
    slot = slots[skipped]
    flags = [
        "--state-dir", str(place / "state"),
        "--run-dir", str(place / "run"),
        "--network-pool", network_pool or str(free_pool),
        "--port-pool-start", str(20_000 + slot * 100),
        "--port-pool-size", "50",
        "--uid-pool-start", str(0x7000_0000 + slot * 65_536 * 20),
        "--uid-pool-size", "300",
        *extra,
    ]  # fmt: skip
    (place / "state").mkdir(mode=0o711)
    shutil.copytree(built_bundle(), place / "state" / "agent")
    server = make(place, flags, f"unix:{place}/run/garden.sock" if address is None else address)
    try:
        server.start()
        yield server
    finally:
        try:
            if server.process is None and server.has_served:
                server.start()  # a test failed between two servers; its containers shall not stay
            if server.process is not None:
                if server.address:
                    destroy_all(server.address)
                status = server.stop()
                assert status == 0, f"the server ended with {status}\n{server.log()[-4000:]}"
        finally:
            if server.process is not None:
                server.kill()
            shutil.rmtree(place)


def destroy_all(address: str) -> None:
    """Destroy every container of a server."""
    import grpc

    from garden_py.api._pb import garden_pb2 as pb
    from garden_py.api._pb import garden_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        garden = garden_pb2_grpc.GardenStub(channel)
        deadline = time.monotonic() + 60 * FACTOR
        while found := garden.ListContainers(pb.ListContainersRequest(all_states=True)).containers:
            assert time.monotonic() < deadline, f"not destroyed: {[c.handle for c in found]}"
            for container in found:
                try:
                    garden.DestroyContainer(pb.DestroyContainerRequest(handle=container.handle))
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
