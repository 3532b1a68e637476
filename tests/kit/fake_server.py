"""A garden server without containers: the gRPC contract in memory, scripted processes, broken streams.

It keeps the promises a client builds on (offsets, idempotent starts, stdin by offset, etags), so that the
client and the command line can be tested anywhere, and breaks connections exactly where a test says.
"""

from __future__ import annotations

import asyncio
import io
import posixpath
import tarfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc

_CHUNK_BYTES = 64 << 10
_DETAILS_KEY = "grpc-status-details-bin"


@dataclass
class FakeProcess:
    """A process scripted by its program.

    `emit OUT ERR CODE` writes and exits, `cat` copies stdin, `sleep` waits for a signal, `flood N` writes N
    bytes counting up, `env` writes its spec.
    """

    spec: pb.ProcessSpec
    output: dict[int, bytearray] = field(
        default_factory=lambda: {pb.STDOUT: bytearray(), pb.STDERR: bytearray()}
    )
    first_kept: dict[int, int] = field(default_factory=lambda: {pb.STDOUT: 0, pb.STDERR: 0})
    stdin: bytearray = field(default_factory=bytearray)
    stdin_closed: bool = False
    windows: list[tuple[int, int]] = field(default_factory=list)
    signals: list[str] = field(default_factory=list)
    exit: pb.ExitStatus | None = None
    attaches: list[pb.AttachProcessRequest.Attach] = field(default_factory=list)
    version: int = 0
    refusals: int = 0  # streams ended because input came after the end of stdin
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def step(self) -> None:
        """Let the program react to what has happened to it."""
        args = list(self.spec.args)
        match self.spec.path:
            case "emit" if self.exit is None:
                self.output[pb.STDOUT] += args[0].encode()
                self.output[pb.STDERR] += args[1].encode()
                self.exit = pb.ExitStatus(code=int(args[2]))
            case "flood" if self.exit is None:
                self.output[pb.STDOUT] += flood_bytes(int(args[0]))
                self.exit = pb.ExitStatus(code=0)
            case "cat":
                self.output[pb.STDOUT][:] = self.stdin
                if self.stdin_closed and self.exit is None:
                    self.exit = pb.ExitStatus(code=0)
            case "env" if self.exit is None:
                self.output[pb.STDOUT] += str(self.spec).encode()
                self.exit = pb.ExitStatus(code=0)
            case _:
                pass

    def describe(self, handle: str) -> pb.Process:
        closed = self.exit is not None
        return pb.Process(
            id=self.spec.id,
            handle=handle,
            spec=self.spec,
            exit=self.exit,
            pid=7,
            stdout_bytes=len(self.output[pb.STDOUT]),
            stderr_bytes=len(self.output[pb.STDERR]),
            stdout_closed=closed,
            stderr_closed=closed,
        )


