"""Resource limits: what callers ask for, and the arithmetic between cgroup v1 and v2 units."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum

from .errors import FieldViolation

# A process is forked from the agent inside the limited cgroup; below this even `true` is killed by the kernel
# before it starts (tests/root/test_limits.py starts one at the floor).
MEMORY_FLOOR_BYTES = 4 << 20
PIDS_FLOOR = 1
DISK_FLOOR_INODES = 16
DISK_FLOOR_BYTES = 256 << 10  # Garden statement D8; an empty layer takes some of it
CPU_WEIGHT_RANGE = (1, 10_000)
CPU_SHARES_RANGE = (2, 262_144)
CPU_QUOTA_FLOOR_US = 1_000
CPU_PERIOD_RANGE_US = (1_000, 1_000_000)
CPU_PERIOD_DEFAULT_US = 100_000
IO_WEIGHT_RANGE = (1, 10_000)
IO_RATES = ("io_read_bytes_per_s", "io_write_bytes_per_s", "io_read_ops_per_s", "io_write_ops_per_s")
IO_OPS_MAX = (1 << 32) - 2  # UINT_MAX stands for "no limit" (block/blk-throttle.c)
IO_FLOOR_BYTES_PER_S = 4096  # a page: less would hold up a single fault for seconds
SWAP_NEEDS_MEMORY = "needs a memory limit (memory_bytes), and stands for swap on top of that"
NO_PROCESS_DISK = "only containers and sidecars have disk space of their own"
NO_PROCESS_IO = "only the transfers of a whole container can be limited"
UINT63_MAX = (1 << 63) - 1
RLIMIT_NAMES = frozenset(
    (
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    )
)
RLIM_INFINITY = (1 << 64) - 1
SWAP_UNLIMITED = (1 << 64) - 1  # for 0 is no swap
Rlimits = tuple[tuple[str, int], ...]
_CPU_SHARE = frozenset(("cpu_weight", "cpu_shares"))
_MEMORY = frozenset(("memory_bytes", "swap_bytes"))
NO_PROCESS_NETWORK = "a process has the bandwidth of its container"
NETWORK_LIMITS = ("network_rx_bytes_per_s", "network_tx_bytes_per_s", "network_burst_bytes")
NETWORK_RATE_RANGE = (1 << 10, 1 << 40)
NETWORK_BURST_RANGE = (4 << 10, 1 << 30)  # a whole packet must fit


class DiskScope(Enum):
    """What a limit on disk space counts: what the container wrote, or its image as well."""

    EXCLUSIVE = "exclusive"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a container or of one process tree in it. None means "no statement"; 0 means "unlimited".

    Attributes:
        memory_bytes: all processes together, without swap.
        swap_bytes: how much swap may be used on top of that; 2^64-1 is unlimited, 0 none. Only with a memory limit.
        cpu_weight: share under contention, 1 to 10000, as cgroup v2's cpu.weight; the kernel's default is 100.
        cpu_shares: the same as cgroup v1's cpu.shares, 2 to 262144, whose default is 1024; goes before cpu_weight. What
            is not asked for in shares is not told in them, except by v1, which keeps nothing else.
        cpu_quota_us: CPU time in µs per period, cgroup v2's cpu.max.
        cpu_period_us: length of the period in µs.
        pids: processes and threads together.
        disk_bytes: disk space, as disk_scope counts it.
        disk_inodes: files, directories and whatever else has an inode, of what the container wrote.
        disk_scope: what disk_bytes counts; None with disk_bytes stated: what the container wrote.
        network_rx_bytes_per_s: what the container's link may receive, in bytes per second on the wire.
        network_tx_bytes_per_s: what it may send.
        network_burst_bytes: how much of either may pass at once after a pause; None or 0: the server's choice.
        io_weight: share of the writable layer's block device under contention, 1 to 10000, as cgroup v2's io.weight.
        io_read_bytes_per_s, io_write_bytes_per_s, io_read_ops_per_s, io_write_ops_per_s: transfers with that device.
        rlimits: resource name in lower case (getrlimit(2) without RLIMIT_) to soft and hard value, in order of names; a
            resource that is not named has no statement. Of a container: for processes that do not state it themselves.
    """

    memory_bytes: int | None = None
    cpu_weight: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    pids: int | None = None
    cpu_shares: int | None = None
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
    rlimits: Rlimits = ()
    swap_bytes: int | None = None

    def over(self, older: Limits) -> Limits:
        """These limits, with older's value wherever this has no statement."""
        stated = {
            each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None
        }
        if not _CPU_SHARE.isdisjoint(stated):  # two ways to say one thing
            older = replace(older, cpu_weight=None, cpu_shares=None)
        found = replace(older, **{**stated, "rlimits": rlimits_over(self.rlimits, older.rlimits)})
        return replace(found, swap_bytes=None) if found.memory_bytes == 0 else found

    def those_of(self, older: Limits) -> Limits:
        """Of older, what this makes a statement about; of rlimits nothing."""
        stated = {each.name for each in fields(self) if getattr(self, each.name) is not None} - {"rlimits"}
        for together in (_CPU_SHARE, _MEMORY):  # a change of one can change the other
            if not stated.isdisjoint(together):
                stated.update(together)
        return Limits(**{name: getattr(older, name) for name in stated})

    @property
    def states_disk(self) -> bool:
        """Whether anything is said about disk space."""
        return any(value is not None for value in (self.disk_bytes, self.disk_inodes, self.disk_scope))

    @property
    def states_io(self) -> bool:
        """Whether anything is said about transfers with the block device."""
        return any(getattr(self, name) is not None for name in ("io_weight", *IO_RATES))

    def only_io(self) -> Limits:
        """Of these, those of transfers with the block device."""
        return Limits(**{name: getattr(self, name) for name in ("io_weight", *IO_RATES)})

    def without_rlimits(self) -> Limits:
        """The same without resource limits."""
        return replace(self, rlimits=())

    def without_disk(self) -> Limits:
        """The same without a word about disk space: what is left is the processes'."""
        return replace(self, disk_bytes=None, disk_inodes=None, disk_scope=None)

    def disk_only(self) -> Limits:
        """What it says about disk space, and nothing else."""
        return Limits(disk_bytes=self.disk_bytes, disk_inodes=self.disk_inodes, disk_scope=self.disk_scope)

    @property
    def states_network(self) -> bool:
        """Whether anything is said about bandwidth."""
        return any(getattr(self, name) is not None for name in NETWORK_LIMITS)

    def network_only(self) -> Limits:
        """What it says about bandwidth, and nothing else."""
        return Limits(
            network_rx_bytes_per_s=self.network_rx_bytes_per_s,
            network_tx_bytes_per_s=self.network_tx_bytes_per_s,
            network_burst_bytes=self.network_burst_bytes,
        )

    def empty(self) -> bool:
        """Whether no field states anything."""
        return self == Limits()


