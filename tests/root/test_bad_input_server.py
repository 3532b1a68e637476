"""A server that is full, or told nonsense: the pool or the flag is named, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from kit.garden import details_of, open_stub
from kit.server import running_server

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc

pytestmark = pytest.mark.root

Stub = garden_pb2_grpc.GardenStub


def refusal(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


@pytest.fixture(scope="module")
def small() -> Iterator[Stub]:
    """A server with room for very little: two containers by count, six addresses, two ports."""
    with (
        running_server("--max-containers", "2", "--port-pool-size", "2") as server,
        open_stub(server.address) as stub,
    ):
        yield stub


def test_full_server_names_the_pool_and_its_flag(small: Stub) -> None:
    """RESOURCE_EXHAUSTED says what is exhausted, its size, and what to turn."""
    made = [small.CreateContainer(pb.CreateContainerRequest()).handle for _ in range(2)]
    error = refusal(lambda: small.CreateContainer(pb.CreateContainerRequest()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--max-containers" in (error.details() or "")
    assert "2" in (error.details() or "")
    for handle in made:
        small.DestroyContainer(pb.DestroyContainerRequest(handle=handle))
    small.DestroyContainer(
        pb.DestroyContainerRequest(handle=small.CreateContainer(pb.CreateContainerRequest()).handle)
    )


def test_empty_port_pool_is_named(small: Stub) -> None:
    """The third automatic port is refused, and the container that asked for it is not made."""
    ports = [pb.PortMapping(container_port=n) for n in (1, 2, 3)]
    request = pb.CreateContainerRequest(spec=pb.ContainerSpec(port_mappings=ports))
    error = refusal(lambda: small.CreateContainer(request))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--port-pool-size" in (error.details() or "")
    assert small.GetCapacity(pb.GetCapacityRequest()).ports_in_use == 0
    assert not small.ListContainers(pb.ListContainersRequest(all_states=True)).containers


def test_empty_address_pool_is_named(no_trace: None) -> None:
    """A /29 has five addresses for containers; the sixth container gets an error that names --network-pool."""
    with running_server(network_pool="10.19.7.0/29") as server, open_stub(server.address) as stub:
        for _ in range(5):
            stub.CreateContainer(pb.CreateContainerRequest())
        error = refusal(lambda: stub.CreateContainer(pb.CreateContainerRequest()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(error)[0] == "POOL_EXHAUSTED"
        assert "--network-pool" in (error.details() or "")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--network-pool", "10.0.0.1/8"], "--network-pool"),
        (["--network-pool", "nonsense"], "--network-pool"),
        (["--runtime", "no-such-runtime"], "--runtime"),
        (["--mtu", "10"], "--mtu: "),
        (["--port-pool-start", "80"], "--port-pool-start"),
        (["--state-dir", "relative"], "--state-dir"),
        (["--listen", "0.0.0.0:7777"], "--listen"),
        (["--listen", "127.0.0.1:0", "--tls-cert", "/dev/null"], "--tls-client-ca"),
        (["--default-rootfs", "/nonexistent"], "--default-rootfs"),
        (["--backend", "imaginary"], "--backend"),
        (["--dns-server", "example"], "--dns-server"),
    ],
)
def test_server_refuses_bad_settings_by_flag(tmp_path: Path, flags: list[str], named: str) -> None:
    """The message names the flag to mend; nothing is left running."""
    places = ["--state-dir", str(tmp_path / "s"), "--run-dir", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-m", "garden_py", "server", *places, *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