def flood_bytes(count: int) -> bytes:
    """What `flood COUNT` writes: no two aligned blocks are equal, so a lost or repeated byte shows."""
    return b"".join(b"%015d\n" % number for number in range(count // 16 + 1))[:count]


@dataclass
class FakeContainer:
    message: pb.Container
    request_id: str
    limits: pb.Limits
    egress: pb.EgressPolicy
    processes: dict[str, FakeProcess] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class FakeGarden(garden_pb2_grpc.GardenServicer):
    """The state, and the knobs of a test.

    Attributes:
        breaks: for each coming process stream, after how many answers it breaks with UNAVAILABLE.
        stdin_breaks: for each coming process stream, after how many stdin messages it breaks.
        conflicts: how many coming SetEgress calls find that somebody else has changed the policy.
    """

    def __init__(self) -> None:
        self.containers: dict[str, FakeContainer] = {}
        self.breaks: deque[int] = deque()
        self.stdin_breaks: deque[int] = deque()
        self.conflicts = 0
        self.events: list[pb.Event] = []
        self.event_breaks: deque[int] = deque()

    # -- containers
    # ----------------------------------------------------------------------------------------------

    async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingResponse:
        return pb.PingResponse(server_version="fake 1")

    async def GetCapacity(self, request: pb.GetCapacityRequest, context: Any) -> pb.GetCapacityResponse:
        return pb.GetCapacityResponse(
            memory_bytes=8 << 30, max_containers=4, containers=len(self.containers), cpus=2
        )

    async def CreateContainer(self, request: pb.CreateContainerRequest, context: Any) -> pb.Container:
        spec = request.spec
        handle = spec.handle or f"made-{len(self.containers)}"
        if "/" in handle:
            await refuse(
                context, "INVALID_ARGUMENT", "INVALID_REQUEST", field="spec.handle", problem="no slashes"
            )
        existing = self.containers.get(handle)
        if existing is not None:
            if request.request_id and request.request_id == existing.request_id:
                return existing.message
            await refuse(context, "ALREADY_EXISTS", "HANDLE_IN_USE", f"Handle '{handle}' already in use")
        message = pb.Container(
            handle=handle,
            state=pb.ACTIVE,
            spec=spec,
            container_ip="10.254.0.2",
            host_ip="10.254.0.1",
            pid=4242,
        )
        message.created_at.GetCurrentTime()
        message.spec.handle = handle
        message.properties.update(spec.properties)
        message.mapped_ports.extend(spec.port_mappings)
        limits, egress = pb.Limits(), pb.EgressPolicy()
        limits.CopyFrom(spec.limits)
        egress.CopyFrom(spec.egress)
        egress.etag = "etag-0"
        self.containers[handle] = FakeContainer(message, request.request_id, limits, egress)
        return message

    async def find(self, handle: str, context: Any) -> FakeContainer:
        container = self.containers.get(handle)
        if container is None:
            await refuse(
                context, "NOT_FOUND", "CONTAINER_NOT_FOUND", f"unknown handle: {handle}", resource=handle
            )
        return container  # type: ignore[return-value] # refuse never returns

    async def GetContainer(self, request: pb.GetContainerRequest, context: Any) -> pb.Container:
        return (await self.find(request.handle, context)).message

    async def ListContainers(
        self, request: pb.ListContainersRequest, context: Any
    ) -> pb.ListContainersResponse:
        handles = sorted(
            handle
            for handle, container in self.containers.items()
            if request.properties.items() <= container.message.properties.items()
            and handle > request.page_token
        )
        page = handles[:2]  # small, so that paging is exercised
        return pb.ListContainersResponse(
            containers=[self.containers[handle].message for handle in page],
            next_page_token=page[-1] if len(handles) > len(page) else "",
        )

    async def StopContainer(self, request: pb.StopContainerRequest, context: Any) -> pb.StopContainerResponse:
        container = await self.find(request.handle, context)
        container.message.state = pb.STOPPED
        for process in container.processes.values():
            await end(process, pb.ExitStatus(signal=9 if request.kill else 15))
        return pb.StopContainerResponse()

    async def DestroyContainer(
        self, request: pb.DestroyContainerRequest, context: Any
    ) -> pb.DestroyContainerResponse:
        container = await self.find(request.handle, context)
        for process in container.processes.values():
            await end(process, pb.ExitStatus(signal=9))
        del self.containers[request.handle]
        return pb.DestroyContainerResponse()

    async def SetGraceTime(self, request: pb.SetGraceTimeRequest, context: Any) -> pb.SetGraceTimeResponse:
        container = await self.find(request.handle, context)
        container.message.spec.grace_time.CopyFrom(request.grace_time)
        return pb.SetGraceTimeResponse()

    async def UpdateProperties(
        self, request: pb.UpdatePropertiesRequest, context: Any
    ) -> pb.UpdatePropertiesResponse:
        properties = (await self.find(request.handle, context)).message.properties
        properties.update(request.set)
        for key in request.remove:
            properties.pop(key, None)
        return pb.UpdatePropertiesResponse(properties=properties)

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Any) -> pb.GetMetricsResponse:
        entries = []
        for handle in request.handles or sorted(self.containers):
            if handle in self.containers:
                entries.append(
                    pb.ContainerMetrics(handle=handle, memory_bytes=5 << 20, cpu_usage_ns=10**9, pids=3)
                )
            else:
                entries.append(pb.ContainerMetrics(handle=handle, error=f"unknown handle: {handle}"))
        return pb.GetMetricsResponse(metrics=entries)

    async def GetLimits(self, request: pb.GetLimitsRequest, context: Any) -> pb.Limits:
        return (await self.find(request.handle, context)).limits

    async def UpdateLimits(self, request: pb.UpdateLimitsRequest, context: Any) -> pb.Limits:
        container = await self.find(request.handle, context)
        container.limits.MergeFrom(request.limits)
        return container.limits

    async def MapPort(self, request: pb.MapPortRequest, context: Any) -> pb.PortMapping:
        container = await self.find(request.handle, context)
        mapping = pb.PortMapping()
        mapping.CopyFrom(request.mapping)
        mapping.host_port = mapping.host_port or 61001
        mapping.container_port = mapping.container_port or mapping.host_port
        container.message.mapped_ports.append(mapping)
        return mapping

    async def GetEgress(self, request: pb.GetEgressRequest, context: Any) -> pb.EgressPolicy:
        return (await self.find(request.handle, context)).egress

    async def SetEgress(self, request: pb.SetEgressRequest, context: Any) -> pb.EgressPolicy:
        container = await self.find(request.handle, context)
        if self.conflicts:
            self.conflicts -= 1
            container.egress.etag += "x"
        if request.policy.etag not in ("", container.egress.etag):
            await refuse(context, "ABORTED", "ETAG_MISMATCH", "the value was changed by somebody else")
        etag = container.egress.etag + "+"
        container.egress.CopyFrom(request.policy)
        container.egress.etag = etag
        return container.egress

    # -- files
    # ---------------------------------------------------------------------------------------------------

    async def StreamIn(
        self, requests: AsyncIterator[pb.StreamInRequest], context: Any
    ) -> pb.StreamInResponse:
        target = (await anext(requests)).target
        container = await self.find(target.handle, context)
        packed = b"".join([request.data async for request in requests])
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isreg() else None
                if source is not None:
                    path = posixpath.normpath(posixpath.join(target.path, member.name))
                    container.files[path] = source.read()
        return pb.StreamInResponse()

    async def DiagnoseContainer(
        self, request: pb.DiagnoseContainerRequest, context: Any
    ) -> AsyncIterator[pb.DiagnoseContainerResponse]:
        await self.find(request.handle, context)
        for data in (b"a tar ", b"in pieces"):
            yield pb.DiagnoseContainerResponse(data=data)

    async def StreamOut(
        self, request: pb.StreamOutRequest, context: Any
    ) -> AsyncIterator[pb.StreamOutResponse]:
        container = await self.find(request.handle, context)
        base = request.path.rstrip("/")
        chosen = {
            path: data
            for path, data in container.files.items()
            if path == base or path.startswith(f"{base}/")
        }
        if not chosen:
            await refuse(context, "NOT_FOUND", "COPY_FAILED", f"no such file: {request.path}")
        packed = io.BytesIO()
        start = base if request.path.endswith("/") else posixpath.dirname(base)
        with tarfile.open(fileobj=packed, mode="w") as archive:
            if base not in chosen:
                top = tarfile.TarInfo(posixpath.relpath(base, start))
                top.type, top.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(top)
            for path, data in sorted(chosen.items()):
                member = tarfile.TarInfo(posixpath.relpath(path, start))
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        for chunk in _cut(packed.getvalue(), 0):
            yield pb.StreamOutResponse(data=chunk)

    # -- processes
    # -----------------------------------------------------------------------------------------------

    async def start(self, start: Any, context: Any) -> FakeProcess:
        container = await self.find(start.handle, context)
        known = container.processes.get(start.spec.id)
        if known is not None:
            return known
        if start.spec.path == "nosuch":
            await refuse(context, "NOT_FOUND", "EXECUTABLE_NOT_FOUND", "nosuch: not found in PATH")
        process = FakeProcess(start.spec)
        container.processes[start.spec.id] = process
        process.step()
        return process

    async def process(self, handle: str, process_id: str, context: Any) -> FakeProcess:
        container = await self.find(handle, context)
        if process_id not in container.processes:
            await refuse(context, "NOT_FOUND", "PROCESS_NOT_FOUND", f"unknown process: {process_id}")
        return container.processes[process_id]

    async def StartProcess(self, request: pb.StartProcessRequest, context: Any) -> pb.Process:
        return (await self.start(request, context)).describe(request.handle)

    async def RunProcess(
        self, requests: AsyncIterator[pb.RunProcessRequest], context: Any
    ) -> AsyncIterator[pb.ProcessEvent]:
        start = (await anext(requests)).start
        process = await self.start(start, context)
        async for event in self._events(
            process, start.handle, requests, {pb.STDOUT: 0, pb.STDERR: 0}, context
        ):
            yield event

    async def AttachProcess(
        self, requests: AsyncIterator[pb.AttachProcessRequest], context: Any
    ) -> AsyncIterator[pb.ProcessEvent]:
        attach = (await anext(requests)).attach
        process = await self.process(attach.handle, attach.process_id, context)
        process.attaches.append(attach)
        offsets = {
            pb.STDOUT: attach.stdout_offset
            if attach.HasField("stdout_offset")
            else len(process.output[pb.STDOUT]),
            pb.STDERR: attach.stderr_offset
            if attach.HasField("stderr_offset")
            else len(process.output[pb.STDERR]),
        }
        async for event in self._events(process, attach.handle, requests, offsets, context):
            yield event

    async def _events(
        self,
        process: FakeProcess,
        handle: str,
        requests: Any,
        offsets: dict[pb.Stream.ValueType, int],
        context: Any,
    ) -> AsyncIterator[pb.ProcessEvent]:
        breaks = bool(self.breaks)
        answers_left = self.breaks.popleft() if breaks else -1
        refusals = process.refusals
        broken = asyncio.Event()
        reader = asyncio.create_task(self._take_input(process, requests, broken))
        try:
            async for event in self._all_events(process, handle, offsets, broken, context):
                if answers_left != 0:
                    yield event
                answers_left -= 1
                if answers_left <= 0 and breaks:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            if broken.is_set() and process.refusals > refusals:
                await refuse(context, "FAILED_PRECONDITION", "STDIN_CLOSED", "stdin is closed")
            if broken.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
        finally:
            reader.cancel()

    async def _all_events(
        self,
        process: FakeProcess,
        handle: str,
        offsets: dict[pb.Stream.ValueType, int],
        broken: asyncio.Event,
        context: Any,
    ) -> AsyncIterator[pb.ProcessEvent]:
        yield pb.ProcessEvent(started=process.describe(handle))
        while not broken.is_set():
            # Looked at before the output: what is written between the two is then sent in the next round.
            exited, seen = process.exit is not None, process.version
            for stream, offset in offsets.items():
                first = process.first_kept[stream]
                if offset < first:
                    facts = {"first_offset": str(first), "end_offset": str(len(process.output[stream]))}
                    await refuse(context, "OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", "not kept", metadata=facts)
                for chunk in _cut(process.output[stream], offset):
                    yield pb.ProcessEvent(
                        output=pb.OutputChunk(
                            stream=pb.Stream.ValueType(stream), offset=offsets[stream], data=chunk
                        )
                    )
                    offsets[stream] += len(chunk)
            if exited:
                break
            async with process.changed:
                while process.version == seen:
                    await process.changed.wait()
        if process.exit is not None and not broken.is_set():
            yield pb.ProcessEvent(exited=process.exit)
            for stream in (pb.STDOUT, pb.STDERR):
                yield pb.ProcessEvent(
                    closed=pb.StreamClosed(stream=stream, length=len(process.output[stream]))
                )

    async def _take_input(self, process: FakeProcess, requests: Any, broken: asyncio.Event) -> None:
        stdin_left = self.stdin_breaks.popleft() if self.stdin_breaks else -1
        async for request in requests:
            message = request.input
            if message.HasField("stdin"):
                if stdin_left == 0:
                    broken.set()
                    await notify(process)
                    return
                if process.stdin_closed and message.stdin.data:
                    process.refusals += 1
                    broken.set()
                    await notify(process)
                    return
                stdin_left -= 1
                accepted = len(process.stdin)
                offset = message.stdin.offset if message.stdin.HasField("offset") else accepted
                if offset > accepted:
                    raise AssertionError("the client left a gap in stdin")
                process.stdin += message.stdin.data[accepted - offset :]
                process.stdin_closed |= message.stdin.close
            elif message.HasField("window"):
                process.windows.append((message.window.rows, message.window.columns))
            process.step()
            await notify(process)

    async def ReadOutput(self, request: pb.ReadOutputRequest, context: Any) -> AsyncIterator[pb.OutputChunk]:
        process = await self.process(request.handle, request.process_id, context)
        offset = request.offset
        for chunk in _cut(process.output[request.stream], offset):
            yield pb.OutputChunk(stream=request.stream, offset=offset, data=chunk)
            offset += len(chunk)

    async def SignalProcess(self, request: pb.SignalProcessRequest, context: Any) -> pb.SignalProcessResponse:
        process = await self.process(request.handle, request.process_id, context)
        if process.exit is not None:
            return pb.SignalProcessResponse(delivered=False)
        process.signals.append(request.signal.name or str(request.signal.number))
        await end(process, pb.ExitStatus(signal=request.signal.number or 15))
        return pb.SignalProcessResponse(delivered=True)

    async def WaitProcess(self, request: pb.WaitProcessRequest, context: Any) -> pb.WaitProcessResponse:
        process = await self.process(request.handle, request.process_id, context)
        limit_s = request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else None
        try:
            async with asyncio.timeout(limit_s), process.changed:
                await process.changed.wait_for(lambda: process.exit is not None)
        except TimeoutError:
            return pb.WaitProcessResponse()
        return pb.WaitProcessResponse(exit=process.exit)

    async def ListProcesses(self, request: pb.ListProcessesRequest, context: Any) -> pb.ListProcessesResponse:
        container = await self.find(request.handle, context)
        return pb.ListProcessesResponse(
            processes=[process.describe(request.handle) for process in container.processes.values()]
        )

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.Event]:
        """The scripted events after the cursor, then the end (a real server would go on)."""
        after = request.after_cursor if request.HasField("after_cursor") else 0
        left = self.event_breaks.popleft() if self.event_breaks else -1
        for event in [pb.Event(kind=pb.Event.WATCHING, cursor=after), *self.events]:
            if left == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
            if event.kind == pb.Event.WATCHING or event.cursor > after:
                left -= 1
                yield event


