"""From limits to cgroup files and back. `plan_writes` and `parse_max` are pure, `write_` and `read_limits` act."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from garden_py.backend.cgroup.layout import WORK, ContainerCgroup
from garden_py.backend.cgroup.weight import is_scaled, read_weight, rescale
from garden_py.model.errors import HostFault, LimitRefused
from garden_py.model.limits import CPU_PERIOD_DEFAULT_US, Limits, shares_from_weight, weight_from_shares

# memory.limit_in_bytes of an unlimited v1 group reads as LONG_MAX rounded down to pages (cgroup-v1/memory.rst).
V1_UNLIMITED_BYTES = 1 << 62
V1_DEFAULT_SHARES = 1024


@dataclass(frozen=True, slots=True)
class LimitWrite:
    """One value for one file.

    Attributes:
        below: "" for the container's own directory, else the directory below it.
        field: the limit it comes from, for error messages.
        optional: the file may be missing (swap accounting switched off).
    """

    controller: str
    below: tuple[str, ...]
    file: str
    value: str
    field: str
    optional: bool = False


def plan_writes(limits: Limits, version: int, *, leaf: tuple[str, ...] = (WORK,)) -> list[LimitWrite]:
    """The writes that put limits in force; fields without a statement cause none.

    Args:
        limits: as asked for; 0 means unlimited.
        version: 1 or 2.
        leaf: directory that carries the limits; the CPU weight of a whole container goes on the container itself.
    """
    weight_at: tuple[str, ...] = () if leaf == (WORK,) else leaf
    return _plan_v1(limits, leaf, weight_at) if version == 1 else _plan_v2(limits, leaf, weight_at)


def _plan_v1(limits: Limits, leaf: tuple[str, ...], weight_at: tuple[str, ...]) -> list[LimitWrite]:
    writes: list[LimitWrite] = []
    if limits.memory_bytes is not None:
        value = str(limits.memory_bytes or -1)
        writes += [
            LimitWrite("memory", leaf, "memory.limit_in_bytes", value, "memory_bytes"),
            LimitWrite("memory", leaf, "memory.memsw.limit_in_bytes", value, "memory_bytes", optional=True),
        ]
    if limits.cpu_shares is not None:
        writes.append(LimitWrite("cpu", weight_at, "cpu.shares", str(limits.cpu_shares), "cpu_shares"))
    elif limits.cpu_weight is not None:
        shares = str(shares_from_weight(limits.cpu_weight))
        writes.append(LimitWrite("cpu", weight_at, "cpu.shares", shares, "cpu_weight"))
    if limits.cpu_period_us is not None:
        writes.append(
            LimitWrite("cpu", leaf, "cpu.cfs_period_us", str(limits.cpu_period_us), "cpu_period_us")
        )
    if limits.cpu_quota_us is not None:
        writes.append(
            LimitWrite("cpu", leaf, "cpu.cfs_quota_us", str(limits.cpu_quota_us or -1), "cpu_quota_us")
        )
    if limits.pids is not None:
        writes.append(LimitWrite("pids", leaf, "pids.max", str(limits.pids or "max"), "pids"))
    return writes


def _plan_v2(limits: Limits, leaf: tuple[str, ...], weight_at: tuple[str, ...]) -> list[LimitWrite]:
    writes: list[LimitWrite] = []
    if limits.memory_bytes is not None:
        writes.append(
            LimitWrite("memory", leaf, "memory.max", str(limits.memory_bytes or "max"), "memory_bytes")
        )
        swap = "0" if limits.memory_bytes else "max"
        writes.append(LimitWrite("memory", leaf, "memory.swap.max", swap, "memory_bytes", optional=True))
    if limits.cpu_shares is not None:
        weight = str(weight_from_shares(limits.cpu_shares))
        writes.append(LimitWrite("cpu", weight_at, "cpu.weight", weight, "cpu_shares"))
    elif limits.cpu_weight is not None:
        writes.append(LimitWrite("cpu", weight_at, "cpu.weight", str(limits.cpu_weight), "cpu_weight"))
    if limits.cpu_quota_us is not None:
        quota = str(limits.cpu_quota_us or "max")
        period = limits.cpu_period_us or CPU_PERIOD_DEFAULT_US
        writes.append(LimitWrite("cpu", leaf, "cpu.max", f"{quota} {period}", "cpu_quota_us"))
    if limits.pids is not None:
        writes.append(LimitWrite("pids", leaf, "pids.max", str(limits.pids or "max"), "pids"))
    return writes


def write_limits(cgroup: ContainerCgroup, limits: Limits, *, leaf: tuple[str, ...] = (WORK,)) -> None:
    """Put limits in force.

    Raises:
        LimitRefused: the kernel refuses a value, for example a memory limit below what is in use.
        HostFault: a file cannot be written for another reason.
    """
    writes = plan_writes(limits, cgroup.hierarchies.version, leaf=leaf)
    memory = cgroup.directory("memory", *leaf)
    if cgroup.hierarchies.version == 1 and _raises_memory_limit(memory, limits):
        # limit ≤ memsw must hold after every single write: widen memsw first, narrow it last.
        writes.sort(key=lambda write: write.file == "memory.limit_in_bytes")
    if cgroup.hierarchies.version == 2:
        _refuse_below_usage(memory, limits)
    for write in writes:
        if write.file == "cpu.weight" and not write.below and is_scaled(cgroup):
            rescale(cgroup, int(write.value))
            continue
        _write(cgroup.directory(write.controller, *write.below, write.file), write)
        twin = cgroup.twin_directory(write.below) if write.controller == "cpu" else None
        if twin is not None:
            _write(twin / write.file, write)


def _write(path: Path, write: LimitWrite) -> None:
    try:
        path.write_text(write.value)
    except OSError as error:
        if write.optional and error.errno in (errno.ENOENT, errno.EACCES):
            return
        if error.errno in (errno.EBUSY, errno.EINVAL, errno.ERANGE):
            problem = f"the kernel refuses {write.value} for {write.file}: {error.strerror}"
            raise LimitRefused(f"limits.{write.field}", problem) from error
        raise HostFault("write limits", f"{path}: {error.strerror}") from error


def change_limits(cgroup: ContainerCgroup, limits: Limits, *, leaf: tuple[str, ...] = (WORK,)) -> Limits:
    """Put limits in force, all of them or none; those in force then.

    Args:
        cgroup: of the container.
        limits: what is not stated stays.
        leaf: which group of it carries them.

    Raises:
        LimitRefused, HostFault: as write_limits; those in force before are again.
    """
    before = read_limits(cgroup, leaf=leaf)
    limits = limits.over(_period_of(limits, before))
    try:
        write_limits(cgroup, limits, leaf=leaf)
    except (LimitRefused, HostFault):
        write_limits(cgroup, limits.those_of(before), leaf=leaf)
        raise
    return read_limits(cgroup, leaf=leaf)


def _period_of(asked: Limits, now: Limits) -> Limits:
    """v2 writes quota and period in one file: a change of one keeps the other."""
    if asked.cpu_quota_us is None and asked.cpu_period_us is None:
        return Limits()
    return Limits(cpu_quota_us=now.cpu_quota_us, cpu_period_us=now.cpu_period_us)


def _raises_memory_limit(directory: Path, limits: Limits) -> bool:
    if limits.memory_bytes is None:
        return False
    now = int((directory / "memory.limit_in_bytes").read_text())
    return limits.memory_bytes == 0 or limits.memory_bytes > now


def _refuse_below_usage(directory: Path, limits: Limits) -> None:
    # v2 would reclaim and then kill for a limit below usage (cgroup-v2.rst, memory.max); v1 answers EBUSY. We refuse.
    if (
        limits.memory_bytes
        and (usage := int((directory / "memory.current").read_text())) > limits.memory_bytes
    ):
        raise LimitRefused("limits.memory_bytes", f"is below the {usage} bytes in use")


def read_limits(cgroup: ContainerCgroup, *, leaf: tuple[str, ...] = (WORK,)) -> Limits:
    """The limits in force, as the kernel has them; 0 where there is none."""

    def read(controller: str, below: tuple[str, ...], file: str) -> str:
        return cgroup.directory(controller, *below, file).read_text().strip()

    weight_at: tuple[str, ...] = () if leaf == (WORK,) else leaf
    pids = parse_max(read("pids", leaf, "pids.max"))
    if cgroup.hierarchies.version == 2:
        quota, period = read("cpu", leaf, "cpu.max").split()
        return Limits(
            memory_bytes=parse_max(read("memory", leaf, "memory.max")),
            cpu_weight=read_weight(cgroup.directory("cpu", *weight_at)),
            cpu_quota_us=parse_max(quota),
            cpu_period_us=int(period),
            pids=pids,
        )
    memory = int(read("memory", leaf, "memory.limit_in_bytes"))
    shares = int(read("cpu", weight_at, "cpu.shares"))
    return Limits(
        memory_bytes=0 if memory >= V1_UNLIMITED_BYTES else memory,
        cpu_weight=max(1, round(shares * 100 / V1_DEFAULT_SHARES)),
        cpu_shares=shares,
        cpu_quota_us=max(0, int(read("cpu", leaf, "cpu.cfs_quota_us"))),
        cpu_period_us=int(read("cpu", leaf, "cpu.cfs_period_us")),
        pids=pids,
    )


def parse_max(text: str) -> int:
    """A cgroup number where "max" stands for no limit, returned as 0."""
    return 0 if text == "max" else int(text)
