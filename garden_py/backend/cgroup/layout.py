"""Which directories a container has in the cgroup hierarchies.

    v1, in each of the controllers' hierarchies       v2
    /garden-<tag>/<handle>            PID 1           /garden-<tag>/<handle>            no processes
    /garden-<tag>/<handle>/work       processes       /garden-<tag>/<handle>/init       PID 1
    /garden-<tag>/<handle>/work/<id>  one process     /garden-<tag>/<handle>/work       limits
                                      with limits     /garden-<tag>/<handle>/work/main  processes
                                                      /garden-<tag>/<handle>/work/<id>  one process with limits

    /garden-<tag>/<handle>/agent-<id>   both versions: the agent of a sidecar
    /garden-<tag>/<handle>/p-<id>       and its processes, if it has limits of its own, not within the container's

With --enable-cpu-throttling on v1, a container is in /garden-throttled-<tag>/good/<handle> instead, and in the cpu
hierarchy alone it has a twin, where its processes are while it is over its entitlement (cgroup/throttle.py):

    /garden-throttled-<tag>/bad/<handle>        those of `work`, with the container's weight and `work`'s quota
    /garden-throttled-<tag>/bad/<handle>/p-<id> those of `work/p-<id>`

With --cgroup-driver systemd, on v2, `/garden-<tag>` is `/garden.slice/garden-<tag>.scope` (cgroup/scope.py).

The limits are on `work`, which the agent is not in: running out of memory takes the workload, never PID 1. The CPU
weight is on the container, where it competes with other containers. Nothing in the container can write any of these
directories: the server opens `cgroup.procs` and hands descriptors to the agent, and the kernel checks the opener's
rights, not the writer's (cgroups(7); kernel commit 1756d7994ad8 "cgroup: Use open-time credentials").

Source: cgroups(7); kernel docs cgroup-v1/ and cgroup-v2.rst ("no internal processes").
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from garden_py.backend.host.small_files import lines_of, read_mountinfo, unescape

V1_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids")
V2_CONTROLLERS = ("cpu", "memory", "pids")
WORK, INIT, MAIN = "work", "init", "main"
GOOD, BAD = "good", "bad"


def parent_of(tag: str) -> str:
    """The cgroup that the containers of a server are in."""
    return f"garden-{tag}"


def throttled_parent_of(tag: str) -> str:
    """The cgroup that holds the good and the bad ones of a server's containers that can be throttled, on v1."""
    return f"garden-throttled-{tag}"


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where the controllers are mounted.

    Attributes:
        version: 1 or 2.
        mount_points: controller name to mount point; on v2 all the same directory.
        unified: the v2 mount of a hybrid host, which carries no controllers we use; else None.
        io: where block I/O is limited: v1's blkio, or on v2 the same as all; None: nowhere. On v1 no group of ours is
            made there: all processes of a container stay in the one that the runtime makes.
        unstated_swap: what groups with a memory limit get on top of it that state nothing about swap; see Limits.
    """

    version: int
    mount_points: dict[str, Path]
    unified: Path | None = None
    io: Path | None = None
    unstated_swap: int = 0

    def distinct(self) -> list[Path]:
        """Every mount point once (cpu and cpuacct are often one hierarchy)."""
        return list(dict.fromkeys(self.mount_points.values()))


class CgroupsMissing(OSError):
    """A controller that limits depend on is not mounted."""


def parse_hierarchies(mountinfo: str, version: int) -> Hierarchies:
    """Find the hierarchies in /proc/self/mountinfo.

    Raises:
        CgroupsMissing: naming the controllers that are not mounted.

    Source: proc_pid_mountinfo(5): the file system type and super options follow the " - " separator.
    """
    found: dict[str, Path] = {}
    unified: Path | None = None
    blkio: Path | None = None
    for line in lines_of(mountinfo):
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split(" ", 2)
        mount_point = Path(unescape(left.split(" ")[4]))
        if fstype == "cgroup2":
            unified = unified or mount_point
        elif fstype == "cgroup":
            for option in options.split(","):
                if option in V1_CONTROLLERS:
                    found.setdefault(option, mount_point)
                elif option == "blkio":
                    blkio = blkio or mount_point
    if version == 2:
        if unified is None:
            raise CgroupsMissing("cgroup2 is not mounted")
        return Hierarchies(2, dict.fromkeys(V2_CONTROLLERS, unified))
    if missing := [name for name in V1_CONTROLLERS if name not in found]:
        raise CgroupsMissing(f"cgroup v1 controllers are not mounted: {', '.join(missing)}")
    return Hierarchies(1, found, unified, blkio)


@dataclass(frozen=True, slots=True)
class ContainerCgroup:
    """The directories of one container.

    Attributes:
        path: relative to each mount point, for example `garden-1a2b/my-container`.
        twin: where its processes are in the cpu hierarchy while it is throttled; empty: it has no such place.
    """

    hierarchies: Hierarchies
    path: str
    twin: str = ""

    @property
    def runtime_path(self) -> str:
        """The value of linux.cgroupsPath."""
        return f"/{self.path}"

    def directory(self, controller: str, *below: str) -> Path:
        """A directory of the container in the hierarchy of controller."""
        return self.hierarchies.mount_points[controller].joinpath(self.path, *below)

    def all_directories(self, *below: str) -> list[Path]:
        """The same directory in every hierarchy."""
        return [mount_point.joinpath(self.path, *below) for mount_point in self.hierarchies.distinct()]

    def twin_directory(self, below: tuple[str, ...]) -> Path | None:
        """The directory in the twin that stands for one below the container, `()` and `work` being one there.

        Returns:
            None: the container has no twin, or what is there stays there (agents, and sidecars beside its limits).
        """
        if not self.twin or (below and below[0] != WORK):
            return None
        return self.hierarchies.mount_points["cpu"].joinpath(self.twin, *below[1:])

    def sidecar(self, process_id: str) -> ContainerCgroup:
        """Where the agent of a sidecar is."""
        return ContainerCgroup(self.hierarchies, f"{self.path}/agent-{process_id}")

    def leaf(self, process_id: str | None, *, beside: bool = False) -> tuple[str, ...]:
        """Path below the container where a process's tasks go.

        Args:
            process_id: None: one that is not counted by itself.
            beside: outside of the container's limits.
        """
        if process_id is not None:
            return (f"p-{process_id}",) if beside else (WORK, f"p-{process_id}")
        return (WORK, MAIN) if self.hierarchies.version == 2 else (WORK,)


def probe_hierarchies(version: int) -> Hierarchies:
    """The hierarchies of this host; see parse_hierarchies."""
    found = parse_hierarchies(read_mountinfo(), version)
    if version == 2:
        top = found.mount_points["memory"]
        if "io" in (top / "cgroup.controllers").read_text().split():
            return replace(found, io=top)
    return found


def remove_tree(directory: Path) -> None:
    """Remove a cgroup and those below it, deepest first; one that is gone is fine.

    Raises:
        OSError: EBUSY while a task is still in one of them (cgroups(7)).
    """
    for parent, names, _ in os.walk(directory, topdown=False):
        for name in names:
            _rmdir(Path(parent, name))
    _rmdir(directory)


def _rmdir(directory: Path) -> None:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return