async def end(process: FakeProcess, status: pb.ExitStatus) -> None:
    """Finish a process unless it has finished."""
    if process.exit is None:
        process.exit = status
    await notify(process)


async def notify(process: FakeProcess) -> None:
    """Wake all readers of a process; call it after every change."""
    async with process.changed:
        process.version += 1
        process.changed.notify_all()


def _cut(data: bytes | bytearray, offset: int) -> Iterator[bytes]:
    for begin in range(offset, len(data), _CHUNK_BYTES):
        yield bytes(data[begin : begin + _CHUNK_BYTES])


async def refuse(
    context: Any,
    status: str,
    reason: str,
    message: str = "refused",
    *,
    field: str = "",
    problem: str = "",
    metadata: dict[str, str] | None = None,
    resource: str = "",
) -> None:
    """End the call with a status and the details that a garden server sends."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=reason, domain="garden.v1", metadata=metadata or {})
    ]
    if field:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=field, description=problem)
        details.append(bad)
        message = f"{field}: {problem}"
    if resource:
        details.append(error_details_pb2.ResourceInfo(resource_type="container", resource_name=resource))
    packed = [any_pb2.Any() for _ in details]
    for box, detail in zip(packed, details, strict=True):
        box.Pack(detail)
    rich = status_pb2.Status(code=code_pb2.Code.Value(status), message=message, details=packed)
    trailing = ((_DETAILS_KEY, rich.SerializeToString()),)
    await context.abort(grpc.StatusCode[status], message, trailing)


@dataclass(frozen=True)
class RunningFake:
    """A fake that serves. `garden` belongs to its thread: look at it freely, change it only between calls."""

    address: str
    garden: FakeGarden


@contextmanager
def serve_fake(directory: Path) -> Iterator[RunningFake]:
    """A fake server on a socket in directory, in a thread with its own event loop, until the block ends."""
    garden = FakeGarden()
    address = f"unix:{directory / 'fake.sock'}"
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        server = grpc.aio.server()
        garden_pb2_grpc.add_GardenServicer_to_server(garden, server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(address)
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(grace=None)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-garden")
    thread.start()
    if not ready.wait(timeout=30):
        raise AssertionError("the fake server did not start")
    try:
        yield RunningFake(address, garden)
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
