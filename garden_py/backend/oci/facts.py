"""What the host can do, probed once at start. Rules read this instead of probing, so they are pure."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from garden_py.backend.host.idmap import parse_highest
from garden_py.backend.host.rlimits import COUNTED_BY_NAMESPACE, read_own_limit

NOFILE_WANTED = 1_048_576


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Facts that decide how a container is built.

    Attributes:
        cgroup_version: 2 where the unified hierarchy carries the controllers, else 1 (also for hybrid hosts).
        bounding_capabilities: mask of the server's capability bounding set; nobody can be given more.
        nofile_hard: most open files a process may be allowed.
        uplink_mtu: MTU of the link with the default route, in bytes; 1500 where there is none.
        machine: `uname -m`.
        highest_id: highest user id that is valid here.
        rlimits: name, soft and hard value of the server's own limits that its launcher does not have (host/rlimits.py).
    """

    cgroup_version: int
    bounding_capabilities: int
    nofile_hard: int
    uplink_mtu: int = 1500
    machine: str = "x86_64"
    highest_id: int = (1 << 32) - 2
    rlimits: tuple[tuple[str, int, int], ...] = ()


def probe_host_facts() -> HostFacts:
    """Look at this host."""
    status = Path("/proc/self/status").read_text()
    bounding = next(line.split()[1] for line in status.splitlines() if line.startswith("CapBnd:"))
    return HostFacts(
        cgroup_version=2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1,
        bounding_capabilities=int(bounding, 16),
        nofile_hard=min(NOFILE_WANTED, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        uplink_mtu=read_uplink_mtu(),
        machine=os.uname().machine,
        highest_id=parse_highest(Path("/proc/self/uid_map").read_text()),
        rlimits=tuple((name, *read_own_limit(name)) for name in COUNTED_BY_NAMESPACE),
    )


def read_uplink_mtu() -> int:
    """MTU of the first link with a default route in /proc/net/route, at most 1500; 1500 without one."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000":
            return min(1500, int(Path(f"/sys/class/net/{fields[0]}/mtu").read_text()))
    return 1500
