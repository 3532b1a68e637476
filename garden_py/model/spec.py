"""What a container shall be, and the rules a request for one must keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from .errors import FieldViolation, InvalidRequest
from .files import BindMount, mount_violations
from .handle import hostname_problem, name_problem
from .image import RegistryAuth, image_problem
from .limits import Limits, incomplete_limits, limit_violations
from .netrule import EgressPolicy
from .network import NetworkMode, network_violations
from .process import check_env

REQUEST_ID_MAX = 128
PROPERTY_BYTES_MAX = 1 << 20
GRACE_TIME_MAX_S = 10 * 365 * 86_400


class Transport(Enum):
    """The transport protocol of a port mapping."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A host port that leads to a container port. 0 asks: host_port for a free one, container_port for the same."""

    host_port: int
    container_port: int
    transport: Transport = Transport.TCP


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A container to make. Empty or None fields stand for the server's defaults.

    Attributes:
        handle: the name; the service fills an empty one.
        image: a reference (model/image.py), or empty for the default root file system.
        image_auth: at the registry that the image is in; only for the create, and never written down.
        privileged: no user namespace, no seccomp, all capabilities the host has.
        env: NAME=VALUE for every process.
        properties: free key-value pairs.
        limits: of all processes together.
        grace_time_s: seconds without use before the server destroys it; None the default, 0 never.
        egress: policy for outgoing connections; None the server's default.
        hostname: empty: derived from the handle.
        network_mode: which network it is in.
        subnet: `a.b.c.d[/n]`, see network.SubnetChoice; empty: the server chooses an address.
    """

    handle: str = ""
    image: str = ""
    privileged: bool = False
    env: tuple[str, ...] = ()
    properties: tuple[tuple[str, str], ...] = ()
    bind_mounts: tuple[BindMount, ...] = ()
    limits: Limits = field(default_factory=Limits)
    grace_time_s: float | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    egress: EgressPolicy | None = None
    hostname: str = ""
    image_auth: RegistryAuth | None = None
    network_mode: NetworkMode = NetworkMode.OWN
    subnet: str = ""


def check_container(spec: ContainerSpec) -> None:
    """Refuse a container spec that breaks a rule that can be judged without looking at the host.

    Raises:
        InvalidRequest: with one violation per bad field.
    """
    found: list[FieldViolation] = []
    if spec.handle and (problem := name_problem(spec.handle)):
        found.append(FieldViolation("spec.handle", problem))
    if spec.hostname and (problem := hostname_problem(spec.hostname)):
        found.append(FieldViolation("spec.hostname", problem))
    if spec.image and (problem := image_problem(spec.image)):
        found.append(FieldViolation("spec.image", problem))
    found += check_env(spec.env, "spec.env")
    found += property_violations(dict(spec.properties), "spec.properties")
    found += limit_violations(spec.limits, "spec.limits")
    found += incomplete_limits(spec.limits, "spec.limits")
    if spec.grace_time_s is not None and not 0 <= spec.grace_time_s <= GRACE_TIME_MAX_S:
        found.append(FieldViolation("spec.grace_time", "must be 0 (never) to ten years"))
    found += mount_violations(spec.bind_mounts, "spec.bind_mounts")
    found += port_violations(spec.port_mappings, "spec.port_mappings")
    found += network_violations(
        spec.network_mode,
        spec.subnet,
        privileged=spec.privileged,
        asks_for_more=bool(spec.port_mappings) or spec.egress is not None or spec.limits.states_network,
        prefix="spec",
    )
    if found:
        raise InvalidRequest(found)


def property_violations(properties: dict[str, str], prefix: str) -> list[FieldViolation]:
    """Properties without a key, or larger than 1 MiB all together."""
    found = [FieldViolation(prefix, "a key must not be empty") for key in properties if not key]
    if sum(len(k) + len(v) for k, v in properties.items()) > PROPERTY_BYTES_MAX:
        found.append(
            FieldViolation(prefix, f"keys and values are more than {PROPERTY_BYTES_MAX} bytes together")
        )
    return found


def port_violations(mappings: tuple[PortMapping, ...], prefix: str) -> list[FieldViolation]:
    """Ports out of range, and host ports asked for twice."""
    found: list[FieldViolation] = []
    seen: set[tuple[Transport, int]] = set()
    for i, mapping in enumerate(mappings):
        for name, port in (("host_port", mapping.host_port), ("container_port", mapping.container_port)):
            if not 0 <= port <= 0xFFFF:
                found.append(FieldViolation(f"{prefix}[{i}].{name}", f"is {port}; allowed: 0 to 65535"))
        key = (mapping.transport, mapping.host_port)
        if mapping.host_port and key in seen:
            found.append(
                FieldViolation(f"{prefix}[{i}].host_port", f"{mapping.host_port} is asked for twice")
            )
        seen.add(key)
    return found
