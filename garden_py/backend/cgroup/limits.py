"""From limits to cgroup files and back. `plan_writes` and `parse_max` are pure, `write_` and `read_limits` act."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from pathlib import Path

from garden_py.backend.cgroup.layout import WORK, ContainerCgroup
from garden_py.backend.cgroup.weight import is_scaled, read_weight, rescale
from garden_py.model.errors import HostFault, InvalidField, LimitRefused, NotSupported
from garden_py.model.limits import (
    CPU_PERIOD_DEFAULT_US,
    SWAP_NEEDS_MEMORY,
    SWAP_UNLIMITED,
    Limits,
    shares_from_weight,
    weight_from_shares,
)

# memory.limit_in_bytes of an unlimited v1 group reads as LONG_MAX rounded down to pages (cgroup-v1/memory.rst).
V1_UNLIMITED_BYTES = 1 << 62
V1_DEFAULT_SHARES = 1024
_SWAP_FILES = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}


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


@dataclass(frozen=True, slots=True)
class _Memory:
    """Memory and swap of a group together, as it is to be; unlimited is math.inf."""

    memory: float
    swap: float
    swap_field: str

    @property
    def total(self) -> float:
        """Both."""
        return self.memory + self.swap

    @classmethod
    def of(cls, asked: Limits, now: Limits, unstated_swap: int) -> _Memory:
        """What is asked for, with what is in force where nothing is."""
        memory = asked.over(now).memory_bytes
        swap = unstated_swap if now.swap_bytes is None else now.swap_bytes
        field = "memory_bytes"
        if asked.swap_bytes is not None:
            swap, field = asked.swap_bytes, "swap_bytes"
        if not memory or swap == SWAP_UNLIMITED:
            return cls(memory or math.inf, math.inf, field)
        return cls(memory, swap, field)


def plan_writes(
    limits: Limits,
    version: int,
    *,
    leaf: tuple[str, ...] = (WORK,),
    now: Limits | None = None,
    unstated_swap: int = 0,
) -> list[LimitWrite]:
    """The writes that put limits in force, in order; fields without a statement cause none.

    Args:
        limits: as asked for; 0 means unlimited.
        version: 1 or 2.
        leaf: directory that carries the limits; the CPU weight of a whole container goes on the container itself.
        now: those of memory and swap that are in force; None: none.
        unstated_swap: on top of a memory limit, if nothing was ever said about it.
    """
    weight_at: tuple[str, ...] = () if leaf == (WORK,) else leaf
    now = now or Limits()
    writes: list[LimitWrite] = []
    if limits.memory_bytes is not None or limits.swap_bytes is not None:
        wanted = _Memory.of(limits, now, unstated_swap)
        writes += _plan_memory_v1(wanted, now, leaf) if version == 1 else _plan_memory_v2(wanted, leaf)
    return writes + (_plan_v1(limits, leaf, weight_at) if version == 1 else _plan_v2(limits, leaf, weight_at))


def _plan_memory_v1(wanted: _Memory, now: Limits, leaf: tuple[str, ...]) -> list[LimitWrite]:
    """On v1, memsw counts memory and swap together, and limit ≤ memsw must hold after every single write."""
    both, field = wanted.total, wanted.swap_field
    writes = [
        LimitWrite("memory", leaf, "memory.limit_in_bytes", _v1_bytes(wanted.memory), "memory_bytes"),
        LimitWrite("memory", leaf, "memory.memsw.limit_in_bytes", _v1_bytes(both), field, optional=True),
    ]
    if both >= _Memory.of(Limits(), now, SWAP_UNLIMITED).total:
        writes.reverse()  # memsw is widened first, and narrowed last
    return writes


def _v1_bytes(count: float) -> str:
    return "-1" if count == math.inf else str(count)


def _plan_memory_v2(wanted: _Memory, leaf: tuple[str, ...]) -> list[LimitWrite]:
    return [
        LimitWrite("memory", leaf, "memory.max", _v2_bytes(wanted.memory), "memory_bytes"),
        LimitWrite(
            "memory", leaf, "memory.swap.max", _v2_bytes(wanted.swap), wanted.swap_field, optional=True
        ),
    ]


def _v2_bytes(count: float) -> str:
    return "max" if count == math.inf else str(count)


def _plan_v1(limits: Limits, leaf: tuple[str, ...], weight_at: tuple[str, ...]) -> list[LimitWrite]:
    writes: list[LimitWrite] = []
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
        InvalidField: of swap, without a limit on memory.
        NotSupported: of swap, which the kernel does not count.
        HostFault: a file cannot be written for another reason.
    """
    version, memory = cgroup.hierarchies.version, cgroup.directory("memory", *leaf)
    now = Limits()
    if limits.memory_bytes is not None or limits.swap_bytes is not None:
        now = _read_memory(memory, version)
        if limits.swap_bytes is not None:
            _check_swap(memory, version, limits.over(now))
    writes = plan_writes(limits, version, leaf=leaf, now=now, unstated_swap=cgroup.hierarchies.unstated_swap)
    if version == 2:
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
        LimitRefused, InvalidField, NotSupported, HostFault: as write_limits; those in force before are again.
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


