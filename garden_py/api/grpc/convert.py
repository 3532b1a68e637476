"""Between messages of garden.v1 and the model's values. Field names in errors are those of the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from garden_py.api._pb import garden_pb2 as pb
from garden_py.model import netrule
from garden_py.model.age import age_ns
from garden_py.model.errors import InvalidField
from garden_py.model.files import BindMount, MountMode, MountOrigin
from garden_py.model.image import ImageConfig, ImageInfo, PullProgress, RegistryAuth, UsedImage
from garden_py.model.leak import LeakReport
from garden_py.model.lifecycle import State
from garden_py.model.limits import DiskScope, Limits
from garden_py.model.network import NetworkMode
from garden_py.model.process import ExitStatus, OutputStream, ProcessSpec, Sidecar, WindowSize, parse_signal
from garden_py.model.remember import is_short, remembered
from garden_py.model.spec import ContainerSpec, PortMapping, Transport
from garden_py.service.containers import egress_etag
from garden_py.service.events import Event
from garden_py.service.ports import AgentFacts, EgressCounts, NetworkFacts, RunningProcess, Usage
from garden_py.service.registry import Container

Message = TypeVar("Message")
Value = TypeVar("Value")
_NS = 1_000_000_000

# --- times


def timestamp(ns: int) -> Timestamp:
    """CLOCK_REALTIME in ns as a message."""
    return Timestamp(seconds=ns // _NS, nanos=ns % _NS)


def seconds(duration: Duration) -> float:
    """A duration message in seconds."""
    return duration.seconds + duration.nanos / _NS


def duration(value_s: float) -> Duration:
    """Seconds as a message."""
    whole = int(value_s)
    return Duration(seconds=whole, nanos=int((value_s - whole) * _NS))


# --- limits


_SCOPES = {pb.Limits.EXCLUSIVE: DiskScope.EXCLUSIVE, pb.Limits.TOTAL: DiskScope.TOTAL}
_SCOPES_OUT = {value: key for key, value in _SCOPES.items()}


def limits_from(message: pb.Limits) -> Limits:
    """Limits; unset fields are None."""
    return Limits(
        memory_bytes=message.memory_bytes if message.HasField("memory_bytes") else None,
        cpu_weight=message.cpu_weight if message.HasField("cpu_weight") else None,
        cpu_quota_us=message.cpu_quota_us if message.HasField("cpu_quota_us") else None,
        cpu_period_us=message.cpu_period_us if message.HasField("cpu_period_us") else None,
        pids=message.pids if message.HasField("pids") else None,
        disk_bytes=message.disk_bytes if message.HasField("disk_bytes") else None,
        disk_inodes=message.disk_inodes if message.HasField("disk_inodes") else None,
        network_rx_bytes_per_s=(
            message.network_rx_bytes_per_s if message.HasField("network_rx_bytes_per_s") else None
        ),
        network_tx_bytes_per_s=(
            message.network_tx_bytes_per_s if message.HasField("network_tx_bytes_per_s") else None
        ),
        network_burst_bytes=message.network_burst_bytes if message.HasField("network_burst_bytes") else None,
        disk_scope=_scope_from(message.disk_scope) if message.HasField("disk_scope") else None,
        io_weight=message.io_weight if message.HasField("io_weight") else None,
        io_read_bytes_per_s=message.io_read_bytes_per_s if message.HasField("io_read_bytes_per_s") else None,
        io_write_bytes_per_s=message.io_write_bytes_per_s
        if message.HasField("io_write_bytes_per_s")
        else None,
        io_read_ops_per_s=message.io_read_ops_per_s if message.HasField("io_read_ops_per_s") else None,
        io_write_ops_per_s=message.io_write_ops_per_s if message.HasField("io_write_ops_per_s") else None,
        rlimits=tuple(sorted(message.rlimits.items())),
        swap_bytes=message.swap_bytes if message.HasField("swap_bytes") else None,
    )


def _scope_from(value: pb.Limits.DiskScope.ValueType) -> DiskScope:
    if value not in _SCOPES:
        raise InvalidField("limits.disk_scope", f"unknown value {value}")
    return _SCOPES[value]


def limits_to(limits: Limits) -> pb.Limits:
    """Limits as a message; None is unset."""
    return pb.Limits(
        memory_bytes=limits.memory_bytes,
        cpu_weight=limits.cpu_weight,
        cpu_quota_us=limits.cpu_quota_us,
        cpu_period_us=limits.cpu_period_us,
        pids=limits.pids,
        disk_bytes=limits.disk_bytes,
        disk_inodes=limits.disk_inodes,
        network_rx_bytes_per_s=limits.network_rx_bytes_per_s,
        network_tx_bytes_per_s=limits.network_tx_bytes_per_s,
        network_burst_bytes=limits.network_burst_bytes,
        disk_scope=None if limits.disk_scope is None else _SCOPES_OUT[limits.disk_scope],
        io_weight=limits.io_weight,
        io_read_bytes_per_s=limits.io_read_bytes_per_s,
        io_write_bytes_per_s=limits.io_write_bytes_per_s,
        io_read_ops_per_s=limits.io_read_ops_per_s,
        io_write_ops_per_s=limits.io_write_ops_per_s,
        rlimits=dict(limits.rlimits),
        swap_bytes=limits.swap_bytes,
    )


# --- network

_PROTOCOLS = {
    pb.EgressRule.ALL: netrule.Protocol.ALL,
    pb.EgressRule.TCP: netrule.Protocol.TCP,
    pb.EgressRule.UDP: netrule.Protocol.UDP,
    pb.EgressRule.ICMP: netrule.Protocol.ICMP,
}
_PROTOCOLS_OUT = {value: key for key, value in _PROTOCOLS.items()}
_RULE_ACTIONS = {
    pb.EgressPolicy.ACTION_UNSPECIFIED: netrule.RuleAction.ALLOW,
    pb.EgressPolicy.ALLOW: netrule.RuleAction.ALLOW,
    pb.EgressPolicy.DENY: netrule.RuleAction.DENY,
}
_RULE_ACTIONS_OUT = {
    netrule.RuleAction.ALLOW: pb.EgressPolicy.ALLOW,
    netrule.RuleAction.DENY: pb.EgressPolicy.DENY,
}
_TRANSPORTS = {pb.PortMapping.TCP: Transport.TCP, pb.PortMapping.UDP: Transport.UDP}
_TRANSPORTS_OUT = {value: key for key, value in _TRANSPORTS.items()}


def mapping_from(message: pb.PortMapping, field: str) -> PortMapping:
    """A port mapping."""
    if message.protocol not in _TRANSPORTS:
        raise InvalidField(f"{field}.protocol", f"unknown value {message.protocol}")
    return PortMapping(message.host_port, message.container_port, _TRANSPORTS[message.protocol])


def mapping_to(mapping: PortMapping) -> pb.PortMapping:
    """A port mapping as a message."""
    return pb.PortMapping(
        host_port=mapping.host_port,
        container_port=mapping.container_port,
        protocol=_TRANSPORTS_OUT[mapping.transport],
    )


def policy_from(message: pb.EgressPolicy, default: netrule.DefaultAction, field: str) -> netrule.EgressPolicy:
    """An egress policy; an unspecified default action is the server's.

    Raises:
        InvalidField: naming the rule and its field below `field`.
    """
    match message.default_action:
        case pb.EgressPolicy.ACTION_UNSPECIFIED:
            action = default
        case pb.EgressPolicy.ALLOW:
            action = netrule.DefaultAction.ALLOW
        case pb.EgressPolicy.DENY:
            action = netrule.DefaultAction.DENY
        case unknown:
            raise InvalidField(f"{field}.default_action", f"unknown value {unknown}")
    with netrule.at_field(field):
        return netrule.EgressPolicy(action, _each_from(message.rules, "rules", _known_rule_from))


def _each_from(
    messages: Iterable[Message], field: str, convert: Callable[[Message], Value]
) -> tuple[Value, ...]:
    """All of a repeated field; an InvalidField says which one it is about."""
    values: list[Value] = []
    try:
        for message in messages:
            values.append(convert(message))
    except InvalidField as error:
        raise InvalidField(f"{field}[{len(values)}].{error.field}", error.problem) from error
    return tuple(values)


def _known_rule_from(message: pb.EgressRule) -> netrule.EgressRule:
    return _unpack_rule(message.SerializeToString())


@remembered(is_short)
def _unpack_rule(packed: bytes) -> netrule.EgressRule:
    return _rule_from(pb.EgressRule.FromString(packed))


def _rule_from(message: pb.EgressRule) -> netrule.EgressRule:
    if message.protocol not in _PROTOCOLS:
        raise InvalidField("protocol", f"unknown value {message.protocol}")
    if message.action not in _RULE_ACTIONS:
        raise InvalidField("action", f"unknown value {message.action}")
    networks = _each_from(message.networks, "networks", netrule.AddressRange.parse)
    ports = _each_from(message.ports, "ports", _ports_from)
    icmp = None
    if message.HasField("icmp"):
        code = message.icmp.code if message.icmp.HasField("code") else None
        with netrule.at_field("icmp"):
            icmp = netrule.IcmpMatch(message.icmp.type, code)
    return netrule.EgressRule(
        protocol=_PROTOCOLS[message.protocol],
        networks=networks,
        ports=ports,
        icmp=icmp,
        log=message.log,
        action=_RULE_ACTIONS[message.action],
    )


def _ports_from(message: pb.PortRange) -> netrule.PortRange:
    start = message.start
    return netrule.PortRange(start, message.end or start)


def cuts(established: int) -> bool:
    """Whether SetEgress ends connections that the new policy does not allow."""
    if established not in (pb.SetEgressRequest.KEEP, pb.SetEgressRequest.CUT):
        raise InvalidField("established", f"unknown value {established}")
    return established == pb.SetEgressRequest.CUT


def destination_from(message: pb.ExplainEgressRequest) -> netrule.Destination:
    """Where a connection would go.

    Raises:
        InvalidField: naming the field.
    """
    if message.protocol not in _PROTOCOLS:
        raise InvalidField("protocol", f"unknown value {message.protocol}")
    protocol = _PROTOCOLS[message.protocol]
    try:
        address = netrule.parse_address(message.address)
    except ValueError as error:
        raise InvalidField("address", str(error)) from error
    icmp = None
    if protocol is netrule.Protocol.ICMP or message.HasField("icmp"):
        echo = 8 if address.version == 4 else 128  # RFC 792, RFC 4443
        asked = message.icmp if message.HasField("icmp") else pb.IcmpMatch(type=echo)
        with netrule.at_field("icmp"):
            icmp = netrule.IcmpMatch(asked.type, asked.code)
    return netrule.Destination(protocol, address, message.port or None, icmp)


def decision_to(decision: netrule.Decision, policy: netrule.EgressPolicy) -> pb.ExplainEgressResponse:
    """What would become of a connection, as a message."""
    allowed = decision.action is netrule.RuleAction.ALLOW
    message = pb.ExplainEgressResponse(
        action=pb.EgressPolicy.ALLOW if allowed else pb.EgressPolicy.DENY,
        cause=pb.ExplainEgressResponse.Cause.Value(decision.cause.name),
    )
    if decision.rule is not None:
        message.rule_number = decision.rule + 1
        message.rule.CopyFrom(_rule_to(policy.rules[decision.rule]))
    return message


def policy_to(
    policy: netrule.EgressPolicy, counts: EgressCounts | None = None, *, etag: str = ""
) -> pb.EgressPolicy:
    """An egress policy as a message, with counts where there are any."""
    default_allow = policy.default_action is netrule.DefaultAction.ALLOW
    message = pb.EgressPolicy(
        default_action=pb.EgressPolicy.ALLOW if default_allow else pb.EgressPolicy.DENY,
        etag=etag or egress_etag(policy),
    )
    for each in policy.rules:
        message.rules.add().MergeFromString(_pack_rule(each))
    if counts is not None:
        message.default_packets, message.default_bytes = counts.default.packets, counts.default.bytes
        message.denied_network_packets = counts.denied_network.packets
        message.denied_network_bytes = counts.denied_network.bytes
        for rule, count in zip(message.rules, counts.rules, strict=True):
            rule.packets, rule.bytes = count.packets, count.bytes
    return message


@remembered(lambda rule: rule.is_short)
def _pack_rule(rule: netrule.EgressRule) -> bytes:
    return _rule_to(rule).SerializeToString()


def _rule_to(rule: netrule.EgressRule) -> pb.EgressRule:
    message = pb.EgressRule()
    message.action = _RULE_ACTIONS_OUT[rule.action]
    message.protocol = _PROTOCOLS_OUT[rule.protocol]
    message.networks.extend(map(str, rule.networks))
    for port in rule.ports:
        message.ports.add(start=port.start, end=port.end)
    message.log = rule.log
    if rule.icmp is not None:
        message.icmp.CopyFrom(pb.IcmpMatch(type=rule.icmp.type, code=rule.icmp.code))
    return message


# --- containers

_STATES = {
    State.CREATING: pb.CREATING,
    State.ACTIVE: pb.ACTIVE,
    State.STOPPED: pb.STOPPED,
    State.BROKEN: pb.BROKEN,
    State.DESTROYING: pb.DESTROYING,
    State.UNKILLABLE: pb.UNKILLABLE,
}
_NETWORK_MODES = {pb.OWN: NetworkMode.OWN, pb.NONE: NetworkMode.NONE, pb.HOST: NetworkMode.HOST}
_NETWORK_MODES_OUT = {value: key for key, value in _NETWORK_MODES.items()}
_MODES = {pb.BindMount.READ_ONLY: MountMode.READ_ONLY, pb.BindMount.READ_WRITE: MountMode.READ_WRITE}
_MODES_OUT = {value: key for key, value in _MODES.items()}
_ORIGINS = {pb.BindMount.HOST: MountOrigin.HOST, pb.BindMount.CONTAINER: MountOrigin.CONTAINER}
_ORIGINS_OUT = {value: key for key, value in _ORIGINS.items()}


def container_spec_from(message: pb.ContainerSpec, default_egress: netrule.DefaultAction) -> ContainerSpec:
    """A container spec."""
    egress = (
        policy_from(message.egress, default_egress, "spec.egress") if message.HasField("egress") else None
    )
    if message.network_mode not in _NETWORK_MODES:
        raise InvalidField("spec.network_mode", f"unknown value {message.network_mode}")
    return ContainerSpec(
        handle=message.handle,
        network_mode=_NETWORK_MODES[message.network_mode],
        subnet=message.subnet,
        image=message.image,
        privileged=message.privileged,
        env=tuple(message.env),
        properties=tuple(sorted(message.properties.items())),
        bind_mounts=_mounts_from(message.bind_mounts, "spec.bind_mounts"),
        limits=limits_from(message.limits),
        grace_time_s=seconds(message.grace_time) if message.HasField("grace_time") else None,
        port_mappings=tuple(
            mapping_from(m, f"spec.port_mappings[{i}]") for i, m in enumerate(message.port_mappings)
        ),
        egress=egress,
        hostname=message.hostname,
        image_auth=auth_from(message.image_auth) if message.HasField("image_auth") else None,
    )


def auth_from(message: pb.RegistryAuth) -> RegistryAuth:
    """A user and password at a registry."""
    return RegistryAuth(message.username, message.password)


def _mounts_from(messages: Iterable[pb.BindMount], field: str) -> tuple[BindMount, ...]:
    mounts = []
    for i, mount in enumerate(messages):
        if mount.mode not in _MODES:
            raise InvalidField(f"{field}[{i}].mode", f"unknown value {mount.mode}")
        if mount.origin not in _ORIGINS:
            raise InvalidField(f"{field}[{i}].origin", f"unknown value {mount.origin}")
        mounts.append(BindMount(mount.source, mount.destination, _MODES[mount.mode], _ORIGINS[mount.origin]))
    return tuple(mounts)


def _mounts_to(mounts: Iterable[BindMount]) -> list[pb.BindMount]:
    return [
        pb.BindMount(
            source=m.source, destination=m.destination, mode=_MODES_OUT[m.mode], origin=_ORIGINS_OUT[m.origin]
        )
        for m in mounts
    ]


def container_to(
    container: Container,
    network: NetworkFacts,
    pid: int,
    agent: AgentFacts | None,
    image: UsedImage | None,
    grace_time_s: float = 0.0,
) -> pb.Container:
    """A container as a message; grace_time_s: in force, the server's default if it states none."""
    message = pb.Container(
        handle=container.handle,
        state=_STATES[container.state],
        state_reason=container.state_reason or container.fetching,
        created_at=timestamp(container.created_ns),
        spec=_container_spec_to(container.spec),
        container_ip=network.container_ip,
        container_ipv6=network.container_ipv6,
        host_ip=network.host_ip,
        external_ip=network.external_ip,
        mapped_ports=[mapping_to(mapping) for mapping in network.mapped_ports],
        properties=dict(container.spec.properties),
        process_ids=list(container.processes),
        events=container.notable,
        pid=pid,
        agent=None if agent is None else _agent_to(agent),
        image=None if image is None else _used_image_to(image),
    )
    if grace_time_s:
        message.spec.grace_time.CopyFrom(duration(grace_time_s))
    return message


