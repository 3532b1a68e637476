"""What the service needs from a backend: the only things a backend has to provide.

`tests/contract` is the conformance suite: every backend must pass it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from garden_py.model.connection import Connection
from garden_py.model.cpu import Entitlement, Standing
from garden_py.model.image import ImageInfo, ImageRef, PullProgress, RegistryAuth, UsedImage
from garden_py.model.leak import Leak
from garden_py.model.lifecycle import State
from garden_py.model.limits import Limits
from garden_py.model.netrule import Decision, Destination, EgressPolicy, EgressRule
from garden_py.model.process import ExitStatus, OutputStream, ProcessSpec, WindowSize
from garden_py.model.spec import ContainerSpec, PortMapping


@dataclass(frozen=True, slots=True)
class ContainerRow:
    """A container as the journal keeps it.

    Attributes:
        spec: JSON form of its ContainerSpec as in force.
        facts: whatever the backend needs to find and remove what it made (addresses, ids, pid).
        notable: things of its life for people.
    """

    handle: str
    state: State
    state_reason: str
    request_id: str
    created_ns: int
    spec: dict[str, Any]
    facts: dict[str, Any]
    notable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process as the journal keeps it; `exit` is None while it runs."""

    handle: str
    id: str
    request_id: str
    started_ns: int
    pid: int
    spec: dict[str, Any]
    exit: dict[str, Any] | None


class Records(Protocol):
    """Where rows are kept; see backend/journal.py. A row is durable against SIGKILL when the call returns.

    HostFault from any of them: it could not be done, e.g. because the disk is full; nothing has changed.
    """

    def save_container(self, row: ContainerRow) -> None:
        """Insert or replace a container's row."""

    def forget_container(self, handle: str) -> None:
        """Remove a container's row and those of its processes."""

    def containers(self) -> list[ContainerRow]:
        """All rows, oldest first."""

    def save_process(self, row: ProcessRow) -> None:
        """Insert or replace a process's row."""

    def save_exit(self, handle: str, process_id: str, pid: int, status: dict[str, Any]) -> None:
        """Complete a process's row with its pid and how it ended; one that is not there stays so."""

    def forget_process(self, handle: str, process_id: str) -> None:
        """Remove a process's row."""

    def processes(self, handle: str) -> list[ProcessRow]:
        """A container's processes, oldest first."""


@dataclass(frozen=True, slots=True)
class HostCapacity:
    """What the host offers; bytes and counts.

    Attributes:
        containers: what the backend's pools allow.
        ports: 0: the backend has no pool of them.
        schedulable_disk_bytes: of disk_bytes, what containers and images can take together; 0: that is not known.
    """

    memory_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    containers: int
    containers_limited_by: str
    ports: int
    ports_in_use: int
    cpus: int
    schedulable_disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PoolLevel:
    """How full a pool is that containers take from: counts."""

    size: int
    in_use: int


@dataclass(frozen=True, slots=True)
class Clue:
    """One part of a diagnosis.

    Attributes:
        name: of its file in the diagnosis; may have directories.
        read: reads it now. It may raise, or never return; the reader of it waits only for so long, and then leaves it.
    """

    name: str
    read: Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """A container's addresses; empty where there is none.

    Attributes:
        properties: what else whoever connected the container says of it; kept with its own ones.
    """

    container_ip: str = ""
    host_ip: str = ""
    external_ip: str = ""
    mapped_ports: tuple[PortMapping, ...] = ()
    container_ipv6: str = ""
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """The agent that a container has.

    Attributes:
        build: which program it is; empty if it is too old to say.
        wire: version of the protocol it speaks.
        current: it is the one of this server.
        problem: why it is not and will not be before this server is started again; empty while an upgrade is to come.
    """

    build: str = ""
    wire: int = 0
    current: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """A container's use of resources; fields as in ContainerMetrics of the proto, same units.

    The service fills in cpu_entitlement_ns.
    """

    memory_bytes: int = 0
    memory_working_set_bytes: int = 0
    memory_limit_bytes: int = 0
    memory_peak_bytes: int = 0
    memory_stat: dict[str, int] = field(default_factory=dict)
    cpu_usage_ns: int = 0
    cpu_user_ns: int = 0
    cpu_system_ns: int = 0
    cpu_throttled_ns: int = 0
    cpu_entitlement_ns: int = 0
    pids: int = 0
    pids_limit: int = 0
    oom_kills: int = 0
    network_rx_bytes: int = 0
    network_tx_bytes: int = 0
    network_rx_packets: int = 0
    network_tx_packets: int = 0
    disk_exclusive_bytes: int = 0
    disk_total_bytes: int = 0
    disk_exclusive_inodes: int = 0


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Disk space of a container or sidecar: what it wrote, and that with its image; 0 where nothing is counted."""

    exclusive_bytes: int = 0
    total_bytes: int = 0
    exclusive_inodes: int = 0


@dataclass(frozen=True, slots=True)
class RuleCount:
    """Packets and bytes that one rule (or the default action) decided."""

    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class EgressCounts:
    """Counts of a container's policy: one per rule in its order, the default action's, the denied networks'."""

    rules: tuple[RuleCount, ...]
    default: RuleCount
    denied_network: RuleCount = RuleCount()


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a stream in a file: count of them from an offset in it. The descriptor is the reader's till it moves."""

    fd: int
    offset: int
    count: int


