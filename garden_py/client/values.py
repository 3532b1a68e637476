"""What the client gives and takes: plain frozen values, named and measured as in `garden.proto`.

Nothing here knows about gRPC; `convert` translates to and from the messages. Sizes are bytes, offsets count
from 0. `None` means "no statement": the server's default on create, "unchanged" on update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import IntEnum
from typing import TypedDict
from uuid import uuid4

from garden_py.client.image_values import RegistryAuth, UsedImage

_NO_STRINGS: Mapping[str, str] = {}


class ContainerState(IntEnum):
    """Where a container is in its life."""

    UNSPECIFIED = 0
    CREATING = 1
    ACTIVE = 2
    STOPPED = 3
    BROKEN = 4
    DESTROYING = 5
    UNKILLABLE = 6


class MountMode(IntEnum):
    """Whether a bind mount can be written through."""

    READ_ONLY = 0
    READ_WRITE = 1


class DiskScope(IntEnum):
    """What a limit on disk space counts: what the container wrote, or its image as well."""

    EXCLUSIVE = 0
    TOTAL = 1


class MountOrigin(IntEnum):
    """Whose path the source of a bind mount is."""

    HOST = 0
    CONTAINER = 1


class PortProtocol(IntEnum):
    """Protocol of a mapped port."""

    TCP = 0
    UDP = 1


class EgressAction(IntEnum):
    """What happens to a connection; UNSPECIFIED is the server's default, in a rule ALLOW."""

    UNSPECIFIED = 0
    ALLOW = 1
    DENY = 2


class EgressProtocol(IntEnum):
    """Protocol that an egress rule matches."""

    ALL = 0
    TCP = 1
    UDP = 2
    ICMP = 3


class Stream(IntEnum):
    """An output stream of a process; with a terminal everything is STDOUT."""

    STDOUT = 0
    STDERR = 1


class NetworkMode(IntEnum):
    """OWN: a link to the host; NONE: loopback only; HOST: the host's network, for privileged containers."""

    OWN = 0
    NONE = 1
    HOST = 2


class EgressCause(IntEnum):
    """What decides about a connection; see ExplainEgressResponse in garden.proto."""

    UNSPECIFIED = 0
    RULE = 1
    DENIED_NETWORK = 2
    DEFAULT = 3
    HOST = 4
    CONTAINERS = 5
    UNREACHABLE = 6
    IPV6 = 7
    LOOPBACK = 8
    MARTIAN = 9


class EventKind(IntEnum):
    """What an event tells."""

    UNSPECIFIED = 0
    CONTAINER_CREATED = 1
    CONTAINER_STOPPED = 2
    CONTAINER_DESTROYED = 3
    CONTAINER_BROKEN = 4
    CONTAINER_UNKILLABLE = 5
    PROCESS_STARTED = 6
    PROCESS_EXITED = 7
    OUT_OF_MEMORY = 8
    LIMITS_CHANGED = 9
    EGRESS_CHANGED = 10
    PORT_MAPPED = 11
    PROPERTIES_CHANGED = 12
    WATCHING = 13
    LEAK_FOUND = 14
    CONNECTION_DENIED = 15
    CONNECTION_ALLOWED = 16


class LeakKind(IntEnum):
    """Of what resource."""

    UNSPECIFIED = 0
    PROCESS = 1
    CGROUP = 2
    LINK = 3
    NFT_ELEMENT = 4
    NFT_CHAIN = 5
    MOUNT = 6
    RUNTIME = 7
    SOCKET = 8
    DIRECTORY = 9
    ADDRESS = 10
    PORT = 11
    UID_RANGE = 12


class LeakDirection(IntEnum):
    """ORPHAN: on the host, claimed by no container. MISSING: claimed by a running one, not on the host."""

    UNSPECIFIED = 0
    ORPHAN = 1
    MISSING = 2


