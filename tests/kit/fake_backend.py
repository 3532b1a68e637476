"""A backend in memory that implements service.ports.Backend: the service's rules can be tested without root.

`tests/contract` runs the same suite against this and against the Linux backend, so the fake may be believed.
A FakeHost stands for the kernel: what lives there survives a backend that is closed, or dropped without closing.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from garden_py.model import errors
from garden_py.model.codec import load_exit
from garden_py.model.cpu import Entitlement, Standing
from garden_py.model.image import PullProgress, Transport, UsedImage, parse_image
from garden_py.model.leak import Leak
from garden_py.model.lifecycle import USABLE
from garden_py.model.limits import SWAP_NEEDS_MEMORY, Limits, rlimits_over
from garden_py.model.netrule import Decision, Destination, EgressPolicy, EgressRule, decide
from garden_py.model.process import ProcessSpec
from garden_py.model.spec import ContainerSpec, PortMapping
from garden_py.service.ports import (
    AgentFacts,
    BackendEvents,
    Claim,
    Clue,
    ContainerRow,
    EgressCounts,
    HostCapacity,
    NetworkFacts,
    OutOfMemory,
    PoolLevel,
    ProcessRow,
    RuleCount,
    Usage,
    Witness,
)
from kit.fake_images import FakeImages
from kit.fake_process import FakeProcess, Stdio, find_program

Record = Callable[[dict[str, Any]], None]
KNOWN_USERS = frozenset({"", "root", "nobody", "0", "65534"})
UNLIMITED = Limits(
    memory_bytes=0, cpu_weight=100, cpu_quota_us=0, cpu_period_us=100_000, pids=0, disk_bytes=0, disk_inodes=0
)


def in_force(limits: Limits) -> Limits:
    """Limits of a new thing as a kernel has them, which has no swap beside a memory limit unless it is asked for."""
    found = limits.over(UNLIMITED)
    return replace(found, swap_bytes=(found.swap_bytes or 0) if found.memory_bytes else None)


@dataclass
class FakeContainer:
    """A container on the fake host."""

    spec: ContainerSpec
    address: int
    ports: tuple[PortMapping, ...]
    pid: int
    limits: Limits
    policy: EgressPolicy | None
    processes: dict[str, FakeProcess] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHost:
    """What outlives a server.

    Attributes:
        containers: those that run, by handle.
        addresses, ports: what is taken.
        images: directories that exist.
    """

    containers: dict[str, FakeContainer] = field(default_factory=dict)
    addresses: set[int] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    pids: Any = field(default_factory=lambda: itertools.count(1000))


class FakeBackend:
    """Containers on a FakeHost.

    Attributes:
        adopt_gate: adoptions wait for it.
        create_gate: creates wait for it after recording, before anything is made.
        create_failure: raised by the next create, after recording.
        start_gate: starts of processes wait for it.
        usage_gates: by handle, what its measurement waits for.
        destroy_failures: raised by one destroy each, in order, before anything is removed.
        destroy_gate: destroys wait for it.
        looks: what each search for leaks finds, in order.
        can_put_back: names of what can be made again when it is missing.
        remove_gate: removals of leaks wait for it.
        further_clues: what there is to be found out about any container.
        cpu_used_ns: CPU time of containers; 1 where there is none.
        throttled: those over their entitlement at the last look.
        calls: what was asked, in order: (verb, handle).
    """

    def __init__(self, host: FakeHost | None = None, *, containers: int = 250, ports: int = 4) -> None:
        self.host = host or FakeHost()
        self.adopt_gate = open_gate()
        self.images = FakeImages()
        self.used_images: dict[str, UsedImage] = {}
        self.create_gate = open_gate()
        self.create_failure: Exception | None = None
        self.start_gate = open_gate()
        self.usage_gates: dict[str, asyncio.Event] = {}
        self.destroy_failures: list[errors.GardenError] = []
        self.destroy_gate = open_gate()
        self.looks: list[Callable[[Witness], list[Leak]]] = []
        self.can_put_back: set[str] = set()
        self.loss = asyncio.Event()
        self.remove_gate = open_gate()
        self.further_clues: list[Clue] = []
        self.calls: list[tuple[str, str]] = []
        self.connected: set[str] = set()
        self.cpu_used_ns: dict[str, int] = {}
        self.throttled: set[str] = set()
        self._most = containers
        self._ports = range(61_001, 61_001 + ports)
        self._events: BackendEvents

    # --- leaks

    async def find_leaks(self, witness: Witness) -> list[Leak]:
        return self.looks.pop(0)(witness) if self.looks else []

    async def wait_for_loss(self) -> None:
        await self.loss.wait()
        self.loss.clear()

    async def put_back(self, leaks: list[Leak]) -> list[Leak]:
        self.calls.extend(("put_back", leak.name) for leak in leaks)
        return [leak for leak in leaks if leak.name in self.can_put_back]

    async def remove_leak(self, leak: Leak, claims: list[Claim]) -> bool:
        self.calls.append(("remove_leak", leak.name))
        await self.remove_gate.wait()
        return leak.handle not in {claim.handle for claim in claims}

    # --- start and stop

    async def open(self, events: BackendEvents, rows: list[ContainerRow]) -> None:
        self._events = events

    async def adopt(self, row: ContainerRow) -> None:
        await self.adopt_gate.wait()
        if row.state not in USABLE or row.handle not in self.host.containers:
            raise errors.ContainerBroken(row.handle, "its PID 1 is gone")
        self.connected.add(row.handle)

    async def close(self) -> None:
        for handle in self.connected:
            for process in self.host.containers[handle].processes.values():
                process.on_exit = _nobody_listens
        self.connected.clear()

    # --- containers

    async def capacity_told(self) -> None:
        """Nobody else is asked."""

    def capacity(self) -> HostCapacity:
        return HostCapacity(
            memory_bytes=1 << 34,
            disk_bytes=1 << 40,
            disk_free_bytes=1 << 39,
            containers=self._most,
            containers_limited_by="--network-pool",
            ports=len(self._ports),
            ports_in_use=len(self.host.ports),
            cpus=2,
        )

    def clues(self, handle: str, facts: dict[str, Any]) -> list[Clue]:
        return self.further_clues

    def pools(self) -> dict[str, PoolLevel]:
        return {"tcp_ports": PoolLevel(len(self._ports), len(self.host.ports))}

    def used_image(self, handle: str) -> UsedImage | None:
        return self.used_images.get(handle)

    async def create(
        self, spec: ContainerSpec, record: Record, report: Callable[[PullProgress], None]
    ) -> None:
        self.calls.append(("create", spec.handle))
        if spec.image:
            ref = parse_image(spec.image)
            if ref.transport is not Transport.PATH:
                self.used_images[spec.handle] = await self.images.use(ref, spec.image_auth, report)
            elif ref.path not in self.host.images:
                raise errors.ImageNotFound("spec.image", f"{spec.image} does not exist")
        address = self._lease_address()
        taken: list[PortMapping] = []
        try:
            for mapping in spec.port_mappings:
                taken.append(self._lease_port(mapping))
            record(_facts(address, taken))
            await self.create_gate.wait()
            if self.create_failure is not None:
                failure, self.create_failure = self.create_failure, None
                raise failure
        except BaseException:
            self._release(_facts(address, taken))
            raise
        self.host.containers[spec.handle] = FakeContainer(
            spec, address, tuple(taken), next(self.host.pids), in_force(spec.limits), spec.egress
        )
        self.connected.add(spec.handle)

    def _lease_address(self) -> int:
        free = next((n for n in range(2, 2 + self._most) if n not in self.host.addresses), None)
        if free is None:
            raise errors.PoolExhausted("addresses", self._most, "--network-pool")
        self.host.addresses.add(free)
        return free

    def _lease_port(self, wanted: PortMapping) -> PortMapping:
        port = wanted.host_port or next((p for p in self._ports if p not in self.host.ports), 0)
        if not port:
            raise errors.PoolExhausted("ports", len(self._ports), "--port-pool-size")
        if port in self.host.ports:
            raise errors.PortInUse(port)
        self.host.ports.add(port)
        return replace(wanted, host_port=port, container_port=wanted.container_port or port)

    def _release(self, facts: dict[str, Any]) -> None:
        self.host.addresses.discard(facts["address"])
        self.host.ports.difference_update(facts["ports"])

    async def destroy(self, handle: str, facts: dict[str, Any]) -> None:
        self.calls.append(("destroy", handle))
        await self.destroy_gate.wait()
        if self.destroy_failures:
            raise self.destroy_failures.pop(0)
        self.connected.discard(handle)
        container = self.host.containers.pop(handle, None)
        if facts:
            self._release(facts)
        if container is not None:
            for process in container.processes.values():
                process.finish(signal=9)

    def break_container(self, handle: str, reason: str) -> None:
        """PID 1 dies."""
        container = self.host.containers.pop(handle)
        self.connected.discard(handle)
        for process in container.processes.values():
            process.finish(signal=9)
        self._events.broken(handle, reason)

    def _get(self, handle: str) -> FakeContainer:
        if handle not in self.connected:
            raise errors.ContainerNotFound(handle)
        return self.host.containers[handle]

    def facts_of_network(self, handle: str) -> NetworkFacts:
        container = self._get(handle)
        return NetworkFacts(f"10.0.0.{container.address}", "10.0.0.1", "192.0.2.1", container.ports)

    def agent(self, handle: str) -> AgentFacts:
        self._get(handle)
        return AgentFacts("fake", 1)

    async def adopted(self, handle: str) -> None:
        """Nothing runs that the journal does not know."""

    def pid(self, handle: str) -> int:
        return self._get(handle).pid

    async def signal_all(self, handle: str, number: int) -> None:
        for process in self._get(handle).processes.values():
            await process.signal(number, group=False)

    def workload_count(self, handle: str) -> int:
        return sum(1 for process in self._get(handle).processes.values() if process.exit is None)

    def describe_workload(self, handle: str) -> str:
        left = [process.id for process in self._get(handle).processes.values() if process.exit is None]
        return f"{', '.join(left)} of a fake"

    async def usage(self, handle: str, process_id: str | None = None) -> Usage:
        if (gate := self.usage_gates.get(handle)) is not None:
            await gate.wait()
        limits = self._get(handle).limits
        if process_id is not None:
            process = self._get(handle).processes.get(process_id)
            if process is None:
                raise errors.ProcessNotFound(handle, process_id)
            if process.exit is not None:
                raise errors.ProcessExited(process_id)
            if not process.spec.has_own_group:
                raise errors.ProcessNotCounted(handle, process_id)
        return Usage(
            memory_bytes=4096,
            memory_limit_bytes=limits.memory_bytes or 0,
            pids=1 + self.workload_count(handle),
            pids_limit=limits.pids or 0,
            cpu_usage_ns=1,
        )

    def cpu_usage_ns(self, handle: str) -> int:
        return self.cpu_used_ns.get(handle, 1)

    async def balance_cpu(self, standings: Mapping[str, Standing], entitlement: Entitlement) -> None:
        self.throttled = {handle for handle, standing in standings.items() if standing.is_over}

    async def limits(self, handle: str, process_id: str | None = None) -> Limits:
        if process_id is not None:
            return self._limits_of(handle, self._limited(handle, process_id).spec)
        return self._get(handle).limits

    def _limits_of(self, handle: str, spec: ProcessSpec) -> Limits:
        stated = rlimits_over(spec.rlimits, () if spec.is_beside else self._get(handle).limits.rlimits)
        found = replace(in_force(spec.limits) if spec.has_own_group else Limits(), rlimits=stated)
        return found if spec.sidecar is not None else found.without_disk()

    def _limited(self, handle: str, process_id: str, changed: Limits | None = None) -> FakeProcess:
        process = self._get(handle).processes.get(process_id)
        if process is None:
            raise errors.ProcessNotFound(handle, process_id)
        if process.exit is not None:
            raise errors.ProcessExited(process_id)
        asked = self._limits_of(handle, process.spec) if changed is None else changed
        if not process.spec.has_own_group and (not asked.rlimits or not asked.without_rlimits().empty()):
            raise errors.ProcessNotLimited(handle, process_id)
        return process

    async def update_limits(
        self,
        handle: str,
        limits: Limits,
        process_id: str | None = None,
        *,
        record: Callable[[Limits], None] | None = None,
    ) -> Limits:
        record = record or (lambda _: None)
        memory = limits.over(await self.limits(handle, process_id)).memory_bytes
        if limits.swap_bytes is not None and not memory:
            raise errors.InvalidField("limits.swap_bytes", SWAP_NEEDS_MEMORY)
        if process_id is not None:
            process = self._limited(handle, process_id, limits)
            before = process.spec
            process.spec = replace(
                before,
                limits=limits.without_rlimits().over(before.limits),
                rlimits=rlimits_over(limits.rlimits, before.rlimits),
            )
            now = self._limits_of(handle, process.spec)
            try:
                record(now)
            except BaseException:
                process.spec = before
                raise
            return now
        container = self._get(handle)
        now = in_force(limits.over(container.limits))
        record(now)
        container.limits = now
        return now

    async def map_port(self, handle: str, mapping: PortMapping, record: Record) -> PortMapping:
        container = self._get(handle)
        leased = self._lease_port(mapping)
        try:
            record(_facts(container.address, (*container.ports, leased)))
        except BaseException:
            self.host.ports.discard(leased.host_port)
            raise
        container.ports = (*container.ports, leased)
        return leased

    async def set_egress(self, handle: str, policy: EgressPolicy) -> None:
        self._get(handle).policy = policy

    async def open_egress(
        self, handle: str, policy: EgressPolicy, opened: tuple[EgressRule, ...], *, bulk: bool
    ) -> None:
        self._get(handle).policy = policy

    async def explain_egress(self, handle: str, policy: EgressPolicy, destination: Destination) -> Decision:
        self._get(handle)
        return decide(policy, destination)

    async def egress_counts(self, handle: str, rules: int) -> EgressCounts:
        self._get(handle)
        return EgressCounts((RuleCount(),) * rules, RuleCount())

    # --- processes

    def end_fetches(self) -> None:
        """Nothing is fetched."""

    async def start_process(
        self, handle: str, spec: ProcessSpec, env: tuple[str, ...], record: Callable[[], None]
    ) -> FakeProcess:
        container = self._get(handle)
        tasks, limit = self.workload_count(handle), container.limits.pids
        if limit and tasks >= limit and not spec.is_beside:
            raise errors.TaskLimitReached(handle, tasks, limit)
        self.calls.append(("start", spec.id))
        record()
        await self.start_gate.wait()
        if spec.user.partition(":")[0] not in KNOWN_USERS:
            raise errors.UserNotFound(f"unable to find user {spec.user}: no matching entries in passwd file")
        if spec.path == "/etc/passwd":
            raise errors.NotExecutable(f"{spec.path}: permission denied")
        program = find_program(spec) if spec.path != "sh" or spec.args else None
        if program is None:
            raise errors.ExecutableNotFound(f"{spec.path}: executable file not found in $PATH")
        variables = {"PATH": "/bin", **dict(entry.split("=", 1) for entry in env)}
        killed = OutOfMemory(limit_bytes=container.limits.memory_bytes or 0)
        stdio = Stdio(spec, variables, out_of_memory=lambda: self._events.out_of_memory(handle, killed))
        if spec.tty is not None:
            stdio.stderr.close()
        process = FakeProcess(
            spec,
            next(self.host.pids),
            stdio,
            program,
            lambda ended: self._events.process_exited(handle, ended),
        )
        container.processes[spec.id] = process
        return process

    async def adopt_process(self, handle: str, row: ProcessRow, spec: ProcessSpec) -> FakeProcess:
        process = self._get(handle).processes[row.id]
        process.on_exit = lambda ended: self._events.process_exited(handle, ended)
        if row.exit is not None:
            process.exit = load_exit(row.exit)
        return process

    async def forget_process(self, handle: str, process_id: str) -> None:
        self._get(handle).processes.pop(process_id, None)

    # --- files

    async def stream_in(self, handle: str, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        container = self._get(handle)
        _check_user(user)
        data = b"".join([chunk async for chunk in chunks])
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                for member in archive:
                    found = archive.extractfile(member)
                    if found is not None:
                        container.files[f"{path.rstrip('/')}/{member.name}"] = found.read()
        except tarfile.TarError as error:
            raise errors.CopyFailed("broken_archive", str(error)) from error

    async def stream_out(self, handle: str, path: str, user: str) -> AsyncGenerator[bytes, None]:
        container = self._get(handle)
        _check_user(user)
        if path not in container.files:
            raise errors.CopyFailed("no_such_path", f"{path}: No such file or directory")
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            member = tarfile.TarInfo(path.rpartition("/")[2])
            member.size = len(container.files[path])
            archive.addfile(member, io.BytesIO(container.files[path]))
        yield packed.getvalue()


def _facts(address: int, ports: Sequence[PortMapping]) -> dict[str, Any]:
    return {"address": address, "ports": [mapping.host_port for mapping in ports]}


def _check_user(user: str) -> None:
    if user not in KNOWN_USERS:
        raise errors.UserNotFound(f"unable to find user {user}: no matching entries in passwd file")


def _nobody_listens(process: FakeProcess) -> None:
    """The server is gone; whoever adopts the process next sees its exit."""


def open_gate() -> asyncio.Event:
    """An event that is set: nobody waits at it until somebody clears it."""
    gate = asyncio.Event()
    gate.set()
    return gate
