"""A container that runs: its agent, its processes, its cgroups."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from garden_py.backend.boot import read_boot_id
from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.events import OomWatch
from garden_py.backend.cgroup.layout import WORK, ContainerCgroup
from garden_py.backend.cgroup.limits import read_limits
from garden_py.backend.cgroup.stats import met_own_limit, read_oom_kills, read_task_room
from garden_py.backend.host.framed import OTHER_SIDE_CLOSED
from garden_py.backend.host.pids import ProcessIdentity, describe_exit, has_ended, read_exit_status
from garden_py.backend.linux.agent_owner import AgentOwner
from garden_py.backend.linux.isolation import Isolation
from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.linux.process import LinuxProcess, OomAccount
from garden_py.backend.linux.starts import Starts
from garden_py.backend.linux.task_room import TaskRoom
from garden_py.backend.streams.agent_link import AgentLink
from garden_py.backend.streams.agent_replies import AgentExit
from garden_py.model.errors import ContainerBroken
from garden_py.model.limits import Limits, Rlimits, rlimits_over
from garden_py.model.netrule import EgressPolicy
from garden_py.model.process import ProcessSpec
from garden_py.observe.apart import apart
from garden_py.service.ports import BackendEvents, OutOfMemory

if TYPE_CHECKING:
    from garden_py.backend.linux.sidecars import Sidecar

T = TypeVar("T")
# Removed before open(2), and between it and read(2) as cgroups and as links' statistics say it.
_PID_1_ENDED = "its PID 1 has ended"
BEING_DESTROYED = "it is being destroyed"
_END_TOLD_S = 0.1
"""After the first sign that PID 1 ends: until then it is found out how, if it can be."""
_GONE = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
COPY_PREFIX = ".copy-"  # names of the agent's own helpers; no caller's process id begins with a dot


@dataclass(slots=True)
class ContainerFacts:
    """Everything needed to find and remove what was made for a container, even by another server process.

    Attributes:
        uid_slot: its range in the uid pool; -1 for a privileged container, and for one with the mapping that all share.
        pid: PID 1 as the host numbers it; 0 before it was started.
        pid_start: its start time in clock ticks, which tells it from a later process of that number.
        boot: the boot of the machine that pid and pid_start are of.
        isolation: what it was made with; None: by a server that did not take it down.
        throttleable: its cgroups are where --enable-cpu-throttling puts them on cgroup v1.
        scope: the cgroup of systemd's scope that it is in; empty: --cgroup-driver was cgroupfs.
        image_plugins: those that its root file system is to be removed by; none: it is the server's own affair.
    """

    runtime_id: str
    privileged: bool
    lease: NetworkLease
    uid_slot: int
    pid: int = 0
    pid_start: int = 0
    boot: str = field(default_factory=read_boot_id)
    isolation: Isolation | None = None
    throttleable: bool = False
    scope: str = ""
    image_plugins: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        return {**{k: v for k, v in asdict(self).items() if k != "lease"}, "lease": self.lease.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ContainerFacts:
        """From the journal."""
        isolation = value.get("isolation")
        return cls(
            **{
                **value,
                "lease": NetworkLease.from_json(value["lease"]),
                "isolation": None if isolation is None else Isolation(**isolation),
                "image_plugins": tuple(map(tuple, value.get("image_plugins", ()))),
            }
        )

    @property
    def identity(self) -> ProcessIdentity | None:
        """PID 1, if it was ever started in this boot: after another one its number is somebody else's."""
        return ProcessIdentity(self.pid, self.pid_start) if self.pid and self.boot == read_boot_id() else None