@dataclass(frozen=True, slots=True)
class BindMount:
    """A file or directory of the host, or of the container's own image, at another place; both paths are absolute."""

    source: str
    destination: str
    mode: MountMode = MountMode.READ_ONLY
    origin: MountOrigin = MountOrigin.HOST


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a container or of one process; None is "no statement", 0 "unlimited" where that is allowed.

    Attributes:
        memory_bytes: all processes together, without swap; floor 4 MiB.
        swap_bytes: swap on top of that; here 0 is none, and 2^64-1 unlimited. Not stated with a new memory limit: the
            server's default, none. None in answers: there is no memory limit, or the kernel does not count swap.
        cpu_weight: relative share under contention, 1 to 10000.
        cpu_quota_us: CPU time per period, at least 1000 µs.
        cpu_period_us: 1000 to 1000000 µs.
        pids: processes and threads.
        disk_bytes: disk space of a container or sidecar, as disk_scope counts it; floor 256 KiB.
        disk_inodes: files and directories that it wrote; not on btrfs.
        disk_scope: what disk_bytes counts; None: what it wrote.
        network_rx_bytes_per_s, network_tx_bytes_per_s: what a container may receive and send.
        network_burst_bytes: how much of either may pass at once after a pause.
        io_weight: of a container, relative share of the writable layer's block device under contention, 1 to 10000.
        io_read_bytes_per_s, io_write_bytes_per_s, io_read_ops_per_s, io_write_ops_per_s: of a container, transfers with
            that device. On cgroup v1 only writes that bypass the page cache count.
        rlimits: as ProcessSpec.rlimits; a resource that is not named has no statement. Of a container: for all its
            processes but those that state the resource themselves. Of a process that is to be started: not here, but in
            ProcessSpec.rlimits.
    """

    memory_bytes: int | None = None
    cpu_weight: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    disk_inodes: int | None = None
    disk_scope: DiskScope | None = None
    network_rx_bytes_per_s: int | None = None
    network_tx_bytes_per_s: int | None = None
    network_burst_bytes: int | None = None
    io_weight: int | None = None
    io_read_bytes_per_s: int | None = None
    io_write_bytes_per_s: int | None = None
    io_read_ops_per_s: int | None = None
    io_write_ops_per_s: int | None = None
    rlimits: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    swap_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A host port that leads into the container; host port 0 is "any free", container port 0 "the same"."""

    host_port: int = 0
    container_port: int = 0
    protocol: PortProtocol = PortProtocol.TCP


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports start to end, both included; end 0 means just start."""

    start: int
    end: int = 0


@dataclass(frozen=True, slots=True)
class IcmpMatch:
    """An ICMP type, and a code or None for any."""

    type: int
    code: int | None = None


@dataclass(frozen=True, slots=True)
class EgressRule:
    """One rule of an egress policy; empty networks or ports mean "any".

    `packets` and `bytes` are filled in by the server: what this rule has decided since it was set.
    """

    action: EgressAction = EgressAction.ALLOW
    protocol: EgressProtocol = EgressProtocol.ALL
    networks: tuple[str, ...] = ()
    ports: tuple[PortRange, ...] = ()
    icmp: IcmpMatch | None = None
    log: bool = False
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Rules in order, the first match decides; `etag` given back in `set_egress` refuses a lost update."""

    default_action: EgressAction = EgressAction.UNSPECIFIED
    rules: tuple[EgressRule, ...] = ()
    etag: str = ""
    default_packets: int = 0
    default_bytes: int = 0
    denied_network_packets: int = 0
    denied_network_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a connection would go: port of tcp and udp; icmp None with protocol ICMP: an echo request."""

    protocol: EgressProtocol
    address: str
    port: int = 0
    icmp: IcmpMatch | None = None


@dataclass(frozen=True, slots=True)
class EgressDecision:
    """What would become of a connection.

    Attributes:
        action: ALLOW or DENY.
        cause: what decides.
        rule_number: of the policy's rules, from 1; 0 if none decides.
        rule: that rule.
    """

    action: EgressAction
    cause: EgressCause
    rule_number: int = 0
    rule: EgressRule | None = None


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """What a container shall be. Every field may be left out.

    Attributes:
        handle: 1 to 128 of `A-Z a-z 0-9 . _ -`; empty: the server makes a UUID.
        image: root file system; empty: the server's default. A directory or tar file of the server, `oci:///dir:tag`,
            `docker://host/repo:tag` and more: see ContainerSpec.image in garden.proto.
        image_auth: at the registry, for this create alone.
        grace_time: how long it may be unused before the server destroys it; zero: for ever.
        egress: None: the server's default policy.
        hostname: empty: made from the handle.
        subnet: "10.1.2.0/24" or "10.1.2.7/24"; empty: an address of the server's pool.
    """

    handle: str = ""
    image: str = ""
    privileged: bool = False
    env: Mapping[str, str] = field(default_factory=lambda: _NO_STRINGS)
    properties: Mapping[str, str] = field(default_factory=lambda: _NO_STRINGS)
    bind_mounts: tuple[BindMount, ...] = ()
    limits: Limits = Limits()
    grace_time: timedelta | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    egress: EgressPolicy | None = None
    hostname: str = ""
    image_auth: RegistryAuth | None = None
    network_mode: NetworkMode = NetworkMode.OWN
    subnet: str = ""


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """The program that is PID 1 of a container.

    Attributes:
        build: which one it is; empty if it is too old to say.
        wire_version: of the protocol that the server speaks with it.
        current: it is the one of this server; else it is replaced in place, in the background, unless there is a
            problem.
        problem: why it stays what it is.
    """

    build: str
    wire_version: int
    current: bool
    problem: str


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container as it was when the server answered; env values of the spec are not returned."""

    handle: str
    state: ContainerState
    state_reason: str
    created_at: datetime | None
    spec: ContainerSpec
    container_ip: str
    host_ip: str
    external_ip: str
    mapped_ports: tuple[PortMapping, ...]
    properties: Mapping[str, str]
    process_ids: tuple[str, ...]
    events: tuple[str, ...]
    pid: int
    agent: AgentInfo | None = None
    image: UsedImage | None = None
    container_ipv6: str = ""


