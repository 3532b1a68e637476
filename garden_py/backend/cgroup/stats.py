"""What a container uses, from its cgroup files. Parsers are pure."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from garden_py.backend.cgroup.layout import WORK, ContainerCgroup
from garden_py.backend.cgroup.limits import V1_UNLIMITED_BYTES, parse_max
from garden_py.backend.host.small_files import read_small
from garden_py.service.ports import Usage

_CHARGE_BATCH_BYTES = 64 << 12  # MEMCG_CHARGE_BATCH, 64 pages: so near to a limit a charge may fail
_NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def parse_flat_keyed(text: str) -> dict[str, int]:
    """A "flat keyed" file: one `name number` a line (cgroup-v2.rst, Interface Files); other lines are left out."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            found[name] = int(value)
    return found


def read_usage(cgroup: ContainerCgroup, leaf: tuple[str, ...] | None = None) -> Usage:
    """Read the usage of memory, CPU and tasks; the network fields stay 0.

    Args:
        cgroup: of the container.
        leaf: of one process that is counted by itself; None: the whole container's.

    Raises:
        FileNotFoundError: the groups are gone.
    """
    top, limited = ((), (WORK,)) if leaf is None else (leaf, leaf)
    read = _read_v2 if cgroup.hierarchies.version == 2 else _read_v1
    return read(cgroup, top, limited)


def without(total: Usage, part: Usage) -> Usage:
    """What a container uses besides a part that is not to be counted as its own. Its peak cannot be told apart."""
    less = {
        name: max(0, getattr(total, name) - getattr(part, name))
        for name in (
            "memory_bytes",
            "memory_working_set_bytes",
            "cpu_usage_ns",
            "cpu_user_ns",
            "cpu_system_ns",
            "pids",
        )
    }
    stat = {key: max(0, value - part.memory_stat.get(key, 0)) for key, value in total.memory_stat.items()}
    return replace(total, memory_stat=stat, **less)


def _at(cgroup: ContainerCgroup, controller: str, below: tuple[str, ...]) -> str:
    """A directory of the container as text: a question about 250 containers joins some 3,000 paths."""
    return "/".join((str(cgroup.hierarchies.mount_points[controller]), cgroup.path, *below))


def _number(path: str) -> int:
    return int(read_small(path))


def _optional_number(path: str) -> int:
    """A file that older kernels lack (memory.peak came with 5.19)."""
    try:
        return _number(path)
    except FileNotFoundError:
        return 0


_HIERARCHICAL_LIMITS: Final = {
    "hierarchical_memory_limit": None,  # memory.limit_in_bytes
    "hierarchical_memsw_limit": "memory.memsw.limit_in_bytes",
}


def _read_v1(cgroup: ContainerCgroup, top: tuple[str, ...], limited: tuple[str, ...]) -> Usage:
    memory, work = _at(cgroup, "memory", top), _at(cgroup, "memory", limited)
    cpu_ns, user_ns, system_ns = _cpu_time_v1(cgroup, top)
    stat = parse_flat_keyed(read_small(f"{memory}/memory.stat"))
    usage = _number(f"{memory}/memory.usage_in_bytes")
    limit = _number(f"{work}/memory.limit_in_bytes")
    # Its own limit is on the group below the one that is counted, and is what its workload has to live with.
    for key, name in _HIERARCHICAL_LIMITS.items():
        if key in stat and memory != work:
            stat[key] = min(stat[key], limit if name is None else _number(f"{work}/{name}"))
    halves = [_at(cgroup, "cpu", limited), cgroup.twin_directory(limited)]
    throttled = [parse_flat_keyed(read_small(f"{half}/cpu.stat")) for half in halves if half is not None]
    return Usage(
        memory_bytes=usage,
        memory_working_set_bytes=max(0, usage - stat.get("total_inactive_file", 0)),
        memory_limit_bytes=0 if limit >= V1_UNLIMITED_BYTES else limit,
        memory_peak_bytes=_number(f"{memory}/memory.max_usage_in_bytes"),
        memory_stat=stat,
        cpu_usage_ns=cpu_ns,
        cpu_user_ns=user_ns,
        cpu_system_ns=system_ns,
        cpu_throttled_ns=sum(each.get("throttled_time", 0) for each in throttled),
        pids=_number(f"{_at(cgroup, 'pids', top)}/pids.current"),
        pids_limit=parse_max(read_small(f"{_at(cgroup, 'pids', limited)}/pids.max").strip()),
        oom_kills=read_oom_kills(cgroup, limited),
    )