def _used_image_to(image: UsedImage) -> pb.UsedImage:
    return pb.UsedImage(id=image.id, name=image.name, config=_image_config_to(image.config))


def _image_config_to(config: ImageConfig) -> pb.ImageConfig:
    return pb.ImageConfig(
        env=config.env,
        user=config.user,
        working_dir=config.working_dir,
        entrypoint=config.entrypoint,
        cmd=config.cmd,
        labels=dict(config.labels),
    )


def image_to(image: ImageInfo) -> pb.Image:
    """An image of the store as a message."""
    return pb.Image(
        id=image.id,
        names=image.names,
        layers=[pb.ImageLayer(diff_id=layer.diff_id, bytes=layer.bytes) for layer in image.layers],
        config=_image_config_to(image.config),
        architecture=image.architecture,
        os=image.os,
        created=image.created,
        pulled_at=timestamp(image.pulled_ns),
        used_at=timestamp(image.used_ns),
        in_use=image.in_use,
        manifest_digest=image.manifest_digest,
        bytes=image.bytes,
    )


def progress_to(progress: PullProgress) -> pb.PullProgress:
    """How far a pull is, as a message."""
    return pb.PullProgress(
        phase=progress.phase,
        layers=progress.layers,
        layers_done=progress.layers_done,
        bytes=progress.bytes,
        bytes_done=progress.bytes_done,
    )


