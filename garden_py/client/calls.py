"""Every RPC as a value: which method, which request, how to read the answer.

The synchronous and the asynchronous client differ only in how they perform a call; what a call *is* stands
here, once. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.wire_form import bytes_head
from garden_py.client import convert
from garden_py.client import values as v
from garden_py.client.times import duration_to_pb

Value = TypeVar("Value")

SERVICE: Final = "garden.v1.Garden"


@dataclass(frozen=True, slots=True)
class Call(Generic[Value]):
    """One request with one answer, or (where the name of the builder says so) a stream of answers.

    Attributes:
        rpc: name of the method in the service.
        request: the message to send.
        reply_type: the message class of an answer.
        decode: answer to value.
        waits: the call may rightly take as long as it likes (no default time limit).
    """

    rpc: str
    request: Message
    reply_type: Any
    decode: Callable[[Any], Value]
    waits: bool = False


def method_path(rpc: str) -> str:
    """The HTTP/2 path of a method."""
    return f"/{SERVICE}/{rpc}"


def _nothing(_reply: object) -> None:
    return None


def ping() -> Call[str]:
    """The server's version."""
    return Call("Ping", pb.PingRequest(), pb.PingResponse, lambda reply: str(reply.server_version))


def capacity() -> Call[v.Capacity]:
    """What the server can hold."""
    return Call("GetCapacity", pb.GetCapacityRequest(), pb.GetCapacityResponse, convert.capacity_from_pb)


def check_leaks(*, remove: bool) -> Call[list[v.Leak]]:
    """What differs between the server's journal and its host."""
    return Call(
        "CheckLeaks",
        pb.CheckLeaksRequest(remove=remove),
        pb.CheckLeaksResponse,
        lambda reply: [convert.leak_from_pb(each) for each in reply.leaks],
        waits=True,
    )


def create(spec: v.ContainerSpec, request_id: str) -> Call[v.ContainerInfo]:
    """A new container."""
    request = pb.CreateContainerRequest(spec=convert.container_spec_to_pb(spec), request_id=request_id)
    # The fetch of an image, the server's default one included, takes as long as it takes; the server bounds the rest.
    return Call("CreateContainer", request, pb.Container, convert.container_from_pb, waits=True)


def info(handle: str) -> Call[v.ContainerInfo]:
    """One container."""
    return Call(
        "GetContainer", pb.GetContainerRequest(handle=handle), pb.Container, convert.container_from_pb
    )


@dataclass(frozen=True, slots=True)
class Page:
    """Some containers, and the token of the next page; empty: this was the last."""

    containers: tuple[v.ContainerInfo, ...]
    next_token: str


def list_page(properties: Mapping[str, str], *, all_states: bool, token: str, size: int = 0) -> Call[Page]:
    """One page of containers."""
    request = pb.ListContainersRequest(
        properties=properties, all_states=all_states, page_token=token, page_size=size
    )
    return Call(
        "ListContainers",
        request,
        pb.ListContainersResponse,
        lambda reply: Page(
            tuple(convert.container_from_pb(each) for each in reply.containers), reply.next_page_token
        ),
    )


def stop(handle: str, *, kill: bool, grace: timedelta | None) -> Call[None]:
    """The end of all processes of a container."""
    request = pb.StopContainerRequest(
        handle=handle, kill=kill, grace=None if grace is None else duration_to_pb(grace)
    )
    return Call("StopContainer", request, pb.StopContainerResponse, _nothing, waits=True)


def destroy(handle: str) -> Call[None]:
    """The end of a container. The server bounds it, so the client does not."""
    request = pb.DestroyContainerRequest(handle=handle)
    return Call("DestroyContainer", request, pb.DestroyContainerResponse, _nothing, waits=True)


def set_grace_time(handle: str, grace_time: timedelta | None) -> Call[None]:
    """How long a container may be unused; None: for ever."""
    request = pb.SetGraceTimeRequest(
        handle=handle, grace_time=None if grace_time is None else duration_to_pb(grace_time)
    )
    return Call("SetGraceTime", request, pb.SetGraceTimeResponse, _nothing)


def update_properties(handle: str, to_set: Mapping[str, str], remove: Iterable[str]) -> Call[dict[str, str]]:
    """All properties after the change."""
    request = pb.UpdatePropertiesRequest(handle=handle, set=to_set, remove=remove)
    return Call(
        "UpdateProperties", request, pb.UpdatePropertiesResponse, lambda reply: dict(reply.properties)
    )