def _cpu_time_v1(cgroup: ContainerCgroup, top: tuple[str, ...]) -> tuple[int, int, int]:
    """Nanoseconds in all, in user mode, in the kernel; with the twin's if cpu and cpuacct are one hierarchy (CT3)."""
    halves = [_at(cgroup, "cpuacct", top)]
    points, twin = cgroup.hierarchies.mount_points, cgroup.twin_directory(top)
    if twin is not None and points["cpu"] == points["cpuacct"]:
        halves.append(str(twin))
    ticks = [parse_flat_keyed(read_small(f"{half}/cpuacct.stat")) for half in halves]
    return (
        sum(_number(f"{half}/cpuacct.usage") for half in halves),
        sum(each["user"] for each in ticks) * _NS_PER_TICK,
        sum(each["system"] for each in ticks) * _NS_PER_TICK,
    )


def _read_v2(cgroup: ContainerCgroup, top: tuple[str, ...], limited: tuple[str, ...]) -> Usage:
    counted, work = _at(cgroup, "memory", top), _at(cgroup, "memory", limited)
    stat = parse_flat_keyed(read_small(f"{counted}/memory.stat"))
    usage = _number(f"{counted}/memory.current")
    cpu = parse_flat_keyed(read_small(f"{counted}/cpu.stat"))
    return Usage(
        memory_bytes=usage,
        memory_working_set_bytes=max(0, usage - stat.get("inactive_file", 0)),
        memory_limit_bytes=parse_max(read_small(f"{work}/memory.max").strip()),
        memory_peak_bytes=_optional_number(f"{counted}/memory.peak"),
        memory_stat=stat,
        cpu_usage_ns=cpu["usage_usec"] * 1000,
        cpu_user_ns=cpu["user_usec"] * 1000,
        cpu_system_ns=cpu["system_usec"] * 1000,
        cpu_throttled_ns=parse_flat_keyed(read_small(f"{work}/cpu.stat")).get("throttled_usec", 0) * 1000,
        pids=_number(f"{counted}/pids.current"),
        pids_limit=parse_max(read_small(f"{work}/pids.max").strip()),
        oom_kills=read_oom_kills(cgroup, limited),
    )


def read_task_room(cgroup: ContainerCgroup) -> tuple[int, int]:
    """Tasks within the container's limit of them, and the limit; with none, (0, 0)."""
    work = _at(cgroup, "pids", (WORK,))
    limit = parse_max(read_small(f"{work}/pids.max").strip())
    return (_number(f"{work}/pids.current"), limit) if limit else (0, 0)


def read_oom_kills(cgroup: ContainerCgroup, leaf: tuple[str, ...]) -> int:
    """Tasks that the OOM killer has ended in a group; v2 counts those below it too, v1 its own.

    0 if the group is gone: then somebody else has removed it, and ended what was in it.

    Source: cgroup-v2.rst, memory.events; cgroup-v1/memory.rst §10, memory.oom_control.
    """
    file = "memory.events" if cgroup.hierarchies.version == 2 else "memory.oom_control"
    try:
        text = read_small(f"{_at(cgroup, 'memory', leaf)}/{file}")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: removed between open and read
            raise
        return 0
    return parse_flat_keyed(text).get("oom_kill", 0)


def met_own_limit(directory: Path, version: int) -> bool:
    """Whether a group has ever been at its own memory limit, and not only at one above it; False if it is gone.

    On v1 this is told from the highest usage, which file pages that could be taken back count into; its counters of
    failures stay 0 in newer kernels (seen on 6.18).

    Args:
        directory: of the group in the memory hierarchy.
        version: 1 or 2.

    Source: cgroup-v2.rst, memory.events ("oom") and memory.events.local; cgroup-v1/memory.rst §3.
    """
    try:
        if version == 2:
            return parse_flat_keyed(read_small(directory / "memory.events.local")).get("oom", 0) > 0
        limit = _number(f"{directory}/memory.limit_in_bytes")
        return _number(f"{directory}/memory.max_usage_in_bytes") + _CHARGE_BATCH_BYTES > limit
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return False