class LinuxContainer(AgentOwner):
    """One running container.

    Args:
        events: told of exits, out-of-memory and a lost agent.

    Attributes:
        broken_because: why it can only be destroyed; empty while it is whole.
        image: as its spec has it.
        disk: its limits on that, as stated.
        bandwidth: its limits on that, as stated.
        rlimits: of its processes, as stated.
        stated: all its limits when it was taken over, as the journal has them.
        helper_pids: of the agent's processes that copy files, as the container numbers them.
        policy: its egress policy when it was taken over; None: made by this server.
        sidecars: agents besides PID 1, by the process that each of them was started for (linux/sidecars.py).
        retiring: removals of sidecars under way, by process.
        jobs: starts and removals of sidecars under way.
        throttled: it has used more CPU time than it is entitled to, and gets what others leave.
    """

    def __init__(
        self,
        handle: str,
        facts: ContainerFacts,
        cgroup: ContainerCgroup,
        directory: Path,
        events: BackendEvents,
    ) -> None:
        super().__init__(handle)
        self.facts = facts
        self.cgroup = cgroup
        self.directory = directory
        self.processes: dict[str, LinuxProcess] = {}
        self.helpers: dict[str, asyncio.Future[AgentExit]] = {}
        self.sidecars: dict[str, Sidecar] = {}
        self.retiring: dict[str, asyncio.Future[None]] = {}
        self.jobs: set[asyncio.Future[Any]] = set()
        self.image = ""
        self.disk = Limits()
        self.bandwidth = Limits()
        self.rlimits: Rlimits = ()
        self.stated = Limits()
        self.starts = Starts()
        self.task_room = TaskRoom(handle, self._read_task_room)
        self.helper_pids: set[int] = set()
        self.policy: EgressPolicy | None = None
        self._events = events
        self.spawning: set[str] = set()
        self._untold_oom: list[OutOfMemory] = []
        self._early_exits: dict[str, AgentExit] = {}
        self._watches: dict[str, OomWatch] = {}
        self._pidfd = -1
        self._losing: asyncio.TimerHandle | None = None
        self.throttled = False
        self._default_groups: dict[bool, list[int]] = {}
        self._shared_oom = self._oom_account(cgroup.leaf(None))

    def _read_task_room(self) -> tuple[int, int]:
        with may_be_gone(self.handle):
            return read_task_room(self.cgroup)

    def _oom_account(self, leaf: tuple[str, ...]) -> OomAccount:
        return OomAccount(lambda: read_oom_kills(self.cgroup, leaf))

    # --- the agent

    def connect(self, socket_path: Path, *, patience_s: float) -> None:
        """Connect to the agent's socket. The answer to `greet` tells whether it lives.

        Args:
            socket_path: of the agent.
            patience_s: see AgentLink.
        """
        self._connect(socket_path, patience_s=patience_s, on_exit=self.exited, on_lost=self._lost)

    def track(self, job: asyncio.Future[Any]) -> None:
        """Hold a job about a sidecar, or a plugin's, until it is done or the container goes."""
        self.jobs.add(job)
        job.add_done_callback(self.jobs.discard)

    async def until_it_goes(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work that must have ended when the container's removal begins.

        Raises:
            ContainerBroken: it has begun.
        """
        job = asyncio.ensure_future(work)
        self.track(job)
        try:
            return await job
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ContainerBroken(self.handle, BEING_DESTROYED) from None

    def watch(self, pidfd: int) -> None:
        """Be told when PID 1 ends, and when the workload runs out of memory.

        Args:
            pidfd: of PID 1; owned from here on.
        """
        loop = asyncio.get_running_loop()
        self._pidfd = pidfd
        apart(loop.add_reader, self._pidfd, self._lost, _PID_1_ENDED)
        self.watch_oom("", self.cgroup.leaf(None))

    def watch_oom(self, process_id: str, leaf: tuple[str, ...]) -> None:
        """Watch one more cgroup: that of a process counted by itself, or, with no id, that of all others."""

        def tell(kills: int) -> None:
            self._events.out_of_memory(self.handle, self._killed(process_id, leaf, kills))

        directory = self.cgroup.directory("memory", *leaf)
        watch = OomWatch(directory, self.cgroup.hierarchies.version, tell)
        self._watches[process_id] = watch
        apart(asyncio.get_running_loop().add_reader, watch.fileno(), watch.acknowledge)

    def remember_oom(self, process: LinuxProcess) -> None:
        """If a process has run out of memory while no server watched its group, `tell_oom` will say so."""
        if process.exit is not None and process.exit.out_of_memory:
            self._untold_oom.append(self._killed(process.id, self.leaf_of(process.spec), 1))

    def heed_exit(self, process: LinuxProcess) -> None:
        """An earlier server has told how a process ended: if that was an OOM kill, it explains no other's end."""
        if process.exit is not None and process.exit.out_of_memory and not process.own_group:
            self._shared_oom.explains_another()

    def tell_oom(self) -> None:
        """Tell what was remembered, now that whoever is told knows the container's processes."""
        while self._untold_oom:
            self._events.out_of_memory(self.handle, self._untold_oom.pop(0))

    def _hear_oom(self, process_id: str) -> None:
        """The kernel counts an OOM kill before the victim ends, or its parent, but the agent may be heard first."""
        watch = self._watches.get(process_id)
        if watch is not None:
            watch.acknowledge()

    def unwatch_oom(self, process_id: str) -> None:
        """Stop watching it; absent is fine."""
        watch = self._watches.pop(process_id, None)
        if watch is not None:
            asyncio.get_running_loop().remove_reader(watch.fileno())
            watch.close()

    def _lost(self, reason: str) -> None:
        """The agent is gone, or of no use any more; every process goes with it."""
        if self.broken_because or self._losing is not None:
            return
        if reason in (OTHER_SIDE_CLOSED, _PID_1_ENDED) and self._pidfd >= 0:
            # A process's files are closed before it has ended, and it has ended before somebody may know how.
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._pidfd)
            self._losing = apart(loop.call_later, _END_TOLD_S, self._lost_for_good, reason)
        else:
            self._lost_for_good(reason)

    def _lost_for_good(self, reason: str) -> None:
        if self.broken_because:
            return
        if reason in (OTHER_SIDE_CLOSED, _PID_1_ENDED) and self._pidfd >= 0:
            status = read_exit_status(self._pidfd, self.facts.pid)
            if status is not None:
                reason = f"its PID 1 {describe_exit(status)}"
            elif has_ended(self._pidfd):
                reason = _PID_1_ENDED
        self.broken_because = reason
        self.give_up()
        self.end_all(f"container broken: {reason}")
        self._events.broken(self.handle, reason)

    def give_up(self) -> None:
        """End PID 1, and with it everything in the container.

        So what is told of a broken container's processes is true: they have ended. An agent that was stopped
        (SIGSTOP) cannot come back either and go on with processes that nobody knows any more.
        """
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

    def end_all(self, reason: str) -> None:
        """Let go of the agent and report every running process as ended."""
        self.unwatch()
        self._close_links()
        now_ns = time.time_ns()
        for future in self.helpers.values():
            if not future.done():
                future.set_exception(ContainerBroken(self.handle, reason))
        for process in self.processes.values():
            if process.exit is None:
                process.lost(reason, now_ns)
                self._events.process_exited(self.handle, process)

    def condemn(self) -> None:
        """Its destroy begins: who asks its agent for something, or is doing so, learns that, not how it ended."""
        self.broken_because = BEING_DESTROYED
        if self._link is not None:
            self._link.expect_end(BEING_DESTROYED)
        self.unwatch()

    def unwatch(self) -> None:
        """Take our descriptors out of the event loop; twice is fine."""
        if self._losing is not None:
            self._losing.cancel()
        for process_id in list(self._watches):
            self.unwatch_oom(process_id)
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        for fds in self._default_groups.values():
            while fds:
                os.close(fds.pop())

    def _close_links(self) -> None:
        for owner in (*self.sidecars.values(), self):
            owner.disconnect()

    def let_go(self) -> None:
        """Close everything without touching the container; for a server that stops."""
        self.unwatch()
        for job in self.jobs:
            job.cancel()
        self._close_links()
        for process in self.processes.values():
            process.let_go()

    # --- processes

    def exited(self, told: AgentExit) -> None:
        """An agent tells of a process's end."""
        helper = self.helpers.get(told.process_id)
        process = self.processes.get(told.process_id)
        if helper is not None and not helper.done():
            helper.set_result(told)
        elif process is None:
            # It ended before the answer to its spawn was handled; only ids being spawned are waited for.
            if told.process_id in self.spawning:
                self._early_exits[told.process_id] = told
        elif process.exit is None:
            process.ended(told)
            self._hear_oom(told.process_id if process.own_group else "")
            if process.own_group:
                self.unwatch_oom(told.process_id)
            self._events.process_exited(self.handle, process)

    def add_process(self, process: LinuxProcess) -> None:
        """Make a started process known; an exit that came early is delivered now."""
        self.processes[process.id] = process
        early = self._early_exits.pop(process.id, None)
        if early is not None:
            self.exited(early)

    def make_process(
        self,
        spec: ProcessSpec,
        *,
        pid: int,
        started_ns: int,
        directory: Path,
        retention_bytes: int,
        link: AgentLink | None,
        drop_group: Callable[[], None],
        recover: bool = False,
    ) -> LinuxProcess:
        """A LinuxProcess wired to its agent and this container's cgroups; arguments as LinuxProcess's."""
        leaf = self.leaf_of(spec)
        return LinuxProcess(
            spec,
            pid=pid,
            started_ns=started_ns,
            directory=directory,
            retention_bytes=retention_bytes,
            recover=recover,
            link=link,
            oom=self._oom_account(leaf) if spec.has_own_group else self._shared_oom,
            describe_oom=lambda: self._describe_oom(leaf),
            drop_group=drop_group,
        )

    def _describe_oom(self, leaf: tuple[str, ...]) -> str:
        """The memory limit that was hit: the process's own, or that of all the container's processes."""
        at = limit_leaf(leaf)
        if at == (WORK,) or leaf[0] != WORK:
            return describe_memory_limit(read_limits(self.cgroup, leaf=at))
        if self._was_own_limit(leaf):
            return describe_memory_limit(read_limits(self.cgroup, leaf=at), "the process's own ")
        return describe_memory_limit(read_limits(self.cgroup), "the container's ")

    def _killed(self, process_id: str, leaf: tuple[str, ...], kills: int) -> OutOfMemory:
        """What to tell of so many kills in leaf, with the limit that was the reason."""
        at = limit_leaf(leaf)
        own = at != (WORK,) and (leaf[0] != WORK or self._was_own_limit(leaf))
        limit_bytes = read_limits(self.cgroup, leaf=at if own else (WORK,)).memory_bytes or 0
        if own:
            return OutOfMemory(process_id, "", limit_bytes, kills)
        return OutOfMemory("", process_id if at != (WORK,) else "", limit_bytes, kills)

    def _was_own_limit(self, leaf: tuple[str, ...]) -> bool:
        """Whether processes in leaf that were killed had a limit of their own, and met it."""
        at = limit_leaf(leaf)
        if at == (WORK,):
            return False
        directory, version = self.cgroup.directory("memory", *at), self.cgroup.hierarchies.version
        limited = read_limits(self.cgroup, leaf=at).memory_bytes
        return bool(limited) and (leaf[0] != WORK or met_own_limit(directory, version))

    @contextmanager
    def group_fds(self, leaf: tuple[str, ...]) -> Iterator[list[int]]:
        """Descriptors through which a process joins leaf. Those of the common leaf stay open from one to the next.

        Raises:
            ContainerBroken: somebody has removed the cgroup.
        """
        if leaf == self.cgroup.leaf(None):
            fds = self._default_groups.setdefault(self.throttled, [])
            if not fds:
                fds += self._open_group(leaf)
            yield fds
            return
        fds = self._open_group(leaf)
        try:
            yield fds
        finally:
            for fd in fds:
                os.close(fd)

    def _open_group(self, leaf: tuple[str, ...]) -> list[int]:
        with may_be_gone(self.handle):
            return groups.open_procs(self.cgroup, leaf, throttled=self.throttled)

    def leaf_of(self, spec: ProcessSpec) -> tuple[str, ...]:
        """The cgroup that a process's tasks go to."""
        return self.cgroup.leaf(spec.id if spec.has_own_group else None, beside=spec.is_beside)

    def rlimits_for(self, spec: ProcessSpec) -> Rlimits:
        """What a process and its container state together; a sidecar beside the container's limits has none of its."""
        return rlimits_over(spec.rlimits, () if spec.is_beside else self.rlimits)

    def drop_process_group(self, leaf: tuple[str, ...]) -> None:
        """Remove a finished process's own cgroup, if its last child has gone too."""
        groups.remove_process_group(self.cgroup, leaf)


@contextmanager
def may_be_gone(handle: str) -> Iterator[None]:
    """Tell a cgroup or link that somebody has removed as what it is: the container's end, not the server's fault."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise ContainerBroken(handle, f"{error.filename or 'its cgroup or link'} is gone") from error


def limit_leaf(leaf: tuple[str, ...]) -> tuple[str, ...]:
    """Where the limits are that apply to processes in leaf: on `work` for those without limits of their own."""
    return leaf if leaf[-1].startswith("p-") else (WORK,)


def describe_memory_limit(limits: Limits, whose: str = "") -> str:
    """Which memory limit a process ran into.

    Args:
        limits: that it was under.
        whose: put before the limit, where it could be somebody else's.
    """
    if limits.memory_bytes:
        return f"{whose}limit {limits.memory_bytes} bytes"
    return "the host has no memory left"