def _check_swap(directory: Path, version: int, wanted: Limits) -> None:
    if not (directory / _SWAP_FILES[version]).exists():
        how = ", see the boot parameter swapaccount=1" if version == 1 else ""
        raise NotSupported(f"limits.swap_bytes: this kernel does not count swap{how}")
    if not wanted.memory_bytes:
        raise InvalidField("limits.swap_bytes", SWAP_NEEDS_MEMORY)


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
    memory = _read_memory(cgroup.directory("memory", *leaf), cgroup.hierarchies.version)
    if cgroup.hierarchies.version == 2:
        quota, period = read("cpu", leaf, "cpu.max").split()
        return Limits(
            memory_bytes=memory.memory_bytes,
            swap_bytes=memory.swap_bytes,
            cpu_weight=read_weight(cgroup.directory("cpu", *weight_at)),
            cpu_quota_us=parse_max(quota),
            cpu_period_us=int(period),
            pids=pids,
        )
    shares = int(read("cpu", weight_at, "cpu.shares"))
    return Limits(
        memory_bytes=memory.memory_bytes,
        swap_bytes=memory.swap_bytes,
        cpu_weight=max(1, round(shares * 100 / V1_DEFAULT_SHARES)),
        cpu_shares=shares,
        cpu_quota_us=max(0, int(read("cpu", leaf, "cpu.cfs_quota_us"))),
        cpu_period_us=int(read("cpu", leaf, "cpu.cfs_period_us")),
        pids=pids,
    )


def _read_memory(directory: Path, version: int) -> Limits:
    """Those of memory and swap; swap None: memory is not limited, or the kernel does not count swap."""
    if version == 2:
        memory = parse_max((directory / "memory.max").read_text().strip())
    else:
        memory = _parse_v1_bytes((directory / "memory.limit_in_bytes").read_text())
    if not memory:
        return Limits(memory_bytes=0)
    try:
        text = (directory / _SWAP_FILES[version]).read_text().strip()
    except FileNotFoundError:
        return Limits(memory_bytes=memory)
    if version == 2:
        return Limits(memory_bytes=memory, swap_bytes=SWAP_UNLIMITED if text == "max" else int(text))
    both = _parse_v1_bytes(text)
    return Limits(memory_bytes=memory, swap_bytes=both - memory if both else SWAP_UNLIMITED)


def _parse_v1_bytes(text: str) -> int:
    return 0 if int(text) >= V1_UNLIMITED_BYTES else int(text)


def parse_max(text: str) -> int:
    """A cgroup number where "max" stands for no limit, returned as 0."""
    return 0 if text == "max" else int(text)
