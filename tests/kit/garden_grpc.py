"""The client interface of kit/garden_http.py over the gRPC stubs: what both doors promise is tested by the same bodies.

Specs come in the Garden protocol's words, since the tests speak them; what gRPC has no word for is an error here, and a
test that needs it bears the mark `garden_only`.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client.errors import error_from_rpc
from kit.garden_http import TIMEOUT_S, GardenClientBase, GardenHttpError, ProcessBase

_CHUNK_BYTES = 1 << 20
_SIGNALS = {0: 15, 1: 9}
_DISK_SCOPES = {0: pb.Limits.TOTAL, 1: pb.Limits.EXCLUSIVE}
_TYPES = {
    "EXECUTABLE_NOT_FOUND": "ExecutableNotFoundError",
    "PROCESS_NOT_FOUND": "ProcessNotFoundError",
    "CONTAINER_NOT_FOUND": "ContainerNotFoundError",
}


def as_garden_error(failure: Any) -> GardenHttpError:
    """A failed call as the Garden door would tell it, but for the status."""
    error = error_from_rpc(failure)
    told = {"Type": _TYPES.get(error.code, ""), "Message": error.message}
    for key, name in (("handle", "Handle"), ("process_id", "ProcessID")):
        told[name] = error.metadata.get(key, "")
    return GardenHttpError(0, told)


class GrpcGarden(GardenClientBase):
    """Calls to one server; close it."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self.stub = garden_pb2_grpc.GardenStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def ask(self, name: str, request: Any) -> Any:
        """A unary call by its name."""
        try:
            return getattr(self.stub, name)(request, timeout=TIMEOUT_S)
        except grpc.RpcError as failure:
            raise as_garden_error(failure) from failure

    # --- containers

    def create(self, **spec: Any) -> str:
        grace_ns, limits = spec.pop("grace_time", None), spec.pop("limits", {})
        image = spec.pop("image", {})
        netin, rules = spec.pop("netin", ()), spec.pop("netout_rules", ())
        found = pb.ContainerSpec(
            bind_mounts=[bind_mount(**mount) for mount in spec.pop("bind_mounts", ())],
            port_mappings=[pb.PortMapping(**mapping) for mapping in netin],
            **spec,
        )
        if rules:
            found.egress.rules.extend(egress_rule(**rule) for rule in rules)
        if image:
            found.image = image.get("uri", "")
            if (auth := auth_of(image)) is not None:
                found.image_auth.CopyFrom(auth)
        if grace_ns is not None:
            found.grace_time.FromNanoseconds(grace_ns)
        if limits:
            found.limits.CopyFrom(limits_of(**limits))
        return str(self.ask("CreateContainer", pb.CreateContainerRequest(spec=found)).handle)

    def destroy(self, handle: str) -> None:
        self.ask("DestroyContainer", pb.DestroyContainerRequest(handle=handle))

    def list(self) -> list[str]:
        return [each.handle for each in self.ask("ListContainers", pb.ListContainersRequest()).containers]

    def info(self, handle: str) -> dict[str, Any]:
        found = self.ask("GetContainer", pb.GetContainerRequest(handle=handle))
        return {
            "State": pb.ContainerState.Name(found.state).lower(),
            "Events": list(found.events),
            "ContainerIP": found.container_ip,
            "ContainerIPv6": found.container_ipv6,
            "HostIP": found.host_ip,
            "ExternalIP": found.external_ip,
            "Properties": dict(found.spec.properties),
            "MappedPorts": [
                {"HostPort": each.host_port, "ContainerPort": each.container_port}
                for each in found.mapped_ports
            ],
        }

    def stop(self, handle: str, *, kill: bool) -> None:
        self.ask("StopContainer", pb.StopContainerRequest(handle=handle, kill=kill))

    def memory_limit(self, handle: str) -> int:
        return int(self.ask("GetLimits", pb.GetLimitsRequest(handle=handle)).memory_bytes)

    def metrics(self, handle: str) -> dict[str, Any]:
        (found,) = self.ask("GetMetrics", pb.GetMetricsRequest(handles=[handle])).metrics
        return {
            "MemoryStat": {"TotalUsageTowardLimit": found.memory_working_set_bytes},
            "PidStat": {"Current": found.pids, "Max": found.pids_limit},
            "Age": found.age.ToNanoseconds(),
            "CPUStat": {"Usage": found.cpu_usage_ns},
            "DiskStat": {
                "ExclusiveBytesUsed": found.disk_exclusive_bytes,
                "TotalBytesUsed": found.disk_total_bytes,
            },
        }

    def map_port(self, handle: str, container_port: int) -> tuple[int, int]:
        wanted = pb.PortMapping(container_port=container_port)
        found = self.ask("MapPort", pb.MapPortRequest(handle=handle, mapping=wanted))
        return found.host_port, found.container_port

    def net_out(self, handle: str, *rules: dict[str, Any]) -> None:
        policy = self.ask("GetEgress", pb.GetEgressRequest(handle=handle))
        policy.rules.extend(egress_rule(**rule) for rule in rules)
        self.ask("SetEgress", pb.SetEgressRequest(handle=handle, policy=policy))

    # --- files

    def stream_in(self, handle: str, tar: bytes, *, user: str, destination: str) -> None:
        def messages() -> Iterator[pb.StreamInRequest]:
            target = pb.StreamInRequest.Target(handle=handle, path=destination, user=user)
            yield pb.StreamInRequest(target=target)
            for start in range(0, len(tar), _CHUNK_BYTES):
                yield pb.StreamInRequest(data=tar[start : start + _CHUNK_BYTES])

        self.ask("StreamIn", messages())

    def stream_out(self, handle: str, *, user: str, source: str) -> bytes:
        request, packed = pb.StreamOutRequest(handle=handle, path=source, user=user), io.BytesIO()
        try:
            for answer in self.stub.StreamOut(request, timeout=TIMEOUT_S):
                packed.write(answer.data)
        except grpc.RpcError as failure:
            raise as_garden_error(failure) from failure
        return packed.getvalue()

    # --- processes

    def run(
        self, handle: str, path: str, *args: str, sides: tuple[str, ...] = ("stdout", "stderr"), **spec: Any
    ) -> GrpcProcess:
        tty, image, limits = spec.pop("tty", None), spec.pop("image", {}), spec.pop("limits", None)
        mounts = [bind_mount(**mount) for mount in spec.pop("bind_mounts", ())]
        found = pb.ProcessSpec(path=path, args=args, **spec)
        if image:
            found.sidecar.CopyFrom(
                pb.Sidecar(
                    image=image["uri"],
                    bind_mounts=mounts,
                    own_limits=limits is not None,
                    image_auth=auth_of(image),
                )
            )
        if limits:
            found.limits.CopyFrom(limits_of(**limits))
        if tty is not None:
            found.tty.CopyFrom(pb.Tty(**tty.get("window_size", {})))
        start = pb.RunProcessRequest.Start(handle=handle, spec=found)
        return GrpcProcess(
            self.stub.RunProcess,
            pb.RunProcessRequest(start=start),
            lambda message: pb.RunProcessRequest(input=message),
        )

    def attach(self, handle: str, process_id: str) -> GrpcProcess:
        attach = pb.AttachProcessRequest.Attach(handle=handle, process_id=process_id)
        return GrpcProcess(
            self.stub.AttachProcess,
            pb.AttachProcessRequest(attach=attach),
            lambda message: pb.AttachProcessRequest(input=message),
        )