class OutputReader(Protocol):
    """One reader of one stream, at its own offset. While it is open, a full stream waits for it."""

    @property
    def offset(self) -> int:
        """Where the next byte will come from."""

    async def read(self, max_bytes: int) -> bytes:
        """The next bytes, at least one; b"" when the stream is closed and read to its end."""

    def read_nowait(self, max_bytes: int) -> bytes:
        """The bytes that are there now, perhaps none."""

    def span(self, max_bytes: int) -> Span | None:
        """Where the bytes that are there now lie in a file, for sendfile(2); None if there are none, or in no file."""

    def skip(self, count: int) -> None:
        """Go on as if count bytes of the last span had been read."""

    def close(self) -> None:
        """Stop holding the stream back."""


class OutputLog(Protocol):
    """A stored output stream of a process, addressed by byte offset from 0."""

    @property
    def first_offset(self) -> int:
        """The first byte still kept."""

    @property
    def end_offset(self) -> int:
        """The offset after the last byte so far."""

    @property
    def closed(self) -> bool:
        """Whether no more bytes will come."""

    delivered: int
    """How far readers that keep no place of their own have got; kept over restarts, as far as the disk has room."""

    def open_reader(self, offset: int, wake: asyncio.Event | None = None) -> OutputReader:
        """A reader from offset.

        Args:
            offset: of the first byte wanted.
            wake: set whenever there may be more to see: bytes, the stream's end, the process's exit.

        Raises:
            OffsetOutOfRange: below the first kept byte or beyond the end.
        """


class RunningProcess(Protocol):
    """A process that a backend started; stays usable after the exit."""

    @property
    def id(self) -> str:
        """Its name in the container."""

    @property
    def pid(self) -> int:
        """As the container numbers it."""

    @property
    def spec(self) -> ProcessSpec:
        """As it was started."""

    @property
    def started_ns(self) -> int:
        """CLOCK_REALTIME."""

    @property
    def exit(self) -> ExitStatus | None:
        """How it ended; None while it runs."""

    @property
    def stdin_bytes(self) -> int | None:
        """Bytes of stdin taken so far; None when that is not known."""

    def output(self, stream: OutputStream) -> OutputLog:
        """One of its stored output streams."""

    async def wait(self) -> ExitStatus:
        """How it ended, as soon as it has."""

    async def write_stdin(self, data: bytes, offset: int | None) -> None:
        """Feed stdin; waits while the pipe is full. Data for a process that no longer reads is dropped.

        Raises:
            StdinClosed: it was closed before.
            OffsetOutOfRange: offset leaves a gap.
            OffsetUnknown: how much was fed is not known any more.
        """

    async def close_stdin(self, offset: int | None = None) -> None:
        """End stdin; twice is fine.

        Args:
            offset: where it is to end; None: wherever it is.

        Raises:
            OffsetOutOfRange: offset leaves a gap, in the input of a process that may still read.
        """

    async def resize(self, size: WindowSize) -> None:
        """Set the terminal's size; NoTty without one."""

    async def signal(self, number: int, *, group: bool) -> bool:
        """Send a signal; False if the process had exited."""

    def exit_recorded(self) -> None:
        """The exit is in the journal; whoever kept it until now may forget it."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Tasks of a container that the kernel has killed for want of memory.

    Attributes:
        process_id: of the process whose own limit it was for; "": the container's, or nobody's.
        victim: id of the process that was killed, or whose children were, if it is not that; "": not known, it shares
            its container's group.
        limit_bytes: the limit; 0: there is none, it was the host that had no memory left.
        kills: how many tasks.
    """

    process_id: str = ""
    victim: str = ""
    limit_bytes: int = 0
    kills: int = 1

    @property
    def limit_of(self) -> str:
        """Who had no memory left: `container`, `process` or `host`."""
        if not self.limit_bytes:
            return "host"
        return "process" if self.process_id else "container"