def _agent_to(agent: AgentFacts) -> pb.Agent:
    return pb.Agent(build=agent.build, wire_version=agent.wire, current=agent.current, problem=agent.problem)


def _container_spec_to(spec: ContainerSpec) -> pb.ContainerSpec:
    message = pb.ContainerSpec(
        handle=spec.handle,
        image=spec.image,
        privileged=spec.privileged,
        env=[f"{entry.partition('=')[0]}=" for entry in spec.env],
        properties=dict(spec.properties),
        bind_mounts=_mounts_to(spec.bind_mounts),
        limits=limits_to(spec.limits),
        port_mappings=[mapping_to(mapping) for mapping in spec.port_mappings],
        hostname=spec.hostname,
        network_mode=_NETWORK_MODES_OUT[spec.network_mode],
        subnet=spec.subnet,
    )
    if spec.grace_time_s is not None:
        message.grace_time.CopyFrom(duration(spec.grace_time_s))
    if spec.egress is not None:
        message.egress.CopyFrom(policy_to(spec.egress))
    return message


def metrics_to(handle: str, usage: Usage, since_ns: int, process_id: str = "") -> pb.ContainerMetrics:
    """The usage of a container, or of a process in it, as a message."""
    values = {name: getattr(usage, name) for name in Usage.__dataclass_fields__}
    age = duration(age_ns(since_ns) / 1e9)
    return pb.ContainerMetrics(handle=handle, process_id=process_id, age=age, **values)