def metrics(
    handles: Iterable[str], processes: Iterable[tuple[str, str]] = ()
) -> Call[list[v.ContainerMetrics]]:
    """Usage of the named containers and processes, or of all containers."""
    names = [pb.ProcessName(handle=handle, process_id=process_id) for handle, process_id in processes]
    return Call(
        "GetMetrics",
        pb.GetMetricsRequest(handles=handles, processes=names),
        pb.GetMetricsResponse,
        lambda reply: [convert.metrics_from_pb(each) for each in reply.metrics],
    )


def limits(handle: str, process_id: str = "") -> Call[v.Limits]:
    """The limits in force, of a container or of a process in it."""
    request = pb.GetLimitsRequest(handle=handle, process_id=process_id)
    return Call("GetLimits", request, pb.Limits, convert.limits_from_pb)


def update_limits(handle: str, changed: v.Limits, process_id: str = "") -> Call[v.Limits]:
    """The limits in force after the change."""
    request = pb.UpdateLimitsRequest(
        handle=handle, limits=convert.limits_to_pb(changed), process_id=process_id
    )
    return Call("UpdateLimits", request, pb.Limits, convert.limits_from_pb)


def map_port(handle: str, mapping: v.PortMapping) -> Call[v.PortMapping]:
    """The mapping with its numbers filled in."""
    request = pb.MapPortRequest(handle=handle, mapping=convert.port_mapping_to_pb(mapping))
    return Call("MapPort", request, pb.PortMapping, convert.port_mapping_from_pb)


def egress(handle: str) -> Call[v.EgressPolicy]:
    """The policy in force with its counters."""
    return Call("GetEgress", pb.GetEgressRequest(handle=handle), pb.EgressPolicy, convert.egress_from_pb)


def explain_egress(handle: str, destination: v.Destination) -> Call[v.EgressDecision]:
    """What would become of a connection."""
    request = convert.destination_to_pb(handle, destination)
    return Call("ExplainEgress", request, pb.ExplainEgressResponse, convert.decision_from_pb)


def set_egress(handle: str, policy: v.EgressPolicy, *, cut: bool) -> Call[v.EgressPolicy]:
    """The policy after it was replaced."""
    request = pb.SetEgressRequest(
        handle=handle,
        policy=convert.egress_to_pb(policy),
        established=pb.SetEgressRequest.CUT if cut else pb.SetEgressRequest.KEEP,
    )
    return Call("SetEgress", request, pb.EgressPolicy, convert.egress_from_pb)


def start(handle: str, spec: v.ProcessSpec, request_id: str) -> Call[v.ProcessInfo]:
    """A started process that nobody is attached to."""
    request = pb.StartProcessRequest(
        handle=handle, spec=convert.process_spec_to_pb(spec), request_id=request_id
    )
    return Call("StartProcess", request, pb.Process, convert.process_from_pb)


def signal(handle: str, process_id: str, message: pb.Signal) -> Call[bool]:
    """Whether the signal was delivered; False: the process had exited."""
    request = pb.SignalProcessRequest(handle=handle, process_id=process_id, signal=message)
    return Call("SignalProcess", request, pb.SignalProcessResponse, lambda reply: bool(reply.delivered))


def wait(handle: str, process_id: str, timeout: timedelta | None) -> Call[v.ExitStatus | None]:
    """The exit status, or None when the timeout passed."""
    request = pb.WaitProcessRequest(
        handle=handle,
        process_id=process_id,
        timeout=None if timeout is None else duration_to_pb(timeout),
    )
    return Call(
        "WaitProcess",
        request,
        pb.WaitProcessResponse,
        lambda reply: convert.exit_from_pb(reply.exit) if reply.HasField("exit") else None,
        waits=True,
    )


def processes(handle: str) -> Call[list[v.ProcessInfo]]:
    """All processes that callers started, oldest first."""
    return Call(
        "ListProcesses",
        pb.ListProcessesRequest(handle=handle),
        pb.ListProcessesResponse,
        lambda reply: [convert.process_from_pb(each) for each in reply.processes],
    )