def rlimits_over(rlimits: Rlimits, older: Rlimits) -> Rlimits:
    """Resource limits, with older's where these name none; in order of names."""
    return tuple(sorted({**dict(older), **dict(rlimits)}.items()))


def format_rlimit(name: str, value: int) -> str:
    """`nofile=1024`, or `nofile=unlimited`."""
    return f"{name}={'unlimited' if value == RLIM_INFINITY else value}"


def rlimit_violations(rlimits: Iterable[tuple[str, int]], prefix: str) -> list[FieldViolation]:
    """Resources that there are not, and values that are none, named as `prefix[name]`."""
    found: list[FieldViolation] = []
    for name, value in rlimits:
        if name not in RLIMIT_NAMES:
            problem = f"unknown; known: {', '.join(sorted(RLIMIT_NAMES))}"
            found.append(FieldViolation(f"{prefix}[{name}]", problem))
        elif not 0 <= value <= RLIM_INFINITY:
            found.append(FieldViolation(f"{prefix}[{name}]", "must be 0 to 2^64-1 (unlimited)"))
    return found


def limit_violations(limits: Limits, prefix: str) -> list[FieldViolation]:
    """All fields out of range, named below prefix (for example `limits`)."""
    found: list[FieldViolation] = []

    def check(name: str, value: int | None, low: int, high: int, *, zero_is_unlimited: bool) -> None:
        if value is None or (value == 0 and zero_is_unlimited) or low <= value <= high:
            return
        zero = "0 (unlimited) or " if zero_is_unlimited else ""
        found.append(FieldViolation(f"{prefix}.{name}", f"is {value}; allowed: {zero}{low} to {high}"))

    check("memory_bytes", limits.memory_bytes, MEMORY_FLOOR_BYTES, UINT63_MAX, zero_is_unlimited=True)
    if limits.swap_bytes is not None:
        if not 0 <= limits.swap_bytes <= UINT63_MAX and limits.swap_bytes != SWAP_UNLIMITED:
            problem = f"is {limits.swap_bytes}; allowed: 0 to {UINT63_MAX} or {SWAP_UNLIMITED} (unlimited)"
            found.append(FieldViolation(f"{prefix}.swap_bytes", problem))
        elif limits.memory_bytes == 0:
            found.append(FieldViolation(f"{prefix}.swap_bytes", SWAP_NEEDS_MEMORY))
    check("cpu_weight", limits.cpu_weight, *CPU_WEIGHT_RANGE, zero_is_unlimited=False)
    check("cpu_shares", limits.cpu_shares, *CPU_SHARES_RANGE, zero_is_unlimited=False)
    check("cpu_quota_us", limits.cpu_quota_us, CPU_QUOTA_FLOOR_US, UINT63_MAX // 1000, zero_is_unlimited=True)
    check("cpu_period_us", limits.cpu_period_us, *CPU_PERIOD_RANGE_US, zero_is_unlimited=False)
    check("pids", limits.pids, PIDS_FLOOR, 4_194_304, zero_is_unlimited=True)  # PID_MAX_LIMIT, proc(5)
    check("disk_bytes", limits.disk_bytes, DISK_FLOOR_BYTES, UINT63_MAX, zero_is_unlimited=True)
    check("disk_inodes", limits.disk_inodes, DISK_FLOOR_INODES, UINT63_MAX, zero_is_unlimited=True)
    for name in ("network_rx_bytes_per_s", "network_tx_bytes_per_s"):
        check(name, getattr(limits, name), *NETWORK_RATE_RANGE, zero_is_unlimited=True)
    check("network_burst_bytes", limits.network_burst_bytes, *NETWORK_BURST_RANGE, zero_is_unlimited=True)
    check("io_weight", limits.io_weight, *IO_WEIGHT_RANGE, zero_is_unlimited=False)
    for name in IO_RATES:
        counts_bytes = "bytes" in name
        low, high = (IO_FLOOR_BYTES_PER_S, UINT63_MAX) if counts_bytes else (1, IO_OPS_MAX)
        check(name, getattr(limits, name), low, high, zero_is_unlimited=True)
    if limits.disk_scope is not None and limits.disk_bytes is None:
        found.append(FieldViolation(f"{prefix}.disk_scope", "needs disk_bytes"))
    return found + rlimit_violations(limits.rlimits, f"{prefix}.rlimits")


def incomplete_limits(limits: Limits, prefix: str) -> list[FieldViolation]:
    """What the limits of something new may not state without something else, which there is not yet."""
    found: list[FieldViolation] = []
    if limits.cpu_period_us is not None and limits.cpu_quota_us is None:
        found.append(FieldViolation(f"{prefix}.cpu_period_us", "needs cpu_quota_us"))
    if limits.swap_bytes is not None and limits.memory_bytes is None:
        found.append(FieldViolation(f"{prefix}.swap_bytes", SWAP_NEEDS_MEMORY))
    return found


def process_limit_violations(limits: Limits, prefix: str) -> list[FieldViolation]:
    """As limit_violations, for a running process: memory, CPU, tasks, rlimits, and a sidecar's disk space."""
    found = limit_violations(limits, prefix)
    return found + container_only_violations(limits, prefix)


def container_only_violations(limits: Limits, prefix: str) -> list[FieldViolation]:
    """What is stated of a process and only containers have, each by its name."""
    problems = {
        **dict.fromkeys(("io_weight", *IO_RATES), NO_PROCESS_IO),
        **dict.fromkeys(NETWORK_LIMITS, NO_PROCESS_NETWORK),
    }
    return [
        FieldViolation(f"{prefix}.{name}", problem)
        for name, problem in problems.items()
        if getattr(limits, name) is not None
    ]


def shares_from_weight(weight: int) -> int:
    """Shares (cgroup v1 cpu.shares) with the same ratio to the default: 100 is to 1024 as weight is to the result.

    Args:
        weight: 1 to 10000.

    Returns:
        2 (the kernel's floor) to 102400.
    """
    return max(2, round(weight * 1024 / 100))


def weight_from_shares(shares: int) -> int:
    """The cgroup v2 cpu.weight for v1 shares as runtimes convert it today.

    Args:
        shares: 2 to 262144; outside values are clamped.

    Returns:
        1 to 10000; 1024 shares give 100.

    Source: Garden behaviour, statement CP2.
    """
    if shares <= 2:
        return 1
    if shares >= 262_144:
        return 10_000
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))