# --- processes

_STREAMS = {pb.STDOUT: OutputStream.STDOUT, pb.STDERR: OutputStream.STDERR}
STREAMS_OUT = {value: key for key, value in _STREAMS.items()}


def stream_from(value: int) -> OutputStream:
    """Which output stream."""
    if value not in (pb.STDOUT, pb.STDERR):
        raise InvalidField("stream", f"unknown value {value}")
    return OutputStream.STDERR if value == pb.STDERR else OutputStream.STDOUT


def window_from(message: pb.Tty) -> WindowSize:
    """A terminal's size."""
    if message.rows > 0xFFFF or message.columns > 0xFFFF:
        raise InvalidField("window", "rows and columns must be 0 to 65535")
    return WindowSize(message.rows, message.columns)


def process_spec_from(message: pb.ProcessSpec) -> ProcessSpec:
    """A process spec."""
    return ProcessSpec(
        id=message.id,
        path=message.path,
        args=tuple(message.args),
        env=tuple(message.env),
        dir=message.dir,
        user=message.user,
        tty=window_from(message.tty) if message.HasField("tty") else None,
        rlimits=tuple(sorted(message.rlimits.items())),
        limits=limits_from(message.limits),
        output_retention_bytes=message.output_retention_bytes,
        sidecar=_sidecar_from(message.sidecar) if message.HasField("sidecar") else None,
        from_image=message.from_image,
    )