class GrpcProcess(ProcessBase):
    """A Run or Attach. Its events are read in the background, so nobody need read them."""

    def __init__(self, method: Any, first: Any, wrap: Any) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._messages.put(first)
        self._wrap = wrap
        self._output = {pb.STDOUT: bytearray(), pb.STDERR: bytearray()}
        self._started, self._exit = threading.Event(), pb.ExitStatus()
        self._failure: GardenHttpError | None = None
        self._call = method(iter(self._messages.get, None))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._started.wait(TIMEOUT_S), "it neither started nor failed"
        if self._failure is not None:
            raise self._failure

    def _read(self) -> None:
        try:
            for event in self._call:
                match event.WhichOneof("event"):
                    case "started":
                        self.id = event.started.id
                        self._started.set()
                    case "output":
                        self._output[event.output.stream] += event.output.data
                    case "exited":
                        self._exit = event.exited
        except grpc.RpcError as failure:
            self._failure = as_garden_error(failure)
        finally:
            self._started.set()
            self._messages.put(None)

    def send(self, **message: Any) -> None:
        match message:
            case {"source": 0, "data": text}:
                found = pb.ProcessInput(stdin=pb.Stdin(data=text.encode()))
            case {"source": 0}:
                found = pb.ProcessInput(stdin=pb.Stdin(close=True))
            case {"tty": {"window_size": size}}:
                found = pb.ProcessInput(window=pb.Tty(**size))
            case {"signal": number}:
                found = pb.ProcessInput(signal=pb.Signal(number=_SIGNALS[number]))
            case _:
                raise AssertionError(f"no message of gRPC's: {message}")
        self._messages.put(self._wrap(found))

    def wait(self) -> int:
        self._reader.join(TIMEOUT_S)
        assert not self._reader.is_alive(), "it does not end"
        if self._failure is not None:
            raise self._failure
        return self._exit.code if self._exit.WhichOneof("end") == "code" else 128 + self._exit.signal

    def read(self, name: str) -> bytes:
        return bytes(self._output[pb.STDOUT if name == "stdout" else pb.STDERR])


def bind_mount(src_path: str, dst_path: str, mode: int = 0) -> pb.BindMount:
    """A mount in gRPC's words; the modes have the same numbers."""
    return pb.BindMount(source=src_path, destination=dst_path, mode=mode)


def auth_of(image: dict[str, str]) -> pb.RegistryAuth | None:
    """User and password of a Garden image, if it has some."""
    if "username" not in image:
        return None
    return pb.RegistryAuth(username=image["username"], password=image["password"])


def egress_rule(
    protocol: int = 0,
    networks: Iterable[dict[str, str]] = (),
    ports: Iterable[dict[str, int]] = (),
    icmps: dict[str, int] | None = None,
    log: bool = False,
) -> pb.EgressRule:
    """A rule in gRPC's words; the protocols have the same numbers."""
    return pb.EgressRule(
        protocol=protocol,
        networks=[f"{network['start']}-{network['end']}" for network in networks],
        ports=[pb.PortRange(**each) for each in ports],
        icmp=None if icmps is None else pb.IcmpMatch(**icmps),
        log=log,
    )


def limits_of(
    memory_limits: dict[str, int] | None = None,
    pid_limits: dict[str, int] | None = None,
    disk_limits: dict[str, int] | None = None,
) -> pb.Limits:
    """Limits in gRPC's words."""
    found = pb.Limits()
    if memory_limits is not None:
        found.memory_bytes = memory_limits["limit_in_bytes"]
    if pid_limits is not None:
        found.pids = pid_limits["max"]
    if disk_limits is not None:
        found.disk_bytes = disk_limits["byte_hard"]
        found.disk_scope = _DISK_SCOPES[disk_limits.get("scope", 0)]
    return found