@dataclass(frozen=True, slots=True)
class BackendEvents:
    """How a backend reports what happens by itself. Called in the event loop; must not block.

    Attributes:
        process_exited: (handle, process).
        out_of_memory: (handle, what has been killed since the last time).
        broken: (handle, reason): the container's agent is gone.
        connection: (handle, connection) that the network refused, or that a rule which logs allowed; not each one: the
            backend bounds the rate.
    """

    process_exited: Callable[[str, RunningProcess], None]
    out_of_memory: Callable[[str, OutOfMemory], None]
    broken: Callable[[str, str], None]
    connection: Callable[[str, Connection], None]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a container's row claims of the host: `facts` are the backend's, as in ContainerRow."""

    handle: str
    facts: dict[str, Any]


class Witness(Protocol):
    """What the journal claimed while somebody looked at the host.

    Containers come and go during a look. Whatever a look finds belongs to nobody only if no row claimed it at any
    moment since the look began, and lacks only if its row stood still all that time.
    """

    def claims(self) -> list[Claim]:
        """Every claim there was at some moment since the look began; several of one handle as it changed."""

    def settled(self) -> list[Claim]:
        """Claims of complete, running containers that have not changed since the look began."""


class LeakFinder(Protocol):
    """The part of a backend that compares what is on the host with what the journal claims."""

    async def find_leaks(self, witness: Witness) -> list[Leak]:
        """Differences in both directions, in the order in which they have to be removed.

        One look can be deceived by what the kernel does later than it was told to: believe what two looks show.

        Raises:
            HostFault: the host could not be looked at.
        """

    async def put_back(self, leaks: list[Leak]) -> list[Leak]:
        """Make again what is missing and can be made again without harm; those of the leaks that were.

        Raises:
            HostFault: it cannot be done.
        """

    async def remove_leak(self, leak: Leak, claims: list[Claim]) -> bool:
        """Remove an orphan; False if it is in use again, and nothing was done.

        Args:
            leak: an orphan without a reason to keep it. Gone by now is fine.
            claims: as they are at the moment of the call. Until the first `await` inside nothing else runs, so what
                is not claimed then cannot be before the backend holds it.

        Raises:
            HostFault: it cannot be removed.
        """


class ImageKeeper(Protocol):
    """The part of a backend that keeps images."""

    async def pull(
        self, ref: ImageRef, auth: RegistryAuth | None, report: Callable[[PullProgress], None]
    ) -> ImageInfo:
        """Bring an image into the store, or up to date.

        Raises:
            InvalidField, ImageNotFound, ImageUnknown, ImageAccessDenied, ImageUnreachable, ImageInvalid, ImageTooLarge,
            NotSupported, HostFault: nothing has changed, but that layers which came before the failure may be kept.
        """

    async def import_image(self, ref: ImageRef, chunks: AsyncIterator[bytes]) -> ImageInfo:
        """Make an image of a tar of a root file system, plain, gzip or zstd, and keep it under a name of the store.

        Raises:
            ImageInvalid, ImageTooLarge, HostFault: nothing has changed.
        """

    def list_images(self) -> list[ImageInfo]:
        """All images, the latest used first."""

    def inspect(self, image: str) -> ImageInfo:
        """One image, by a reference that it was fetched by, or its id or at least 12 digits of that; ImageUnknown."""

    def remove(self, image: str) -> ImageInfo:
        """Remove a name, and with its last name, or by id, the image; as it was. ImageUnknown, ImageInUse."""

    def prune(self, *, named: bool) -> tuple[list[str], int]:
        """Remove images that nobody uses; named: also those that have a name. Their ids, and the bytes freed."""


class Backend(LeakFinder, Protocol):
    """Containers made real. Handles are valid names; specs have passed the checks of `model`.

    Per handle the service makes one create or destroy at a time, and none of the other calls outside of them.
    """

    async def open(self, events: BackendEvents, rows: list[ContainerRow]) -> None:
        """Get ready; give nothing that the facts of rows lease to anybody else until they are destroyed."""

    async def adopt(self, row: ContainerRow) -> None:
        """Take over a complete container that an earlier server made, after `open`; any number at a time.

        Raises:
            ContainerBroken: that cannot be; it can only be destroyed. Its processes can be adopted all the same, for
                their exits and what is kept of their output.
        """

    async def close(self) -> None:
        """Let go without touching any container."""

    async def wait_for_loss(self) -> None:
        """Return when something that all containers share has surely been taken away, and can be put back."""

    def capacity(self) -> HostCapacity:
        """What host and pools offer."""

    async def capacity_told(self) -> None:
        """Wait until what others are asked for about the capacity has been told once, or they have failed to.

        For callers that ask once and for all, as Diego's executor does when it starts.
        """

    def pools(self) -> dict[str, PoolLevel]:
        """Levels of what containers take from, by a fixed name for each pool; after `open`."""

    @property
    def images(self) -> ImageKeeper:
        """Its images; after `open`."""

    def used_image(self, handle: str) -> UsedImage | None:
        """The image that a container was made of; None: a directory."""

    async def create(
        self,
        spec: ContainerSpec,
        record: Callable[[dict[str, Any]], None],
        report: Callable[[PullProgress], None],
    ) -> None:
        """Make a container that can run processes; on any failure nothing of it is left.

        Args:
            spec: with every default filled in.
            record: is given facts to keep before the step that they belong to.
            report: is told how the fetch of its image gets on, if that takes one.

        Raises:
            PoolExhausted, PortInUse, InvalidRequest, HostFault, NotSupported; and, before anything was begun, those of
            ImageKeeper.pull.
            Unkillable: it failed, and what had been made could not be removed; the one failure after which
                something is left. `destroy` with the recorded facts removes it.
        """

    async def destroy(self, handle: str, facts: dict[str, Any]) -> None:
        """Remove whatever exists of a container; works from its facts alone, and any number of times.

        The exits of its processes are reported when none is left, be it by a later call.

        Raises:
            Unkillable: the kernel holds on to something past the deadline; call again.
        """

    def clues(self, handle: str, facts: dict[str, Any]) -> list[Clue]:
        """Where to look for what is wrong with a container in any state, also one that this backend does not know.

        Args:
            handle: of the container.
            facts: as in its row, perhaps none.
        """

    def facts_of_network(self, handle: str) -> NetworkFacts:
        """A container's addresses and mapped ports."""

    def agent(self, handle: str) -> AgentFacts:
        """A container's agent; ContainerNotFound if it is broken."""

    def pid(self, handle: str) -> int:
        """PID 1 of a container, as the host numbers it."""

    async def signal_all(self, handle: str, number: int) -> None:
        """Signal every process of a container but PID 1."""

    def workload_count(self, handle: str) -> int:
        """Tasks of a container, the agent not counted."""

    def describe_workload(self, handle: str) -> str:
        """A sentence about its processes, of which none should be left, for an error: which, and where they hang."""

    async def usage(self, handle: str, process_id: str | None = None) -> Usage:
        """What a container uses now, or one of its processes that is counted by itself (ProcessSpec.has_own_group).

        Raises:
            ProcessNotFound, ProcessExited.
            ProcessNotCounted: the process is counted with its container.
        """

    def cpu_usage_ns(self, handle: str) -> int:
        """CPU time of a container so far, without sidecars beside its limits."""

    async def balance_cpu(self, standings: Mapping[str, Standing], entitlement: Entitlement) -> None:
        """Give containers over their entitlement only what the others leave; those not named stay as they are.

        Raises:
            OSError: it cannot be done now.
        """

    async def limits(self, handle: str, process_id: str | None = None) -> Limits:
        """The limits in force, read from the kernel, of a container or a process in it; 0 where there is none.

        Rlimits: of a container as stated; of a process those that the kernel has, of resources that it or its container
        states.

        Raises:
            ProcessNotFound, ProcessExited.
            ProcessNotLimited: the process is not counted by itself (ProcessSpec.has_own_group), and neither it nor its
                container states rlimits.
        """

    async def update_limits(
        self,
        handle: str,
        limits: Limits,
        process_id: str | None = None,
        *,
        record: Callable[[Limits], None] | None = None,
    ) -> Limits:
        """Change limits, all or none; those in force afterwards. A process's spec says them from then on.

        Rlimits of a container are also those of its running processes then, but in resources that a process states
        itself; those of a process also its descendants'. Calls of start_process may be under way meanwhile.

        Args:
            handle: of the container.
            limits: what is not stated stays.
            process_id: whose limits; None: the container's.
            record: called once with those in force then; what it raises takes the change back.

        Raises:
            LimitRefused: the kernel refuses; nothing has changed. And those of `limits`; ProcessNotLimited only if they
                are not of rlimits alone.
        """

    async def map_port(
        self, handle: str, mapping: PortMapping, record: Callable[[dict[str, Any]], None]
    ) -> PortMapping:
        """Make a port reachable on the host; PortInUse, PoolExhausted. The mapping with its ports filled in."""

    async def set_egress(self, handle: str, policy: EgressPolicy) -> None:
        """Replace the egress policy in one step; established connections go on if its generation is the former's."""

    async def open_egress(
        self, handle: str, policy: EgressPolicy, opened: tuple[EgressRule, ...], *, bulk: bool
    ) -> None:
        """As `set_egress`, of a policy that is the one in force with rules put before or behind its own.

        Args:
            handle: of the container.
            policy: as it is then.
            opened: the rules put there.
            bulk: the caller gave a list, if only of one.

        Raises:
            NotSupported, HostFault.
        """

    async def explain_egress(self, handle: str, policy: EgressPolicy, destination: Destination) -> Decision:
        """What would become of a new connection under the policy, which is the container's."""

    async def egress_counts(self, handle: str, rules: int) -> EgressCounts:
        """What each of the policy's `rules` rules has decided."""

    async def start_process(
        self, handle: str, spec: ProcessSpec, env: tuple[str, ...], record: Callable[[], None]
    ) -> RunningProcess:
        """Start a process; returns when its program runs.

        Args:
            handle: of the container.
            spec: with id filled in.
            env: all entries, later wins.
            record: called once, after which the program may run but not before. What it raises ends the start, and
                the program has never run.

        Raises:
            ExecutableNotFound, NotExecutable, UserNotFound, ProcessStartFailed, ContainerBroken.
            TaskLimitReached: its container has as many tasks as it may have.
        """

    def end_fetches(self) -> None:
        """For a server that stops: give up starts of processes that still wait for an image of their own.

        They end with ShuttingDown.
        """

    async def adopt_process(self, handle: str, row: ProcessRow, spec: ProcessSpec) -> RunningProcess:
        """The process of a row, after `adopt`: running, or finished with its kept output."""

    async def adopted(self, handle: str) -> None:
        """Every process in the journal has been adopted: end what the container runs besides; ContainerBroken."""

    async def forget_process(self, handle: str, process_id: str) -> None:
        """Drop a finished process and its output."""

    async def stream_in(self, handle: str, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        """Unpack a tar at path as user.

        Raises:
            CopyFailed, UserNotFound, ContainerBroken.
        """

    def stream_out(self, handle: str, path: str, user: str) -> AsyncGenerator[bytes, None]:
        """Pack path as user; raises as stream_in, also after the first chunk."""