def _sidecar_from(message: pb.Sidecar) -> Sidecar:
    mounts = _mounts_from(message.bind_mounts, "spec.sidecar.bind_mounts")
    auth = auth_from(message.image_auth) if message.HasField("image_auth") else None
    return Sidecar(message.image, mounts, message.own_limits, auth)


def process_to(handle: str, process: RunningProcess) -> pb.Process:
    """A process as a message."""
    spec = process.spec
    stdout, stderr = process.output(OutputStream.STDOUT), process.output(OutputStream.STDERR)
    message = pb.Process(
        id=process.id,
        handle=handle,
        spec=pb.ProcessSpec(
            id=spec.id,
            path=spec.path,
            args=spec.args,
            env=[f"{entry.partition('=')[0]}=" for entry in spec.env],
            dir=spec.dir,
            user=spec.user,
            rlimits=dict(spec.rlimits),
            limits=limits_to(spec.limits),
            output_retention_bytes=spec.output_retention_bytes,
            from_image=spec.from_image,
        ),
        started_at=timestamp(process.started_ns),
        pid=process.pid,
        stdout_bytes=stdout.end_offset,
        stderr_bytes=stderr.end_offset,
        stdout_closed=stdout.closed,
        stderr_closed=stderr.closed,
        stdin_bytes=process.stdin_bytes,
    )
    if spec.tty is not None:
        message.spec.tty.CopyFrom(pb.Tty(rows=spec.tty.rows, columns=spec.tty.columns))
    if (sidecar := spec.sidecar) is not None:
        message.spec.sidecar.CopyFrom(
            pb.Sidecar(
                image=sidecar.image,
                bind_mounts=_mounts_to(sidecar.bind_mounts),
                own_limits=sidecar.own_limits,
            )
        )
    if process.exit is not None:
        message.exit.CopyFrom(exit_to(process.exit))
    return message


