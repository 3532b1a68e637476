"""Values to messages (`*_to_pb`) and messages to values (`*_from_pb`): the only place that knows both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import values as v
from garden_py.client.image_values import auth_to_pb, used_image_from_pb
from garden_py.client.times import duration_to_pb, moment


def _env_to_pb(env: Mapping[str, str]) -> list[str]:
    for name in env:
        # The server would see another name, for it takes what is before the first equals sign.
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return [f"{name}={value}" for name, value in env.items()]


def _env_from_pb(entries: Iterable[str]) -> dict[str, str]:
    split = (entry.partition("=") for entry in entries)
    return {name: value for name, _, value in split}


def limits_to_pb(limits: v.Limits) -> pb.Limits:
    """Unset stays unset: the server tells "no statement" from 0."""
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
        disk_scope=None if limits.disk_scope is None else pb.Limits.DiskScope.ValueType(limits.disk_scope),
        io_weight=limits.io_weight,
        io_read_bytes_per_s=limits.io_read_bytes_per_s,
        io_write_bytes_per_s=limits.io_write_bytes_per_s,
        io_read_ops_per_s=limits.io_read_ops_per_s,
        io_write_ops_per_s=limits.io_write_ops_per_s,
        rlimits=limits.rlimits,
        swap_bytes=limits.swap_bytes,
    )


def limits_from_pb(message: pb.Limits) -> v.Limits:
    """Limits as the server states them."""
    return v.Limits(
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
        disk_scope=v.DiskScope(message.disk_scope) if message.HasField("disk_scope") else None,
        io_weight=message.io_weight if message.HasField("io_weight") else None,
        io_read_bytes_per_s=message.io_read_bytes_per_s if message.HasField("io_read_bytes_per_s") else None,
        io_write_bytes_per_s=message.io_write_bytes_per_s
        if message.HasField("io_write_bytes_per_s")
        else None,
        io_read_ops_per_s=message.io_read_ops_per_s if message.HasField("io_read_ops_per_s") else None,
        io_write_ops_per_s=message.io_write_ops_per_s if message.HasField("io_write_ops_per_s") else None,
        rlimits=dict(message.rlimits),
        swap_bytes=message.swap_bytes if message.HasField("swap_bytes") else None,
    )


def port_mapping_to_pb(mapping: v.PortMapping) -> pb.PortMapping:
    """One mapped port."""
    return pb.PortMapping(
        host_port=mapping.host_port,
        container_port=mapping.container_port,
        protocol=pb.PortMapping.Protocol.ValueType(mapping.protocol),
    )


def port_mapping_from_pb(message: pb.PortMapping) -> v.PortMapping:
    """One mapped port with both numbers filled in by the server."""
    return v.PortMapping(message.host_port, message.container_port, v.PortProtocol(message.protocol))


def _egress_rule_to_pb(rule: v.EgressRule) -> pb.EgressRule:
    return pb.EgressRule(
        action=pb.EgressPolicy.Action.ValueType(rule.action),
        protocol=pb.EgressRule.Protocol.ValueType(rule.protocol),
        networks=rule.networks,
        ports=[pb.PortRange(start=ports.start, end=ports.end) for ports in rule.ports],
        icmp=pb.IcmpMatch(type=rule.icmp.type, code=rule.icmp.code) if rule.icmp else None,
        log=rule.log,
    )


def _egress_rule_from_pb(message: pb.EgressRule) -> v.EgressRule:
    icmp = None
    if message.HasField("icmp"):
        icmp = v.IcmpMatch(message.icmp.type, message.icmp.code if message.icmp.HasField("code") else None)
    return v.EgressRule(
        action=v.EgressAction(message.action),
        protocol=v.EgressProtocol(message.protocol),
        networks=tuple(message.networks),
        ports=tuple(v.PortRange(ports.start, ports.end) for ports in message.ports),
        icmp=icmp,
        log=message.log,
        packets=message.packets,
        bytes=message.bytes,
    )


def egress_to_pb(policy: v.EgressPolicy) -> pb.EgressPolicy:
    """A policy to set; the counters are the server's and are not sent."""
    return pb.EgressPolicy(
        default_action=pb.EgressPolicy.Action.ValueType(policy.default_action),
        rules=[_egress_rule_to_pb(rule) for rule in policy.rules],
        etag=policy.etag,
    )


def egress_from_pb(message: pb.EgressPolicy) -> v.EgressPolicy:
    """The policy in force, with its counters."""
    return v.EgressPolicy(
        default_action=v.EgressAction(message.default_action),
        rules=tuple(_egress_rule_from_pb(rule) for rule in message.rules),
        etag=message.etag,
        default_packets=message.default_packets,
        default_bytes=message.default_bytes,
        denied_network_packets=message.denied_network_packets,
        denied_network_bytes=message.denied_network_bytes,
    )


