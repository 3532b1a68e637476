"""Bad input: a typed error that names the field, the server goes on, and nothing half-made is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from kit.cgroups import cgroups_of
from kit.garden import details_of
from kit.server import ServerProcess

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.config import load_config

pytestmark = pytest.mark.root

Stub = garden_pb2_grpc.GardenStub
INVALID, EXISTS = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS
PRECONDITION, NOT_FOUND = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND
EXHAUSTED, OUT_OF_RANGE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OUT_OF_RANGE
UNKNOWN_VALUE: Any = 99


@dataclass(frozen=True)
class Traces:
    """What a refused create could leave."""

    handles: frozenset[str]
    links: frozenset[str]
    directories: frozenset[str]
    cgroups: frozenset[Path]
    ports: int


def traces(stub: Stub, server: ServerProcess) -> Traces:
    listed = stub.ListContainers(pb.ListContainersRequest(all_states=True), timeout=10).containers
    tag = load_config({"state_dir": str(server.place / "state")}, environ={}).tag
    return Traces(
        frozenset(container.handle for container in listed),
        frozenset(path.name for path in Path("/sys/class/net").iterdir() if tag in path.name),
        frozenset(path.name for path in (server.place / "state" / "containers").iterdir()),
        frozenset(path for path in cgroups_of("*") if f"garden-{tag}/" in str(path)),
        stub.GetCapacity(pb.GetCapacityRequest(), timeout=10).ports_in_use,
    )


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


@pytest.fixture(scope="module")
def box(stub: Stub) -> str:
    """A container that is there all the time, with a mapped port and two processes."""
    mapping = pb.PortMapping(host_port=TAKEN_PORT, container_port=1)
    stub.CreateContainer(
        pb.CreateContainerRequest(spec=pb.ContainerSpec(handle="box", port_mappings=[mapping]))
    )
    for name in ("running", "deaf"):
        stub.StartProcess(
            pb.StartProcessRequest(handle="box", spec=pb.ProcessSpec(id=name, path="sleep", args=["1000"]))
        )
    return "box"


@pytest.fixture(autouse=True)
def nothing_is_left(stub: Stub, garden_server: ServerProcess, box: str) -> Iterator[None]:
    """Around each test: the same containers, links, directories, cgroups and ports, and the server answers."""
    before = traces(stub, garden_server)
    yield
    assert stub.Ping(pb.PingRequest(), timeout=10).server_version
    assert traces(stub, garden_server) == before
    process = stub.WaitProcess(
        pb.WaitProcessRequest(handle=box, process_id="running", timeout=Duration()), timeout=10
    )
    assert not process.HasField("exit")


def bind(source: str, destination: str) -> pb.ContainerSpec:
    return pb.ContainerSpec(bind_mounts=[pb.BindMount(source=source, destination=destination)])


def ports(*pairs: tuple[int, int]) -> pb.ContainerSpec:
    return pb.ContainerSpec(port_mappings=[pb.PortMapping(host_port=h, container_port=c) for h, c in pairs])


def rule(**fields: Any) -> pb.ContainerSpec:
    return pb.ContainerSpec(egress=pb.EgressPolicy(rules=[pb.EgressRule(**fields)]))


TCP = pb.EgressRule.TCP
TAKEN_PORT = 19_999  # outside every test server's pool
CREATES: dict[str, tuple[pb.ContainerSpec, grpc.StatusCode, str]] = {
    "handle with a slash": (pb.ContainerSpec(handle="a/b"), INVALID, "spec.handle"),
    "handle dot dot": (pb.ContainerSpec(handle=".."), INVALID, "spec.handle"),
    "handle dot": (pb.ContainerSpec(handle="."), INVALID, "spec.handle"),
    "handle with NUL": (pb.ContainerSpec(handle="a\0b"), INVALID, "spec.handle"),
    "handle with a newline": (pb.ContainerSpec(handle="a\n"), INVALID, "spec.handle"),
    "handle of 300": (pb.ContainerSpec(handle="x" * 300), INVALID, "spec.handle"),
    "handle like an option": (pb.ContainerSpec(handle="--all"), INVALID, "spec.handle"),
    "duplicate handle": (pb.ContainerSpec(handle="box"), EXISTS, ""),
    "hostname": (pb.ContainerSpec(hostname="-bad-"), INVALID, "spec.hostname"),
    "image missing": (pb.ContainerSpec(image="/no/such/image"), INVALID, "spec.image"),
    "image is a device": (pb.ContainerSpec(image="/dev/null"), INVALID, "spec.image"),
    "image relative": (pb.ContainerSpec(image="image"), INVALID, "spec.image"),
    "image with NUL": (pb.ContainerSpec(image="/a\0b"), INVALID, "spec.image"),
    "env without value": (pb.ContainerSpec(env=["A"]), INVALID, "spec.env[0]"),
    "env with NUL": (pb.ContainerSpec(env=["A=1", "B=\0"]), INVALID, "spec.env[1]"),
    "property without a key": (pb.ContainerSpec(properties={"": "x"}), INVALID, "spec.properties"),
    "bind source relative": (bind("etc", "/x"), INVALID, "spec.bind_mounts[0].source"),
    "bind source missing": (bind("/no/such/dir", "/x"), INVALID, "spec.bind_mounts[0].source"),
    "bind source with NUL": (bind("/etc\0", "/x"), INVALID, "spec.bind_mounts[0].source"),
    "bind to /proc": (bind("/etc", "/proc"), INVALID, "spec.bind_mounts[0].destination"),
    "bind below /proc": (bind("/etc", "/proc/self/x"), INVALID, "spec.bind_mounts[0].destination"),
    "bind below /sys": (bind("/etc", "/sys/kernel"), INVALID, "spec.bind_mounts[0].destination"),
    "bind to //proc": (bind("/etc", "//proc"), INVALID, "spec.bind_mounts[0].destination"),
    "bind through ..": (bind("/etc", "/x/../proc"), INVALID, "spec.bind_mounts[0].destination"),
    "bind to the root": (bind("/etc", "/"), INVALID, "spec.bind_mounts[0].destination"),
    "bind to a relative path": (bind("/etc", "x"), INVALID, "spec.bind_mounts[0].destination"),
    "memory below the floor": (
        pb.ContainerSpec(limits=pb.Limits(memory_bytes=1 << 20)), INVALID, "spec.limits.memory_bytes"),
    "memory of 2^64-1": (
        pb.ContainerSpec(limits=pb.Limits(memory_bytes=(1 << 64) - 1)), INVALID, "spec.limits.memory_bytes"),
    "CPU weight": (pb.ContainerSpec(limits=pb.Limits(cpu_weight=0)), INVALID, "spec.limits.cpu_weight"),
    "CPU quota": (pb.ContainerSpec(limits=pb.Limits(cpu_quota_us=1)), INVALID, "spec.limits.cpu_quota_us"),
    "CPU period": (
        pb.ContainerSpec(limits=pb.Limits(cpu_quota_us=5000, cpu_period_us=1)), INVALID, "spec.limits.cpu_period_us"),
    "tasks": (pb.ContainerSpec(limits=pb.Limits(pids=1 << 40)), INVALID, "spec.limits.pids"),
    "negative grace time": (pb.ContainerSpec(grace_time=Duration(seconds=-1)), INVALID, "spec.grace_time"),
    "grace time of ages": (pb.ContainerSpec(grace_time=Duration(seconds=1 << 40)), INVALID, "spec.grace_time"),
    "host port 70000": (ports((70_000, 1)), INVALID, "spec.port_mappings[0].host_port"),
    "container port 70000": (ports((0, 70_000)), INVALID, "spec.port_mappings[0].container_port"),
    "overlapping ports": (ports((5000, 1), (5000, 2)), INVALID, "spec.port_mappings[1].host_port"),
    "registry image": (pb.ContainerSpec(image="docker:///Busybox"), INVALID, "spec.image"),
    "period alone": (
        pb.ContainerSpec(limits=pb.Limits(cpu_period_us=100_000)), INVALID, "spec.limits.cpu_period_us"),
    "port that is taken": (ports((TAKEN_PORT, 1)), EXISTS, ""),
    "too many ports": (ports(*[(0, n + 1) for n in range(51)]), EXHAUSTED, ""),
    "reversed ports": (
        rule(protocol=TCP, ports=[pb.PortRange(start=9, end=8)]), INVALID, "spec.egress.rules[0].ports[0].end"),
    "reversed addresses": (
        rule(networks=["10.0.0.9-10.0.0.1"]), INVALID, "spec.egress.rules[0].networks[0].end"),
    "address nonsense": (rule(networks=["everywhere"]), INVALID, "spec.egress.rules[0].networks[0].start"),
    "ports without a protocol": (rule(ports=[pb.PortRange(start=1)]), INVALID, "spec.egress.rules[0].ports"),
    "unknown protocol": (rule(protocol=UNKNOWN_VALUE), INVALID, "spec.egress.rules[0].protocol"),
    "unknown action": (rule(action=UNKNOWN_VALUE), INVALID, "spec.egress.rules[0].action"),
    "unknown default": (
        pb.ContainerSpec(egress=pb.EgressPolicy(default_action=UNKNOWN_VALUE)), INVALID, "spec.egress.default_action"),
    "unknown bind mode": (
        pb.ContainerSpec(bind_mounts=[pb.BindMount(source="/etc", destination="/x", mode=UNKNOWN_VALUE)]),
        INVALID, "spec.bind_mounts[0].mode"),
    "unknown port protocol": (
        pb.ContainerSpec(port_mappings=[pb.PortMapping(protocol=UNKNOWN_VALUE)]),
        INVALID, "spec.port_mappings[0].protocol"),
}  # fmt: skip


@pytest.mark.parametrize("name", CREATES)
def test_bad_create(stub: Stub, name: str) -> None:
    """The field is named, the code is right, nothing is left."""
    spec, code, field = CREATES[name]
    error = refused(lambda: stub.CreateContainer(pb.CreateContainerRequest(spec=spec), timeout=30))
    assert error.code() is code, error.details()
    reason, fields = details_of(error)
    assert reason
    assert fields == ({field} if field else set())


def test_long_request_id(stub: Stub) -> None:
    """It is kept in the journal, so it is bounded."""
    request = pb.CreateContainerRequest(spec=pb.ContainerSpec(), request_id="r" * 129)
    error = refused(lambda: stub.CreateContainer(request, timeout=10))
    assert (error.code(), details_of(error)[1]) == (INVALID, {"request_id"})


def signal(**fields: Any) -> pb.SignalProcessRequest:
    return pb.SignalProcessRequest(handle="box", process_id="running", signal=pb.Signal(**fields))


def start(**fields: Any) -> pb.StartProcessRequest:
    return pb.StartProcessRequest(handle="box", spec=pb.ProcessSpec(**{"path": "true", **fields}))


def read(**fields: Any) -> pb.ReadOutputRequest:
    return pb.ReadOutputRequest(**{"handle": "box", "process_id": "running", **fields})


CALLS: dict[str, tuple[str, Any, grpc.StatusCode, str]] = {
    "unknown signal number": ("SignalProcess", signal(number=99), INVALID, "signal.number"),
    "negative signal": ("SignalProcess", signal(number=-9), INVALID, "signal.number"),
    "unknown signal name": ("SignalProcess", signal(name="NOPE"), INVALID, "signal.name"),
    "no signal": ("SignalProcess", signal(), INVALID, "signal"),
    "empty path": ("StartProcess", start(path=""), INVALID, "spec.path"),
    "path with NUL": ("StartProcess", start(path="a\0"), INVALID, "spec.path"),
    "process id with a slash": ("StartProcess", start(id="../x"), INVALID, "spec.id"),
    "process id of helpers": ("StartProcess", start(id=".copy-1"), INVALID, "spec.id"),
    "process id in use": ("StartProcess", start(id="running"), EXISTS, ""),
    "relative directory": ("StartProcess", start(dir="x"), INVALID, "spec.dir"),
    "unknown rlimit": ("StartProcess", start(rlimits={"x": 1}), INVALID, "spec.rlimits[x]"),
    "too many arguments": ("StartProcess", start(args=["x" * 600_000]), INVALID, "spec.args"),
    "process memory below the floor": (
        "StartProcess", start(limits=pb.Limits(memory_bytes=1)), INVALID, "spec.limits.memory_bytes"),
    "tiny retention": ("StartProcess", start(output_retention_bytes=1), INVALID, "spec.output_retention_bytes"),
    "huge window": ("StartProcess", start(tty=pb.Tty(rows=70_000)), INVALID, "window"),
    "unknown user": ("StartProcess", start(user="stranger"), NOT_FOUND, ""),
    "user with NUL": ("StartProcess", start(user="a\0"), INVALID, "spec.user"),
    "huge user id": ("StartProcess", start(user="99999999999"), INVALID, "spec.user"),
    "offset beyond the end": ("ReadOutput", read(offset=1), OUT_OF_RANGE, ""),
    "unknown stream": ("ReadOutput", read(stream=UNKNOWN_VALUE), INVALID, "stream"),
    "unknown process": ("ReadOutput", read(process_id="x"), NOT_FOUND, ""),
    "page too large": ("ListContainers", pb.ListContainersRequest(page_size=1001), INVALID, "page_size"),
    "limits below the floor": (
        "UpdateLimits", pb.UpdateLimitsRequest(handle="box", limits=pb.Limits(memory_bytes=1)),
        INVALID, "limits.memory_bytes"),
    "mapping out of range": (
        "MapPort", pb.MapPortRequest(handle="box", mapping=pb.PortMapping(host_port=70_000)),
        INVALID, "mapping.host_port"),
    "policy with a reversed range": (
        "SetEgress",
        pb.SetEgressRequest(handle="box", policy=pb.EgressPolicy(rules=[pb.EgressRule(networks=["2.0.0.0-1.0.0.0"])])),
        INVALID, "policy.rules[0].networks[0].end"),
    "stale etag": (
        "SetEgress", pb.SetEgressRequest(handle="box", policy=pb.EgressPolicy(etag="old")),
        grpc.StatusCode.ABORTED, ""),
    "property without a key": (
        "UpdateProperties", pb.UpdatePropertiesRequest(handle="box", set={"": "x"}), INVALID, "set"),
    "too many properties": (
        "UpdateProperties", pb.UpdatePropertiesRequest(handle="box", set={"k": "v" * (2 << 20)}), INVALID, "set"),
    "negative grace time": (
        "SetGraceTime", pb.SetGraceTimeRequest(handle="box", grace_time=Duration(seconds=-5)),
        INVALID, "grace_time"),
    "negative stop grace": (
        "StopContainer", pb.StopContainerRequest(handle="box", grace=Duration(seconds=-5)), INVALID, "grace"),
    "cursor of the future": (
        "WatchEvents", pb.WatchEventsRequest(after_cursor=1 << 50), OUT_OF_RANGE, ""),
    "copy from nowhere": ("StreamOut", pb.StreamOutRequest(handle="box", path=""), INVALID, "path"),
}  # fmt: skip


def perform(stub: Stub, rpc: str, request: Any) -> None:
    answer = getattr(stub, rpc)(request, timeout=20)
    if isinstance(answer, Iterable):
        list(answer)


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(stub: Stub, name: str) -> None:
    """Of every verb; nothing is changed."""
    rpc, request, code, field = CALLS[name]
    error = refused(lambda: perform(stub, rpc, request))
    assert error.code() is code, error.details()
    assert details_of(error)[1] == ({field} if field else set())


HANDLE_CALLS = [
    ("GetContainer", pb.GetContainerRequest),
    ("StopContainer", pb.StopContainerRequest),
    ("DestroyContainer", pb.DestroyContainerRequest),
    ("SetGraceTime", pb.SetGraceTimeRequest),
    ("UpdateProperties", pb.UpdatePropertiesRequest),
    ("GetLimits", pb.GetLimitsRequest),
    ("UpdateLimits", pb.UpdateLimitsRequest),
    ("MapPort", pb.MapPortRequest),
    ("GetEgress", pb.GetEgressRequest),
    ("SetEgress", pb.SetEgressRequest),
    ("StartProcess", lambda handle: pb.StartProcessRequest(handle=handle, spec=pb.ProcessSpec(path="true"))),
    ("ListProcesses", pb.ListProcessesRequest),
    ("WaitProcess", pb.WaitProcessRequest),
    ("ReadOutput", pb.ReadOutputRequest),
    ("StreamOut", lambda handle: pb.StreamOutRequest(handle=handle, path="/")),
]


@pytest.mark.parametrize("handle", ["never-made", "", "../box", "x" * 1000])
@pytest.mark.parametrize(("rpc", "make"), HANDLE_CALLS, ids=[rpc for rpc, _ in HANDLE_CALLS])
def test_unknown_handle(stub: Stub, rpc: str, make: Callable[..., Any], handle: str) -> None:
    """NOT_FOUND with the handle, whatever the verb and however strange the handle."""
    error = refused(lambda: perform(stub, rpc, make(handle=handle)))
    assert error.code() is NOT_FOUND
    assert details_of(error)[0] == "CONTAINER_NOT_FOUND"


def test_process_on_a_destroyed_container(stub: Stub) -> None:
    """Gone is gone: also for processes that were in it."""
    stub.CreateContainer(pb.CreateContainerRequest(spec=pb.ContainerSpec(handle="gone")))
    stub.StartProcess(pb.StartProcessRequest(handle="gone", spec=pb.ProcessSpec(id="p", path="true")))
    stub.DestroyContainer(pb.DestroyContainerRequest(handle="gone"))
    start = pb.StartProcessRequest(handle="gone", spec=pb.ProcessSpec(path="true"))
    wait = pb.WaitProcessRequest(handle="gone", process_id="p")
    assert refused(lambda: stub.StartProcess(start, timeout=10)).code() is NOT_FOUND
    assert refused(lambda: stub.WaitProcess(wait, timeout=10)).code() is NOT_FOUND


def run(*messages: pb.RunProcessRequest) -> Iterator[pb.RunProcessRequest]:
    yield from messages


def beginning(**fields: Any) -> pb.RunProcessRequest:
    spec = pb.ProcessSpec(**{"path": "sleep", "args": ["1000"], **fields})
    return pb.RunProcessRequest(start=pb.RunProcessRequest.Start(handle="box", spec=spec))


def attached(process_id: str, *inputs: pb.ProcessInput) -> Iterator[pb.AttachProcessRequest]:
    yield pb.AttachProcessRequest(attach=pb.AttachProcessRequest.Attach(handle="box", process_id=process_id))
    for each in inputs:
        yield pb.AttachProcessRequest(input=each)


STDIN_END = pb.ProcessInput(stdin=pb.Stdin(close=True))
LATE_INPUT = pb.ProcessInput(stdin=pb.Stdin(data=b"late"))
INPUTS: dict[str, tuple[list[pb.ProcessInput], grpc.StatusCode, str]] = {
    "stdin after its end": ([STDIN_END, LATE_INPUT], PRECONDITION, "STDIN_CLOSED"),
    "resize without a terminal": ([pb.ProcessInput(window=pb.Tty(rows=1))], PRECONDITION, "NO_TTY"),
    "unknown signal": ([pb.ProcessInput(signal=pb.Signal(number=99))], INVALID, "INVALID_REQUEST"),
    "empty input": ([pb.ProcessInput()], INVALID, "INVALID_REQUEST"),
    "gap in stdin": (
        [pb.ProcessInput(stdin=pb.Stdin(data=b"x", offset=9))], OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE"),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_bad_process_input(stub: Stub, name: str) -> None:
    """It ends the stream with a reason, and the process goes on."""
    inputs, code, reason = INPUTS[name]
    process_id = name.replace(" ", "-")
    stub.StartProcess(start(id=process_id, path="sleep", args=["1000"]))
    error = refused(lambda: list(stub.AttachProcess(attached(process_id, *inputs), timeout=20)))
    assert (error.code(), details_of(error)[0]) == (code, reason)
    wait = pb.WaitProcessRequest(handle="box", process_id=process_id, timeout=Duration())
    assert not stub.WaitProcess(wait, timeout=10).HasField("exit")
    kill = pb.SignalProcessRequest(handle="box", process_id=process_id, signal=pb.Signal(number=9))
    assert stub.SignalProcess(kill, timeout=10).delivered


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [pb.RunProcessRequest()],
        [pb.RunProcessRequest(input=STDIN_END)],
    ],
    ids=["no message", "empty message", "input first"],
)
def test_run_must_begin_with_its_start(stub: Stub, messages: list[pb.RunProcessRequest]) -> None:
    """There is no process to which the input could belong."""
    error = refused(lambda: list(stub.RunProcess(run(*messages), timeout=20)))
    assert (error.code(), details_of(error)[1]) == (INVALID, {"start"})


def test_second_start_on_a_stream(stub: Stub) -> None:
    """One stream, one process; the first goes on."""
    error = refused(lambda: list(stub.RunProcess(run(beginning(id="one"), beginning(id="two")), timeout=20)))
    assert (error.code(), details_of(error)[1]) == (INVALID, {"start"})
    kill = pb.SignalProcessRequest(handle="box", process_id="one", signal=pb.Signal(number=9))
    assert stub.SignalProcess(kill, timeout=10).delivered


COPY_TARGET = pb.StreamInRequest(target=pb.StreamInRequest.Target(handle="box", path="/tmp/bad"))


@pytest.mark.parametrize(
    ("messages", "field"),
    [([pb.StreamInRequest(data=b"x")], "target"), ([], "target"), ([COPY_TARGET, COPY_TARGET], "data")],
    ids=["data first", "nothing", "two targets"],
)
def test_copy_in_must_begin_with_its_target(
    stub: Stub, messages: list[pb.StreamInRequest], field: str
) -> None:
    """And continue with data."""
    error = refused(lambda: stub.StreamIn(iter(messages), timeout=20))
    assert (error.code(), details_of(error)[1]) == (INVALID, {field})


def test_message_that_is_too_large(stub: Stub) -> None:
    """20 MiB: refused by size, before anything reads it."""
    request = start(env=["A=" + "x" * (20 << 20)])
    error = refused(lambda: stub.StartProcess(request, timeout=30))
    assert error.code() is EXHAUSTED
    copy = iter([COPY_TARGET, pb.StreamInRequest(data=bytes(20 << 20))])
    assert refused(lambda: stub.StreamIn(copy, timeout=30)).code() is EXHAUSTED
    message = pb.ProcessInput(stdin=pb.Stdin(data=bytes(20 << 20)))
    error = refused(lambda: list(stub.AttachProcess(attached("deaf", message), timeout=30)))
    assert error.code() is EXHAUSTED


def test_bytes_that_are_no_message(garden_server: ServerProcess) -> None:
    """A client that speaks nonsense gets gRPC's own error."""
    with grpc.insecure_channel(garden_server.address) as channel:
        call = channel.unary_unary("/garden.v1.Garden/CreateContainer", bytes, bytes)
        error = refused(lambda: call(b"\xff\xff\xff\xff", timeout=10))
    assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert "parsing message" in (error.details() or "")


def test_all_bad_fields_are_named_at_once(stub: Stub) -> None:
    """A caller corrects a request in one round."""
    spec = pb.ContainerSpec(handle="a/b", hostname="-", limits=pb.Limits(pids=1 << 40), env=["X"])
    error = refused(lambda: stub.CreateContainer(pb.CreateContainerRequest(spec=spec), timeout=10))
    assert details_of(error)[1] == {"spec.handle", "spec.hostname", "spec.limits.pids", "spec.env[0]"}