@dataclass(frozen=True, slots=True)
class Tty:
    """A terminal's size in character cells; 0 is the server's default of 24 by 80."""

    rows: int = 0
    columns: int = 0


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A root file system of a process's own.

    Attributes:
        image: as ContainerSpec.image, but never empty.
        bind_mounts: its own; it has none of the container's.
        own_limits: the process's limits stand beside the container's; what is not stated is unlimited.
    """

    image: str
    bind_mounts: tuple[BindMount, ...] = ()
    own_limits: bool = False
    image_auth: RegistryAuth | None = None


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start.

    Attributes:
        path: program; without a slash it is looked up in PATH inside the container.
        args: argv[1] onwards.
        dir: working directory, made if missing; empty: the user's home.
        user: "" (root), "name", "uid", "uid:gid" or "name:group" of the container's own files.
        tty: a terminal of this size, or None for pipes.
        rlimits: soft = hard, by setrlimit(2) name in lower case without RLIMIT_.
        limits: of this process and its children, within the container's.
        output_retention_bytes: output kept per stream; 0: the server's default.
        id: 1 to 128 characters as in a handle; empty: the client makes one.
        sidecar: a root file system of its own instead of the container's.
        from_image: run the image's entrypoint with args, or, without args, with its cmd; path is empty then.
    """

    path: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=lambda: _NO_STRINGS)
    dir: str = ""
    user: str = ""
    tty: Tty | None = None
    rlimits: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    limits: Limits = Limits()
    output_retention_bytes: int = 0
    id: str = ""
    sidecar: Sidecar | None = None
    from_image: bool = False


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: exactly one of `code` and `signal` is set. A value, never a truth."""

    code: int | None = None
    signal: int | None = None
    out_of_memory: bool = False
    exited_at: datetime | None = None
    reason: str = ""

    @property
    def shell_code(self) -> int:
        """The status as a shell reports it: the code, or 128 + the signal's number."""
        if self.signal is not None:
            return 128 + self.signal
        return self.code if self.code is not None else 0

    def __bool__(self) -> bool:
        raise TypeError("an exit status is neither true nor false; compare .code or .shell_code")


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process as it was when the server answered.

    Attributes:
        exit: None means it was running.
        stdin_bytes: taken so far; None when that is not known.
    """

    id: str
    handle: str
    spec: ProcessSpec
    started_at: datetime | None
    exit: ExitStatus | None
    pid: int
    stdout_bytes: int
    stderr_bytes: int
    stdout_closed: bool
    stderr_closed: bool
    stdin_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """Bytes of one stream; `offset` is that of the first byte."""

    stream: Stream
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Output:
    """All that a process wrote from where the reader began, and how it ended."""

    stdout: bytes
    stderr: bytes
    exit: ExitStatus


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the server can hold and what is in use."""

    memory_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    max_containers: int
    containers: int
    ports: int
    ports_in_use: int
    cpus: int


@dataclass(frozen=True, slots=True)
class ContainerMetrics:
    """Usage of one container, or of one process in it if `process_id` is set.

    `error` set means it could not be measured and the rest is empty.
    """

    handle: str
    process_id: str
    error: str
    memory_bytes: int
    memory_working_set_bytes: int
    memory_limit_bytes: int
    memory_peak_bytes: int
    cpu_usage_ns: int
    cpu_user_ns: int
    cpu_system_ns: int
    cpu_throttled_ns: int
    pids: int
    pids_limit: int
    age: timedelta
    oom_kills: int
    network_rx_bytes: int
    network_tx_bytes: int
    network_rx_packets: int
    network_tx_packets: int
    memory_stat: Mapping[str, int]
    disk_exclusive_bytes: int = 0
    disk_total_bytes: int = 0
    disk_exclusive_inodes: int = 0
    cpu_entitlement_ns: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; the cursor grows with each event of the server."""

    cursor: int
    at: datetime | None
    kind: EventKind
    handle: str
    process_id: str
    exit: ExitStatus | None
    details: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Leak:
    """A difference between the server's journal and its host; see CheckLeaks in garden.proto."""

    kind: LeakKind
    direction: LeakDirection
    name: str
    handle: str
    detail: str
    removed: bool
    kept_because: str


class ProcessFields(TypedDict, total=False):
    """The fields of ProcessSpec that `run` and `start` take as keywords."""

    env: Mapping[str, str]
    dir: str
    user: str
    tty: Tty | None
    rlimits: Mapping[str, int]
    limits: Limits
    output_retention_bytes: int
    id: str


def process_spec(command: ProcessSpec | Sequence[str], fields: ProcessFields) -> ProcessSpec:
    """A spec with an id, from an argv or a spec and the fields that shall differ.

    Raises:
        ValueError: an empty argv.
    """
    if not isinstance(command, ProcessSpec):
        if isinstance(command, str):
            raise ValueError(f"a command is a list of strings, not one string: {command!r}")
        if not command:
            raise ValueError("a command needs at least the program's name")
        command = ProcessSpec(path=command[0], args=tuple(command[1:]))
    spec = replace(command, **fields)
    # The id is made here, not by the server: it is what a later attach asks for, even if no answer ever came.
    return spec if spec.id else replace(spec, id=uuid4().hex)