def destination_to_pb(handle: str, destination: v.Destination) -> pb.ExplainEgressRequest:
    """A connection to ask about."""
    icmp = destination.icmp
    return pb.ExplainEgressRequest(
        handle=handle,
        protocol=pb.EgressRule.Protocol.ValueType(destination.protocol),
        address=destination.address,
        port=destination.port,
        icmp=None if icmp is None else pb.IcmpMatch(type=icmp.type, code=icmp.code),
    )


def decision_from_pb(message: pb.ExplainEgressResponse) -> v.EgressDecision:
    """What would become of it."""
    return v.EgressDecision(
        v.EgressAction(message.action),
        v.EgressCause(message.cause),
        message.rule_number,
        _egress_rule_from_pb(message.rule) if message.HasField("rule") else None,
    )


def container_spec_to_pb(spec: v.ContainerSpec) -> pb.ContainerSpec:
    """A container to create."""
    return pb.ContainerSpec(
        handle=spec.handle,
        image=spec.image,
        privileged=spec.privileged,
        env=_env_to_pb(spec.env),
        properties=spec.properties,
        bind_mounts=_mounts_to_pb(spec.bind_mounts),
        limits=limits_to_pb(spec.limits),
        grace_time=None if spec.grace_time is None else duration_to_pb(spec.grace_time),
        port_mappings=[port_mapping_to_pb(mapping) for mapping in spec.port_mappings],
        egress=None if spec.egress is None else egress_to_pb(spec.egress),
        hostname=spec.hostname,
        image_auth=auth_to_pb(spec.image_auth),
        network_mode=pb.NetworkMode.ValueType(spec.network_mode),
        subnet=spec.subnet,
    )


def _mounts_to_pb(mounts: Iterable[v.BindMount]) -> list[pb.BindMount]:
    return [
        pb.BindMount(
            source=mount.source,
            destination=mount.destination,
            mode=pb.BindMount.Mode.ValueType(mount.mode),
            origin=pb.BindMount.Origin.ValueType(mount.origin),
        )
        for mount in mounts
    ]


def _mounts_from_pb(messages: Iterable[pb.BindMount]) -> tuple[v.BindMount, ...]:
    return tuple(
        v.BindMount(each.source, each.destination, v.MountMode(each.mode), v.MountOrigin(each.origin))
        for each in messages
    )


def _container_spec_from_pb(message: pb.ContainerSpec) -> v.ContainerSpec:
    return v.ContainerSpec(
        handle=message.handle,
        image=message.image,
        privileged=message.privileged,
        env=_env_from_pb(message.env),
        properties=dict(message.properties),
        bind_mounts=_mounts_from_pb(message.bind_mounts),
        limits=limits_from_pb(message.limits),
        grace_time=message.grace_time.ToTimedelta() if message.HasField("grace_time") else None,
        port_mappings=tuple(port_mapping_from_pb(mapping) for mapping in message.port_mappings),
        egress=egress_from_pb(message.egress) if message.HasField("egress") else None,
        hostname=message.hostname,
        network_mode=v.NetworkMode(message.network_mode),
        subnet=message.subnet,
    )


def container_from_pb(message: pb.Container) -> v.ContainerInfo:
    """A container as the server describes it."""
    return v.ContainerInfo(
        handle=message.handle,
        state=v.ContainerState(message.state),
        state_reason=message.state_reason,
        created_at=moment(message.created_at, message.HasField("created_at")),
        spec=_container_spec_from_pb(message.spec),
        container_ip=message.container_ip,
        container_ipv6=message.container_ipv6,
        host_ip=message.host_ip,
        external_ip=message.external_ip,
        mapped_ports=tuple(port_mapping_from_pb(mapping) for mapping in message.mapped_ports),
        properties=dict(message.properties),
        process_ids=tuple(message.process_ids),
        events=tuple(message.events),
        pid=message.pid,
        agent=_agent_from_pb(message.agent) if message.HasField("agent") else None,
        image=used_image_from_pb(message.image) if message.HasField("image") else None,
    )


def _agent_from_pb(message: pb.Agent) -> v.AgentInfo:
    return v.AgentInfo(message.build, message.wire_version, message.current, message.problem)


def tty_to_pb(tty: v.Tty) -> pb.Tty:
    """A terminal size."""
    return pb.Tty(rows=tty.rows, columns=tty.columns)


def process_spec_to_pb(spec: v.ProcessSpec) -> pb.ProcessSpec:
    """A process to start."""
    return pb.ProcessSpec(
        id=spec.id,
        path=spec.path,
        args=spec.args,
        env=_env_to_pb(spec.env),
        dir=spec.dir,
        user=spec.user,
        tty=None if spec.tty is None else tty_to_pb(spec.tty),
        rlimits=spec.rlimits,
        # An absent message, not an empty one: only a process with limits of its own gets its own cgroup.
        limits=None if spec.limits == v.Limits() else limits_to_pb(spec.limits),
        output_retention_bytes=spec.output_retention_bytes,
        from_image=spec.from_image,
        sidecar=None if spec.sidecar is None else _sidecar_to_pb(spec.sidecar),
    )


