"""From the Garden protocol's objects to ours. Source: Garden HTTP protocol §2."""

from __future__ import annotations

from typing import Any

from garden_py.api.http.fields import UINT64_MAX, BadJson, Fields, as_fields
from garden_py.api.http.messages import window_size
from garden_py.model.errors import GardenError, InvalidField
from garden_py.model.files import BindMount, MountMode
from garden_py.model.image import RegistryAuth
from garden_py.model.limits import (
    DISK_FLOOR_BYTES,
    NETWORK_BURST_RANGE,
    NETWORK_RATE_RANGE,
    UINT63_MAX,
    DiskScope,
    Limits,
)
from garden_py.model.netrule import (
    MAX_PORT,
    AddressRange,
    DefaultAction,
    EgressPolicy,
    EgressRule,
    IcmpMatch,
    PortRange,
    Protocol,
    at_field,
    parse_address,
)
from garden_py.model.process import ProcessSpec, Sidecar, WindowSize
from garden_py.model.spec import GRACE_TIME_MAX_S, ContainerSpec, PortMapping

_PROTOCOLS = {0: Protocol.ALL, 1: Protocol.TCP, 2: Protocol.UDP, 3: Protocol.ICMP}
_RLIMITS = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
    "sigpending", "stack",
)  # fmt: skip


def container_spec(fields: Fields, default_egress: DefaultAction) -> ContainerSpec:
    """The body of a create.

    Raises:
        BadJson: a field has a wrong type or is out of its range.
        GardenError: a field asks for what this server does not do, or contradicts another.
    """
    rules = fields.each("netout_rules", lambda value, path: egress_rule(as_fields(value, path)))
    grace_ns = fields.number("grace_time", least=-UINT63_MAX, most=UINT63_MAX)
    return ContainerSpec(
        handle=fields.text("handle"),
        image=image(fields.child("image"), fields.text("rootfs")),
        image_auth=image_auth(fields.child("image")),
        privileged=fields.flag("privileged"),
        env=fields.texts("env"),
        properties=tuple(sorted(fields.text_map("properties").items())),
        bind_mounts=fields.each("bind_mounts", lambda value, path: bind_mount(as_fields(value, path))),
        limits=container_limits(fields.child("limits")),
        grace_time_s=_grace_s(grace_ns) or None,
        port_mappings=fields.each("netin", lambda value, path: port_mapping(as_fields(value, path))),
        egress=EgressPolicy(default_egress, rules) if rules else None,
        subnet=fields.text("network"),
    )


def image(found: Fields, rootfs: str) -> str:
    """A container's image, from the field of today and the one of old (statement M1)."""
    uri = found.text("uri")
    if uri and rootfs:
        raise InvalidField("image", "Cannot provide both Image.URI and RootFSPath")
    return uri or rootfs


def image_auth(found: Fields) -> RegistryAuth | None:
    """User and password at the image's registry, if any (statement M3)."""
    username, password = found.text("username"), found.text("password")
    return RegistryAuth(username, password) if username or password else None


def bind_mount(fields: Fields) -> BindMount:
    """`origin` is ignored, as in the reference: the source is a path of the host (statement BI5)."""
    fields.number("origin", most=1)
    mode = MountMode.READ_WRITE if fields.number("mode", most=1) else MountMode.READ_ONLY
    return BindMount(fields.text("src_path"), fields.text("dst_path"), mode)


def container_limits(fields: Fields) -> Limits:
    """Limits of a container; 0 and absent are the same: none."""
    pids = fields.child("pid_limits").number("max")
    disk, bandwidth = fields.child("disk_limits"), fields.child("bandwidth_limits")
    return _disk_limits(disk).over(_bandwidth_limits(bandwidth)).over(_process_limits(fields, pids or None))


def _bandwidth_limits(bandwidth: Fields) -> Limits:
    """`rate` in bytes per second for each direction, `burst` in bytes; too small ones are raised."""
    rate, burst = bandwidth.number("rate"), bandwidth.number("burst")
    if not rate:
        return Limits()
    least, most = NETWORK_RATE_RANGE
    rate = min(max(rate, least), most)
    least, most = NETWORK_BURST_RANGE
    return Limits(
        network_rx_bytes_per_s=rate,
        network_tx_bytes_per_s=rate,
        network_burst_bytes=min(max(burst, least), most) if burst else None,
    )


def _disk_limits(disk: Fields) -> Limits:
    """`byte_hard` in its scope; soft limits and inodes are accepted and ignored, small limits raised (D1, D8)."""
    for ignored in ("byte_soft", "inode_hard", "inode_soft"):
        disk.number(ignored)
    most, scope = disk.number("byte_hard"), disk.number("scope", most=1)
    if not most:
        return Limits()
    return Limits(
        disk_bytes=min(max(most, DISK_FLOOR_BYTES), UINT63_MAX),
        disk_scope=DiskScope.EXCLUSIVE if scope else DiskScope.TOTAL,
    )


