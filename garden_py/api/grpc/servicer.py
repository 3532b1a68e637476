"""The service Garden of garden.v1: each RPC decodes, calls one verb, encodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.api.grpc import convert
from garden_py.api.grpc.chunks import Encoded, encode_stream_out
from garden_py.api.grpc.image_servicer import ImageServicer
from garden_py.api.grpc.streams import CHUNK_BYTES, ProcessFeed, feed_input, read_chunks
from garden_py.model.errors import ContainerNotFound, GardenError, InvalidField
from garden_py.model.process import OutputStream
from garden_py.observe.calls import name_container
from garden_py.service.core import Core
from garden_py.service.ports import AgentFacts, NetworkFacts, RunningProcess, Usage
from garden_py.service.registry import Container

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
PAGE_MAX = 1000


class GardenServicer(ImageServicer, garden_pb2_grpc.GardenServicer):
    """Translates; every rule is in the service. Errors become statuses in one place, interceptor.py."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._core = core

    # --- the server

    async def Ping(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        """See the proto."""
        return pb.PingResponse(server_version=self._core.version)

    async def GetCapacity(self, request: pb.GetCapacityRequest, context: Context) -> pb.GetCapacityResponse:
        """See the proto."""
        host, most, now = self._core.containers.capacity()
        return pb.GetCapacityResponse(
            memory_bytes=host.memory_bytes,
            disk_bytes=host.disk_bytes,
            disk_free_bytes=host.disk_free_bytes,
            max_containers=most,
            containers=now,
            ports=host.ports,
            ports_in_use=host.ports_in_use,
            cpus=host.cpus,
        )

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Context) -> AsyncIterator[pb.Event]:
        """See the proto."""
        events = self._core.events
        after = request.after_cursor if request.HasField("after_cursor") else events.cursor
        events.check_cursor(after)
        yield pb.Event(kind=pb.Event.WATCHING, cursor=after)
        wanted = set(request.handles)
        async for event in events.watch(after):
            if not wanted or event.handle in wanted:
                yield convert.event_to(event)

    async def CheckLeaks(self, request: pb.CheckLeaksRequest, context: Context) -> pb.CheckLeaksResponse:
        """See the proto."""
        reports = await self._core.janitor.check(remove=request.remove)
        return pb.CheckLeaksResponse(leaks=[convert.leak_to(report) for report in reports])

    # --- containers

    async def CreateContainer(self, request: pb.CreateContainerRequest, context: Context) -> pb.Container:
        """See the proto."""
        spec = convert.container_spec_from(request.spec, self._core.default_egress)
        return self._encode(await self._core.containers.create(spec, request.request_id))

    def _encode(self, container: Container) -> pb.Container:
        try:
            network = self._core.backend.facts_of_network(container.handle)
            pid = self._core.backend.pid(container.handle)
            agent: AgentFacts | None = self._core.backend.agent(container.handle)
        except GardenError:  # being made, being destroyed, or broken: nothing of it is up
            network, pid, agent = NetworkFacts(), 0, None
        image = self._core.containers.used_image(container.handle)
        grace_time_s = self._core.containers.expiry.grace_time_s(container)
        return convert.container_to(container, network, pid, agent, image, grace_time_s)

    async def GetContainer(self, request: pb.GetContainerRequest, context: Context) -> pb.Container:
        """See the proto."""
        return self._encode(self._core.containers.get_or_fetching(request.handle))

    async def ListContainers(
        self, request: pb.ListContainersRequest, context: Context
    ) -> pb.ListContainersResponse:
        """See the proto."""
        if request.page_size > PAGE_MAX:
            raise InvalidField("page_size", f"is {request.page_size}; at most {PAGE_MAX}")
        limit = request.page_size or PAGE_MAX
        found = self._core.containers.list_containers(
            request.properties, all_states=request.all_states, after=request.page_token, limit=limit + 1
        )
        page = found[:limit]
        return pb.ListContainersResponse(
            containers=[self._encode(container) for container in page],
            next_page_token=page[-1].handle if len(found) > limit else "",
        )

    async def StopContainer(
        self, request: pb.StopContainerRequest, context: Context
    ) -> pb.StopContainerResponse:
        """See the proto."""
        grace = {"grace_s": convert.seconds(request.grace)} if request.HasField("grace") else {}
        if grace and not 0 <= grace["grace_s"] <= 3600:
            raise InvalidField("grace", "must be 0 to 3600 seconds")
        await self._core.containers.stop(request.handle, kill=request.kill, **grace)
        return pb.StopContainerResponse()

    async def DestroyContainer(
        self, request: pb.DestroyContainerRequest, context: Context
    ) -> pb.DestroyContainerResponse:
        """See the proto."""
        await self._core.containers.destroy(request.handle)
        return pb.DestroyContainerResponse()

    async def DiagnoseContainer(
        self, request: pb.DiagnoseContainerRequest, context: Context
    ) -> AsyncIterator[pb.DiagnoseContainerResponse]:
        """See the proto."""
        async with aclosing(self._core.diagnosis.collect(request.handle)) as pieces:
            async for data in pieces:
                for begin in range(0, len(data), CHUNK_BYTES):
                    yield pb.DiagnoseContainerResponse(data=data[begin : begin + CHUNK_BYTES])

    async def SetGraceTime(
        self, request: pb.SetGraceTimeRequest, context: Context
    ) -> pb.SetGraceTimeResponse:
        """See the proto."""
        self._core.containers.set_grace_time(request.handle, convert.seconds(request.grace_time))
        return pb.SetGraceTimeResponse()

    async def UpdateProperties(
        self, request: pb.UpdatePropertiesRequest, context: Context
    ) -> pb.UpdatePropertiesResponse:
        """See the proto."""
        properties = self._core.containers.update_properties(
            request.handle, request.set, list(request.remove)
        )
        return pb.UpdatePropertiesResponse(properties=properties)

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        """See the proto."""
        response = pb.GetMetricsResponse()
        await self._core.recovery.wait_for_many(
            [*request.handles, *(name.handle for name in request.processes)]
        )
        found: dict[str, Usage | GardenError] = {}
        if request.handles or not request.processes:
            found = await self._core.containers.usage(list(request.handles))
        for handle, usage in found.items():
            response.metrics.append(self._metrics_of(handle, usage))
        for name in request.processes:
            response.metrics.append(await self._metrics_of_process(name.handle, name.process_id))
        return response

    def _metrics_of(self, handle: str, usage: Usage | GardenError) -> pb.ContainerMetrics:
        container = self._core.registry.find(handle)
        if isinstance(usage, GardenError):
            return pb.ContainerMetrics(handle=handle, error=str(usage))
        if container is None:  # it has gone while others were measured
            return pb.ContainerMetrics(handle=handle, error=str(ContainerNotFound(handle)))
        return convert.metrics_to(handle, usage, container.created_ns)

    async def _metrics_of_process(self, handle: str, process_id: str) -> pb.ContainerMetrics:
        try:
            usage = await self._core.containers.usage_of_process(handle, process_id)
            started_ns = self._core.processes.get(handle, process_id).started_ns
        except GardenError as error:
            return pb.ContainerMetrics(handle=handle, process_id=process_id, error=str(error))
        return convert.metrics_to(handle, usage, started_ns, process_id)

    async def GetLimits(self, request: pb.GetLimitsRequest, context: Context) -> pb.Limits:
        """See the proto."""
        return convert.limits_to(await self._core.containers.limits(request.handle, request.process_id))

    async def UpdateLimits(self, request: pb.UpdateLimitsRequest, context: Context) -> pb.Limits:
        """See the proto."""
        wanted = convert.limits_from(request.limits)
        limits = await self._core.containers.update_limits(request.handle, wanted, request.process_id)
        return convert.limits_to(limits)

    async def MapPort(self, request: pb.MapPortRequest, context: Context) -> pb.PortMapping:
        """See the proto."""
        mapping = convert.mapping_from(request.mapping, "mapping")
        return convert.mapping_to(await self._core.containers.map_port(request.handle, mapping))

    async def GetEgress(self, request: pb.GetEgressRequest, context: Context) -> pb.EgressPolicy:
        """See the proto."""
        policy, counts = await self._core.containers.egress(request.handle)
        etag = self._core.containers.egress_etag(request.handle)
        return convert.policy_to(policy, counts, etag=etag)

    async def SetEgress(self, request: pb.SetEgressRequest, context: Context) -> pb.EgressPolicy:
        """See the proto."""
        policy = convert.policy_from(request.policy, self._core.default_egress, "policy")
        cut = convert.cuts(request.established)
        policy = await self._core.containers.set_egress(request.handle, policy, request.policy.etag, cut=cut)
        return convert.policy_to(policy, etag=self._core.containers.egress_etag(request.handle))

    async def ExplainEgress(
        self, request: pb.ExplainEgressRequest, context: Context
    ) -> pb.ExplainEgressResponse:
        """See the proto."""
        destination = convert.destination_from(request)
        decision, policy = await self._core.containers.explain_egress(request.handle, destination)
        return convert.decision_to(decision, policy)

    # --- files

    async def StreamIn(
        self, request_iterator: AsyncIterator[pb.StreamInRequest], context: Context
    ) -> pb.StreamInResponse:
        """See the proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "target":
            raise InvalidField("target", "must be the first message of the stream")

        async def chunks() -> AsyncIterator[bytes]:
            async for message in request_iterator:
                if message.WhichOneof("message") != "data":
                    raise InvalidField("data", "every message after the first must be data")
                yield message.data

        target = first.target
        name_container(target.handle)
        await self._core.recovery.wait_for(target.handle)
        await self._core.files.stream_in(target.handle, target.path, target.user, chunks())
        return pb.StreamInResponse()

    async def StreamOut(self, request: pb.StreamOutRequest, context: Context) -> AsyncIterator[Encoded]:
        """See the proto."""
        async with aclosing(
            self._core.files.stream_out(request.handle, request.path, request.user)
        ) as chunks:
            async for data in chunks:
                yield encode_stream_out(data)

    # --- processes

    async def RunProcess(
        self, request_iterator: AsyncIterator[pb.RunProcessRequest], context: Context
    ) -> AsyncIterator[pb.ProcessEvent | Encoded]:
        """See the proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidField("start", "must be the first message of the stream")
        start = first.start
        name_container(start.handle)
        await self._core.recovery.wait_for(start.handle)
        with self._core.processes.use(start.handle):
            process = await self._core.processes.start(
                start.handle, convert.process_spec_from(start.spec), start.request_id
            )
            beginning: dict[OutputStream, int | None] = {OutputStream.STDOUT: 0, OutputStream.STDERR: 0}
            feed = ProcessFeed(process, beginning, self._core.metrics)
            yield pb.ProcessEvent(started=convert.process_to(start.handle, process))
            async for event in self._converse(process, feed, _inputs(request_iterator)):
                yield event

    async def AttachProcess(
        self, request_iterator: AsyncIterator[pb.AttachProcessRequest], context: Context
    ) -> AsyncIterator[pb.ProcessEvent | Encoded]:
        """See the proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "attach":
            raise InvalidField("attach", "must be the first message of the stream")
        attach = first.attach
        name_container(attach.handle)
        await self._core.recovery.wait_for(attach.handle)
        with self._core.processes.use(attach.handle):
            process = self._core.processes.get(attach.handle, attach.process_id)
            offsets = {
                OutputStream.STDOUT: attach.stdout_offset if attach.HasField("stdout_offset") else None,
                OutputStream.STDERR: attach.stderr_offset if attach.HasField("stderr_offset") else None,
            }
            feed = ProcessFeed(process, offsets, self._core.metrics)
            yield pb.ProcessEvent(started=convert.process_to(attach.handle, process))
            async for event in self._converse(process, feed, _inputs(request_iterator)):
                yield event

    async def _converse(
        self, process: RunningProcess, feed: ProcessFeed, inputs: AsyncIterator[pb.ProcessInput | None]
    ) -> AsyncIterator[pb.ProcessEvent | Encoded]:
        """Output to the client while its input is applied; bad input ends the stream with its error."""
        feeding = asyncio.ensure_future(feed_input(process, inputs, feed.fail, self._core.metrics))
        try:
            async with aclosing(feed.events()) as events:
                async for event in events:
                    yield event
        finally:
            feed.close()
            feeding.cancel()
            await asyncio.wait([feeding])

    async def StartProcess(self, request: pb.StartProcessRequest, context: Context) -> pb.Process:
        """See the proto."""
        spec = convert.process_spec_from(request.spec)
        process = await self._core.processes.start(request.handle, spec, request.request_id)
        return convert.process_to(request.handle, process)

    async def ReadOutput(self, request: pb.ReadOutputRequest, context: Context) -> AsyncIterator[Encoded]:
        """See the proto."""
        stream = convert.stream_from(request.stream)
        with self._core.processes.use(request.handle):
            process = self._core.processes.get(request.handle, request.process_id)
            async with aclosing(read_chunks(process.output(stream), request, self._core.metrics)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def SignalProcess(
        self, request: pb.SignalProcessRequest, context: Context
    ) -> pb.SignalProcessResponse:
        """See the proto."""
        number, group = convert.signal_from(request.signal)
        delivered = await self._core.processes.signal(request.handle, request.process_id, number, group=group)
        return pb.SignalProcessResponse(delivered=delivered)

    async def WaitProcess(self, request: pb.WaitProcessRequest, context: Context) -> pb.WaitProcessResponse:
        """See the proto."""
        timeout_s = convert.seconds(request.timeout) if request.HasField("timeout") else None
        status = await self._core.processes.wait(request.handle, request.process_id, timeout_s)
        return pb.WaitProcessResponse(exit=None if status is None else convert.exit_to(status))

    async def ListProcesses(
        self, request: pb.ListProcessesRequest, context: Context
    ) -> pb.ListProcessesResponse:
        """See the proto."""
        found = self._core.processes.list_processes(request.handle)
        return pb.ListProcessesResponse(processes=[convert.process_to(request.handle, p) for p in found])


async def _inputs(
    messages: AsyncIterator[pb.RunProcessRequest] | AsyncIterator[pb.AttachProcessRequest],
) -> AsyncIterator[pb.ProcessInput | None]:
    async for message in messages:
        yield message.input if message.WhichOneof("message") == "input" else None