def _sidecar_to_pb(sidecar: v.Sidecar) -> pb.Sidecar:
    mounts = _mounts_to_pb(sidecar.bind_mounts)
    auth = auth_to_pb(sidecar.image_auth)
    return pb.Sidecar(image=sidecar.image, bind_mounts=mounts, own_limits=sidecar.own_limits, image_auth=auth)


def _sidecar_from_pb(message: pb.Sidecar) -> v.Sidecar:
    return v.Sidecar(message.image, _mounts_from_pb(message.bind_mounts), message.own_limits)


def _process_spec_from_pb(message: pb.ProcessSpec) -> v.ProcessSpec:
    return v.ProcessSpec(
        path=message.path,
        args=tuple(message.args),
        env=_env_from_pb(message.env),
        dir=message.dir,
        user=message.user,
        tty=v.Tty(message.tty.rows, message.tty.columns) if message.HasField("tty") else None,
        rlimits=dict(message.rlimits),
        limits=limits_from_pb(message.limits),
        output_retention_bytes=message.output_retention_bytes,
        from_image=message.from_image,
        id=message.id,
        sidecar=_sidecar_from_pb(message.sidecar) if message.HasField("sidecar") else None,
    )


def exit_from_pb(message: pb.ExitStatus) -> v.ExitStatus:
    """How a process ended. A message without an end (which no server should send) becomes code None."""
    end = message.WhichOneof("end")
    return v.ExitStatus(
        code=message.code if end == "code" else None,
        signal=message.signal if end == "signal" else None,
        out_of_memory=message.out_of_memory,
        exited_at=moment(message.exited_at, message.HasField("exited_at")),
        reason=message.reason,
    )


def process_from_pb(message: pb.Process) -> v.ProcessInfo:
    """A process as the server describes it."""
    return v.ProcessInfo(
        id=message.id,
        handle=message.handle,
        spec=_process_spec_from_pb(message.spec),
        started_at=moment(message.started_at, message.HasField("started_at")),
        exit=exit_from_pb(message.exit) if message.HasField("exit") else None,
        pid=message.pid,
        stdout_bytes=message.stdout_bytes,
        stderr_bytes=message.stderr_bytes,
        stdout_closed=message.stdout_closed,
        stderr_closed=message.stderr_closed,
        stdin_bytes=message.stdin_bytes if message.HasField("stdin_bytes") else None,
    )


def chunk_from_pb(message: pb.OutputChunk) -> v.OutputChunk:
    """A piece of output."""
    return v.OutputChunk(v.Stream(message.stream), message.offset, message.data)


def capacity_from_pb(message: pb.GetCapacityResponse) -> v.Capacity:
    """What the server can hold."""
    return v.Capacity(
        memory_bytes=message.memory_bytes,
        disk_bytes=message.disk_bytes,
        disk_free_bytes=message.disk_free_bytes,
        max_containers=message.max_containers,
        containers=message.containers,
        ports=message.ports,
        ports_in_use=message.ports_in_use,
        cpus=message.cpus,
    )


def metrics_from_pb(message: pb.ContainerMetrics) -> v.ContainerMetrics:
    """Usage of one container."""
    return v.ContainerMetrics(
        handle=message.handle,
        process_id=message.process_id,
        error=message.error,
        memory_bytes=message.memory_bytes,
        memory_working_set_bytes=message.memory_working_set_bytes,
        memory_limit_bytes=message.memory_limit_bytes,
        memory_peak_bytes=message.memory_peak_bytes,
        cpu_usage_ns=message.cpu_usage_ns,
        cpu_user_ns=message.cpu_user_ns,
        cpu_system_ns=message.cpu_system_ns,
        cpu_throttled_ns=message.cpu_throttled_ns,
        pids=message.pids,
        pids_limit=message.pids_limit,
        age=message.age.ToTimedelta(),
        oom_kills=message.oom_kills,
        network_rx_bytes=message.network_rx_bytes,
        network_tx_bytes=message.network_tx_bytes,
        network_rx_packets=message.network_rx_packets,
        network_tx_packets=message.network_tx_packets,
        memory_stat=dict(message.memory_stat),
        cpu_entitlement_ns=message.cpu_entitlement_ns,
        disk_exclusive_bytes=message.disk_exclusive_bytes,
        disk_total_bytes=message.disk_total_bytes,
        disk_exclusive_inodes=message.disk_exclusive_inodes,
    )


def event_from_pb(message: pb.Event) -> v.Event:
    """One event."""
    return v.Event(
        cursor=message.cursor,
        at=moment(message.at, message.HasField("at")),
        kind=v.EventKind(message.kind),
        handle=message.handle,
        process_id=message.process_id,
        exit=exit_from_pb(message.exit) if message.HasField("exit") else None,
        details=dict(message.details),
    )


def leak_from_pb(message: pb.Leak) -> v.Leak:
    """One difference between journal and host."""
    return v.Leak(
        kind=v.LeakKind(message.kind),
        direction=v.LeakDirection(message.direction),
        name=message.name,
        handle=message.handle,
        detail=message.detail,
        removed=message.removed,
        kept_because=message.kept_because,
    )
