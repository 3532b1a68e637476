"""Bad input: a typed error that names the field, the server goes on, nothing half-made is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from kit.garden import cgroups_of, details_of, open_stub
from kit.server import running_server

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import Container, GardenClient

pytestmark = pytest.mark.root

INVALID = grpc.StatusCode.INVALID_ARGUMENT
Stub = garden_pb2_grpc.GardenStub


@dataclass
class Bad:
    """A container spec that must be refused.

    Attributes:
        fields: what the error must name.
    """

    name: str
    fields: set[str]
    spec: dict[str, Any] = field(default_factory=dict)


def rule(**values: Any) -> pb.EgressPolicy:
    return pb.EgressPolicy(rules=[pb.EgressRule(**values)])


def mount(source: str, destination: str, **more: Any) -> dict[str, Any]:
    return {"bind_mounts": [pb.BindMount(source=source, destination=destination, **more)]}


TCP = pb.EgressRule.TCP
CASES = [
    Bad("handle with a slash", {"spec.handle"}, {"handle": "a/b"}),
    Bad("handle is ..", {"spec.handle"}, {"handle": ".."}),
    Bad("handle with NUL", {"spec.handle"}, {"handle": "a\0b"}),
    Bad("handle of 300 characters", {"spec.handle"}, {"handle": "a" * 300}),
    Bad("handle like an option", {"spec.handle"}, {"handle": "--help"}),
    Bad("hostname of 64 characters", {"spec.hostname"}, {"hostname": "h" * 64}),
    Bad("env without =", {"spec.env[1]"}, {"env": ["A=1", "B"]}),
    Bad("image is relative", {"spec.image"}, {"image": "rootfs"}),
    Bad("image is missing", {"spec.image"}, {"image": "/nonexistent/rootfs"}),
    Bad("image is a file", {"spec.image"}, {"image": "/etc/hostname"}),
    Bad("image of a registry", {"spec.image"}, {"image": "docker:///busybox"}),
    Bad("bind source is relative", {"spec.bind_mounts[0].source"}, mount("tmp", "/mnt")),
    Bad("bind source is missing", {"spec.bind_mounts[0].source"}, mount("/nonexistent", "/mnt")),
    Bad("bind over /", {"spec.bind_mounts[0].destination"}, mount("/etc", "/")),
    Bad("bind below /proc", {"spec.bind_mounts[0].destination"}, mount("/etc", "/proc/x")),
    Bad("bind over /sys", {"spec.bind_mounts[0].destination"}, mount("/etc", "/sys")),
    Bad("bind below /dev by a detour", {"spec.bind_mounts[0].destination"}, mount("/etc", "//dev/./shm")),
    Bad("bind with ..", {"spec.bind_mounts[0].destination"}, mount("/etc", "/mnt/../proc")),
    Bad("bind mode unknown", {"spec.bind_mounts[0].mode"}, mount("/etc", "/mnt", mode=7)),
    Bad("memory below the floor", {"spec.limits.memory_bytes"}, {"limits": pb.Limits(memory_bytes=4096)}),
    Bad("weight out of range", {"spec.limits.cpu_weight"}, {"limits": pb.Limits(cpu_weight=10_001)}),
    Bad("quota below the floor", {"spec.limits.cpu_quota_us"}, {"limits": pb.Limits(cpu_quota_us=10)}),
    Bad("period alone", {"spec.limits.cpu_period_us"}, {"limits": pb.Limits(cpu_period_us=100_000)}),
    Bad("pids out of range", {"spec.limits.pids"}, {"limits": pb.Limits(pids=1 << 40)}),
    Bad(
        "two bad fields at once",
        {"spec.handle", "spec.limits.memory_bytes"},
        {"handle": "/", "limits": pb.Limits(memory_bytes=1)},
    ),
    Bad(
        "host port out of range",
        {"spec.port_mappings[0].host_port"},
        {"port_mappings": [pb.PortMapping(host_port=70_000)]},
    ),
    Bad(
        "host port twice",
        {"spec.port_mappings[1].host_port"},
        {"port_mappings": [pb.PortMapping(host_port=30_001), pb.PortMapping(host_port=30_001, container_port=2)]},
    ),
    Bad("transport unknown", {"spec.port_mappings[0].protocol"}, {"port_mappings": [pb.PortMapping(protocol=9)]}),
    Bad(
        "ports reversed",
        {"spec.egress.rules[0].ports[0].end"},
        {"egress": rule(protocol=TCP, ports=[pb.PortRange(start=90, end=80)])},
    ),
    Bad(
        "addresses reversed",
        {"spec.egress.rules[0].networks[0].end"},
        {"egress": rule(protocol=TCP, networks=["10.0.0.9-10.0.0.1"])},
    ),
    Bad("network is no address", {"spec.egress.rules[0].networks[0]"}, {"egress": rule(networks=["example"])}),
    Bad("rule protocol unknown", {"spec.egress.rules[0].protocol"}, {"egress": rule(protocol=42)}),
    Bad("default action unknown", {"spec.egress.default_action"}, {"egress": pb.EgressPolicy(default_action=9)}),
]  # fmt: skip


def refusal(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_container_spec_is_refused_by_field(stub: Stub, case: Bad) -> None:
    """The caller learns which field to mend, and nothing was made."""
    before = stub.GetCapacity(pb.GetCapacityRequest())
    request = pb.CreateContainerRequest(spec=pb.ContainerSpec(**case.spec))
    error = refusal(lambda: stub.CreateContainer(request))
    assert error.code() is INVALID, error.details()
    _, fields = details_of(error)
    assert all(any(named.startswith(wanted) for named in fields) for wanted in case.fields), fields
    assert stub.GetCapacity(pb.GetCapacityRequest()).containers == before.containers
    assert stub.GetCapacity(pb.GetCapacityRequest()).ports_in_use == before.ports_in_use
    assert not stub.ListContainers(pb.ListContainersRequest(all_states=True)).containers


def test_duplicate_handle_leaves_the_first_alone(stub: Stub, garden: GardenClient) -> None:
    """The loser gets ALREADY_EXISTS; the winner runs on."""
    with garden.create() as first:
        spec = pb.ContainerSpec(handle=first.handle)
        error = refusal(lambda: stub.CreateContainer(pb.CreateContainerRequest(spec=spec)))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert details_of(error)[0] == "HANDLE_IN_USE"
        assert error.details() == f"Handle '{first.handle}' already in use"
        assert first.run(["true"]).output().exit.code == 0


def test_taken_host_port_is_refused_and_nothing_is_left(stub: Stub, garden: GardenClient) -> None:
    """Two containers cannot have one host port; the second is not half-made."""
    with garden.create() as first:
        port = stub.MapPort(
            pb.MapPortRequest(handle=first.handle, mapping=pb.PortMapping(container_port=80))
        ).host_port
        spec = pb.ContainerSpec(
            handle="second", port_mappings=[pb.PortMapping(host_port=port, container_port=80)]
        )
        error = refusal(lambda: stub.CreateContainer(pb.CreateContainerRequest(spec=spec)))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert details_of(error)[0] == "PORT_IN_USE"
        assert not cgroups_of("second")


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
        assert "--network-pool" in (error.details() or "")


BAD_PROCESSES = {
    "no path": ({"path": ""}, "spec.path"),
    "path with NUL": ({"path": "a\0"}, "spec.path"),
    "id with a slash": ({"path": "true", "id": "../x"}, "spec.id"),
    "relative directory": ({"path": "true", "dir": "tmp"}, "spec.dir"),
    "unknown rlimit": ({"path": "true", "rlimits": {"colour": 1}}, "spec.rlimits[colour]"),
    "env without =": ({"path": "true", "env": ["X"]}, "spec.env[0]"),
    "memory below the floor": (
        {"path": "true", "limits": pb.Limits(memory_bytes=1)},
        "spec.limits.memory_bytes",
    ),
    "tiny retention": ({"path": "true", "output_retention_bytes": 1}, "spec.output_retention_bytes"),
    "600 KB of arguments": ({"path": "true", "args": ["x" * 600_000]}, "spec.args"),
}


@pytest.mark.parametrize("name", BAD_PROCESSES)
def test_bad_process_spec_is_refused_by_field(stub: Stub, shared_box: Container, name: str) -> None:
    """Same for processes."""
    spec, wanted = BAD_PROCESSES[name]
    request = pb.StartProcessRequest(handle=shared_box.handle, spec=pb.ProcessSpec(**spec))
    error = refusal(lambda: stub.StartProcess(request))
    assert error.code() is INVALID, error.details()
    assert wanted in details_of(error)[1]
    assert not stub.ListProcesses(pb.ListProcessesRequest(handle=shared_box.handle)).processes


def test_process_on_a_destroyed_container_is_not_found(stub: Stub, garden: GardenClient) -> None:
    """The handle is gone, and the error says so."""
    container = garden.create()
    container.destroy()
    request = pb.StartProcessRequest(handle=container.handle, spec=pb.ProcessSpec(path="true"))
    error = refusal(lambda: stub.StartProcess(request))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details_of(error)[0] == "CONTAINER_NOT_FOUND"


def converse(stub: Stub, handle: str, spec: pb.ProcessSpec, *inputs: pb.ProcessInput) -> grpc.RpcError:
    """Run a process, send inputs, and return the error the stream ends with."""

    def requests() -> Iterator[pb.RunProcessRequest]:
        yield pb.RunProcessRequest(start=pb.RunProcessRequest.Start(handle=handle, spec=spec))
        for message in inputs:
            yield pb.RunProcessRequest(input=message)

    return refusal(lambda: list(stub.RunProcess(requests())))


def test_stdin_after_its_end_is_refused(stub: Stub, shared_box: Container) -> None:
    """Bytes that no process will see are not swallowed in silence."""
    spec = pb.ProcessSpec(path="sleep", args=["5"])
    closing = pb.ProcessInput(stdin=pb.Stdin(close=True))
    late = pb.ProcessInput(stdin=pb.Stdin(data=b"late"))
    error = converse(stub, shared_box.handle, spec, closing, late)
    assert (error.code(), details_of(error)[0]) == (grpc.StatusCode.FAILED_PRECONDITION, "STDIN_CLOSED")


def test_resize_without_a_terminal_is_refused(stub: Stub, shared_box: Container) -> None:
    """A window size needs a window."""
    spec = pb.ProcessSpec(path="sleep", args=["5"])
    error = converse(stub, shared_box.handle, spec, pb.ProcessInput(window=pb.Tty(rows=1, columns=1)))
    assert (error.code(), details_of(error)[0]) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_TTY")


def test_second_start_in_one_stream_is_refused(stub: Stub, shared_box: Container) -> None:
    """Only the first message starts."""
    start = pb.RunProcessRequest.Start(
        handle=shared_box.handle, spec=pb.ProcessSpec(path="sleep", args=["5"])
    )
    requests = [pb.RunProcessRequest(start=start), pb.RunProcessRequest(start=start)]
    error = refusal(lambda: list(stub.RunProcess(iter(requests))))
    assert (error.code(), details_of(error)[1]) == (INVALID, {"start"})


@pytest.mark.parametrize(
    ("signal", "field"),
    [
        (pb.Signal(name="NONSENSE"), "signal.name"),
        (pb.Signal(number=999), "signal.number"),
        (pb.Signal(), "signal"),
        (pb.Signal(number=9, name="KILL"), "signal"),
    ],
)
def test_unknown_signal_is_refused(stub: Stub, shared_box: Container, signal: pb.Signal, field: str) -> None:
    """A signal is a number or a name that exists, not both."""
    process = shared_box.start(["sleep", "5"])
    request = pb.SignalProcessRequest(handle=shared_box.handle, process_id=process.id, signal=signal)
    error = refusal(lambda: stub.SignalProcess(request))
    assert (error.code(), details_of(error)[1]) == (INVALID, {field})
    shared_box.signal(process.id, "KILL")


def test_message_of_20_mib_is_refused_and_the_server_goes_on(stub: Stub, shared_box: Container) -> None:
    """The limit is on one message; streams carry more in chunks."""

    def requests() -> Iterator[pb.StreamInRequest]:
        yield pb.StreamInRequest(target=pb.StreamInRequest.Target(handle=shared_box.handle, path="/tmp"))
        yield pb.StreamInRequest(data=b"x" * (20 << 20))

    error = refusal(lambda: stub.StreamIn(requests()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Ping(pb.PingRequest()).server_version


def test_page_size_and_grace_out_of_range_are_refused(stub: Stub, shared_box: Container) -> None:
    """Numbers out of range are not clamped in silence."""
    error = refusal(lambda: stub.ListContainers(pb.ListContainersRequest(page_size=5000)))
    assert (error.code(), details_of(error)[1]) == (INVALID, {"page_size"})
    grace = pb.SetGraceTimeRequest(handle=shared_box.handle)
    grace.grace_time.seconds = -1
    error = refusal(lambda: stub.SetGraceTime(grace))
    assert (error.code(), details_of(error)[1]) == (INVALID, {"grace_time"})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--network-pool", "10.0.0.1/8"], "--network-pool"),
        (["--network-pool", "nonsense"], "--network-pool"),
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
