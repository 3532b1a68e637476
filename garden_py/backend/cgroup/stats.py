"""What a container uses, from its cgroup files. Parsers are pure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from garden_py.backend.cgroup.layout import WORK, ContainerCgroup
from garden_py.backend.cgroup.limits import V1_UNLIMITED_BYTES, parse_max
from garden_py.service.ports import Usage

_NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def parse_flat_keyed(text: str) -> dict[str, int]:
    """A "flat keyed" file: one `name number` a line (cgroup-v2.rst, Interface Files); other lines are left out."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            found[name] = int(value)
    return found


def read_usage(cgroup: ContainerCgroup) -> Usage:
    """Read a container's usage of memory, CPU and tasks; its network fields stay 0.

    Raises:
        FileNotFoundError: the container's groups are gone.
    """
    return _read_v2(cgroup) if cgroup.hierarchies.version == 2 else _read_v1(cgroup)


def _number(path: Path) -> int:
    return int(path.read_text())


def _optional_number(path: Path) -> int:
    """A file that older kernels lack (memory.peak came with 5.19)."""
    try:
        return _number(path)
    except FileNotFoundError:
        return 0


def _read_v1(cgroup: ContainerCgroup) -> Usage:
    memory, cpu, cpuacct = (cgroup.directory(name) for name in ("memory", "cpu", "cpuacct"))
    stat = parse_flat_keyed((memory / "memory.stat").read_text())
    usage = _number(memory / "memory.usage_in_bytes")
    limit = _number(memory / WORK / "memory.limit_in_bytes")
    ticks = parse_flat_keyed((cpuacct / "cpuacct.stat").read_text())
    return Usage(
        memory_bytes=usage,
        memory_working_set_bytes=max(0, usage - stat.get("total_inactive_file", 0)),
        memory_limit_bytes=0 if limit >= V1_UNLIMITED_BYTES else limit,
        memory_peak_bytes=_number(memory / "memory.max_usage_in_bytes"),
        memory_stat=stat,
        cpu_usage_ns=_number(cpuacct / "cpuacct.usage"),
        cpu_user_ns=ticks["user"] * _NS_PER_TICK,
        cpu_system_ns=ticks["system"] * _NS_PER_TICK,
        cpu_throttled_ns=parse_flat_keyed((cpu / WORK / "cpu.stat").read_text()).get("throttled_time", 0),
        pids=_number(cgroup.directory("pids") / "pids.current"),
        pids_limit=parse_max(cgroup.directory("pids", WORK, "pids.max").read_text().strip()),
        oom_kills=read_oom_kills(cgroup, (WORK,)),
    )


def _read_v2(cgroup: ContainerCgroup) -> Usage:
    top, work = cgroup.directory("memory"), cgroup.directory("memory", WORK)
    stat = parse_flat_keyed((top / "memory.stat").read_text())
    usage = _number(top / "memory.current")
    cpu = parse_flat_keyed((top / "cpu.stat").read_text())
    return Usage(
        memory_bytes=usage,
        memory_working_set_bytes=max(0, usage - stat.get("inactive_file", 0)),
        memory_limit_bytes=parse_max((work / "memory.max").read_text().strip()),
        memory_peak_bytes=_optional_number(top / "memory.peak"),
        memory_stat=stat,
        cpu_usage_ns=cpu["usage_usec"] * 1000,
        cpu_user_ns=cpu["user_usec"] * 1000,
        cpu_system_ns=cpu["system_usec"] * 1000,
        cpu_throttled_ns=parse_flat_keyed((work / "cpu.stat").read_text()).get("throttled_usec", 0) * 1000,
        pids=_number(top / "pids.current"),
        pids_limit=parse_max((work / "pids.max").read_text().strip()),
        oom_kills=read_oom_kills(cgroup, (WORK,)),
    )


def read_oom_kills(cgroup: ContainerCgroup, leaf: tuple[str, ...]) -> int:
    """Tasks that the OOM killer has ended in a group; v2 counts those below it too, v1 its own.

    0 if the group is gone: then somebody else has removed it, and ended what was in it.

    Source: cgroup-v2.rst, memory.events; cgroup-v1/memory.rst §10, memory.oom_control.
    """
    file = "memory.events" if cgroup.hierarchies.version == 2 else "memory.oom_control"
    try:
        text = cgroup.directory("memory", *leaf, file).read_text()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: removed between open and read
            raise
        return 0
    return parse_flat_keyed(text).get("oom_kill", 0)