def read_output(
    handle: str, process_id: str, stream: v.Stream, *, offset: int, follow: bool, limit_bytes: int
) -> Call[v.OutputChunk]:
    """A stream of answers: the output of one stream from an offset."""
    request = pb.ReadOutputRequest(
        handle=handle,
        process_id=process_id,
        stream=pb.Stream.ValueType(stream),
        offset=offset,
        follow=follow,
        limit_bytes=limit_bytes,
    )
    return Call("ReadOutput", request, pb.OutputChunk, convert.chunk_from_pb, waits=True)


@dataclass(slots=True)
class Reading:
    """How far one `read_output` has come; says how to go on after the connection broke. Sans-I/O."""

    handle: str
    process_id: str
    stream: v.Stream
    offset: int
    follow: bool
    limit_bytes: int
    started: bool = False
    ended: bool = False

    def call(self) -> Call[v.OutputChunk]:
        """The call that gives what is left."""
        return read_output(
            self.handle,
            self.process_id,
            self.stream,
            offset=self.offset,
            follow=self.follow,
            limit_bytes=self.limit_bytes,
        )

    def advance(self, chunk: v.OutputChunk) -> v.OutputChunk:
        """Count a received chunk and give it back."""
        self.started = True
        self.offset = chunk.offset + len(chunk.data)
        if self.limit_bytes:
            self.limit_bytes -= len(chunk.data)
            self.ended = self.limit_bytes <= 0  # a next call with 0 would ask for everything
        return chunk


def stream_out(handle: str, path: str, user: str) -> Call[bytes]:
    """A stream of answers: a tar in pieces."""
    request = pb.StreamOutRequest(handle=handle, path=path, user=user)
    return Call("StreamOut", request, pb.StreamOutResponse, lambda reply: bytes(reply.data), waits=True)


def diagnose(handle: str) -> Call[bytes]:
    """A stream of answers: a tar in pieces."""
    request = pb.DiagnoseContainerRequest(handle=handle)
    return Call(
        "DiagnoseContainer",
        request,
        pb.DiagnoseContainerResponse,
        lambda reply: bytes(reply.data),
        waits=True,
    )


def watch_events(handles: Sequence[str], after_cursor: int | None) -> Call[v.Event]:
    """A stream of answers: WATCHING, then what happens."""
    request = pb.WatchEventsRequest(handles=handles, after_cursor=after_cursor)
    return Call("WatchEvents", request, pb.Event, convert.event_from_pb, waits=True)


@dataclass(frozen=True, slots=True)
class Upload(Generic[Value]):
    """A stream of requests with one answer: a first message, then bytes.

    Attributes:
        data: a message that carries a piece, or its wire form.
    """

    rpc: str
    first: Message
    data: Callable[[bytes], Message | bytes]
    reply_type: Any
    decode: Callable[[Any], Value]

    def pieces(self, chunk: bytes, most_bytes: int) -> Iterable[Message | bytes]:
        """The messages that carry a chunk, none with more than most_bytes."""
        if 0 < len(chunk) <= most_bytes:
            yield self.data(chunk)
            return
        view = memoryview(chunk)
        for begin in range(0, len(view), most_bytes):
            yield self.data(bytes(view[begin : begin + most_bytes]))


def serialize(message: Message | bytes) -> bytes:
    """A message in its wire form, which it may have already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _stream_in_data(piece: bytes) -> bytes:
    """StreamInRequest(data=piece) as protobuf would write it, without a copy into the message and one out of it."""
    return b"".join((bytes_head(pb.StreamInRequest.DATA_FIELD_NUMBER, len(piece)), piece))


def stream_in(handle: str, path: str, user: str) -> Upload[None]:
    """A tar to be unpacked in a container."""
    target = pb.StreamInRequest.Target(handle=handle, path=path, user=user)
    return Upload(
        "StreamIn",
        pb.StreamInRequest(target=target),
        _stream_in_data,
        pb.StreamInResponse,
        _nothing,
    )


def run_first(handle: str, spec: v.ProcessSpec, request_id: str) -> pb.RunProcessRequest:
    """The first message of RunProcess."""
    return pb.RunProcessRequest(
        start=pb.RunProcessRequest.Start(
            handle=handle, spec=convert.process_spec_to_pb(spec), request_id=request_id
        )
    )


def signal_message(which: int | str, *, group: bool) -> pb.Signal:
    """A signal by number or by name."""
    if isinstance(which, str):
        return pb.Signal(name=which, group=group)
    return pb.Signal(number=which, group=group)