def _process_limits(fields: Fields, pids: int | None) -> Limits:
    cpu = fields.child("cpu_limits")
    shares = cpu.number("weight") or cpu.number("limit_in_shares")
    memory = min(fields.child("memory_limits").number("limit_in_bytes"), UINT63_MAX)
    return Limits(memory_bytes=memory or None, cpu_shares=shares or None, pids=pids)


def port_mapping(fields: Fields) -> PortMapping:
    """A pair of ports; 0 asks for one."""
    return PortMapping(
        fields.number("host_port", most=MAX_PORT), fields.number("container_port", most=MAX_PORT)
    )


# --- net-out rules


def egress_rule(fields: Fields) -> EgressRule:
    """One net-out rule.

    Raises:
        BadJson, GardenError.
    """
    number = fields.number("protocol", most=255)
    if number not in _PROTOCOLS:
        raise InvalidField(fields.at("protocol"), f"invalid protocol: {number}")
    protocol = _PROTOCOLS[number]
    ports = fields.each("ports", lambda value, path: _port_range(as_fields(value, path)))
    if ports and protocol in (Protocol.ALL, Protocol.ICMP):
        problem = f"Ports cannot be specified for Protocol {protocol.value.upper()}"
        raise InvalidField(fields.at("ports"), problem)
    if fields.has("icmps") and protocol is not Protocol.ICMP:
        # Left out silently, it would open more than was asked for.
        problem = f"ICMP cannot be specified for Protocol {protocol.value.upper()}"
        raise InvalidField(fields.at("icmps"), problem)
    return EgressRule(
        protocol=protocol,
        networks=fields.each("networks", lambda value, path: _address_range(as_fields(value, path))),
        ports=ports,
        icmp=_icmp(fields.child("icmps")) if fields.has("icmps") else None,
        log=fields.flag("log"),
    )


def _icmp(fields: Fields) -> IcmpMatch:
    return IcmpMatch(fields.number("type", most=255), fields.optional_number("code", most=255))


def _address_range(fields: Fields) -> AddressRange:
    start, end = fields.text("start"), fields.text("end")
    if not start and not end:
        raise BadJson(f"{fields.path}: a range needs a start or an end")
    try:
        with at_field(fields.path):
            return AddressRange(parse_address(start or end), parse_address(end or start))
    except GardenError:
        raise
    except ValueError:
        bad = next(text for text in (start, end) if text and not _is_address(text))
        raise BadJson(f"invalid IP address: {bad}") from None


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except ValueError:
        return False
    return True


def _port_range(fields: Fields) -> PortRange:
    start, end = fields.number("start", most=MAX_PORT), fields.number("end", most=MAX_PORT)
    with at_field(fields.path):
        return PortRange(start or end, end or start)


# --- processes


def process_spec(fields: Fields) -> ProcessSpec:
    """The body of a run.

    Raises:
        BadJson, GardenError.
    """
    rlimits = fields.child("rlimits")
    given = {name: rlimits.optional_number(name, most=UINT64_MAX) for name in _RLIMITS}
    tty = fields.child("tty")
    return ProcessSpec(
        path=fields.text("path"),
        id=fields.text("id"),
        args=fields.texts("args"),
        env=fields.texts("env"),
        dir=fields.text("dir"),
        user=fields.text("user"),
        tty=window_size(tty) or WindowSize() if fields.has("tty") else None,
        rlimits=tuple((name, value) for name, value in given.items() if value is not None),
        limits=_process_limits(fields.child("limits"), None),
        sidecar=_sidecar(fields),
    )


def _sidecar(fields: Fields) -> Sidecar | None:
    """A process with a non-empty image, a "pea"; limits that are given, if only as {}, are its own (PE9, PE10)."""
    own_image = image(fields.child("image"), "")
    mounts = fields.each("bind_mounts", lambda value, path: bind_mount(as_fields(value, path)))
    if own_image:
        auth = image_auth(fields.child("image"))
        return Sidecar(own_image, mounts, own_limits=fields.has("limits"), image_auth=auth)
    if mounts:
        problem = "Running a process with bind mounts and no image provided is not allowed"
        raise InvalidField("bind_mounts", problem)
    return None


def grace_time_s(value: Any) -> float:
    """A bare number of nanoseconds, null for 0; what is not above 0 means never (§1.15, §7, statement 7)."""
    if value is None:
        return 0.0
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > UINT63_MAX:
        raise BadJson(f"grace time: must be a number of nanoseconds from -{UINT63_MAX} to {UINT63_MAX}")
    return _grace_s(value)


def _grace_s(grace_ns: int) -> float:
    """In seconds; as long as can be for what is meant to be for ever, as Go's largest duration of 292 years."""
    return min(max(grace_ns, 0) / 1e9, GRACE_TIME_MAX_S)