def exit_to(status: ExitStatus) -> pb.ExitStatus:
    """An exit status as a message."""
    message = pb.ExitStatus(
        out_of_memory=status.out_of_memory, exited_at=timestamp(status.exited_ns), reason=status.reason
    )
    if status.code is not None:
        message.code = status.code
    else:
        message.signal = status.signal or 0
    return message


def signal_from(message: pb.Signal) -> tuple[int, bool]:
    """(number, whole group).

    Raises:
        InvalidField: neither or both of number and name, or no such signal.
    """
    if bool(message.number) == bool(message.name):
        raise InvalidField("signal", "needs a number or a name")
    try:
        return parse_signal(message.name or str(message.number)), message.group
    except ValueError as error:
        raise InvalidField("signal.name" if message.name else "signal.number", str(error)) from error


def event_to(event: Event) -> pb.Event:
    """An event as a message."""
    message = pb.Event(
        cursor=event.cursor,
        at=timestamp(event.at_ns),
        kind=pb.Event.Kind.Value(event.kind.value),
        handle=event.handle,
        process_id=event.process_id,
        details=event.details,
    )
    if event.exit is not None:
        message.exit.CopyFrom(exit_to(event.exit))
    return message


def leak_to(report: LeakReport) -> pb.Leak:
    """A leak, and what was done about it, as a message."""
    leak = report.leak
    return pb.Leak(
        kind=pb.Leak.Kind.Value(leak.kind.name),
        direction=pb.Leak.Direction.Value(leak.direction.name),
        name=leak.name,
        handle=leak.handle,
        detail=leak.detail,
        removed=report.removed,
        kept_because=report.kept_because,
    )
