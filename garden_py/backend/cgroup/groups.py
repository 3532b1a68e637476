"""Make, fill, empty and remove the cgroups of a container."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress
from pathlib import Path

from garden_py.backend.cgroup.layout import (
    BAD,
    GOOD,
    INIT,
    MAIN,
    V2_CONTROLLERS,
    WORK,
    ContainerCgroup,
    Hierarchies,
    parent_of,
    remove_tree,
    throttled_parent_of,
)
from garden_py.backend.cgroup.limits import write_limits
from garden_py.backend.host.small_files import read_small
from garden_py.model.limits import Limits

# Whether a group itself is frozen, where that is changed, and what thaws it.
_FREEZERS = (("freezer.self_freezing", "freezer.state", "THAWED"), ("cgroup.freeze", "cgroup.freeze", "0"))
_ENABLE_V2 = " ".join(f"+{name}" for name in V2_CONTROLLERS)


def ensure_parent(hierarchies: Hierarchies, tag: str, *, throttling: bool = False) -> None:
    """Make the cgroup that all containers of one server live in; throttling: also those of containers that can be."""
    for mount_point in hierarchies.distinct():
        parent = mount_point / parent_of(tag)
        parent.mkdir(exist_ok=True)
        if hierarchies.version == 2:
            pass_controllers_on(hierarchies, mount_point)
            pass_controllers_on(hierarchies, parent)
        elif throttling:
            (mount_point / throttled_parent_of(tag) / GOOD).mkdir(parents=True, exist_ok=True)
    if throttling and hierarchies.version == 1:
        (hierarchies.mount_points["cpu"] / throttled_parent_of(tag) / BAD).mkdir(exist_ok=True)


def pass_controllers_on(hierarchies: Hierarchies, directory: Path) -> None:
    """v2: give those of containers to the children of a group; block I/O is limited on containers, not below them."""
    enable = f"{_ENABLE_V2} +io" if hierarchies.io else _ENABLE_V2
    (directory / "cgroup.subtree_control").write_text(enable)


def remove_parent(hierarchies: Hierarchies, tag: str) -> None:
    """Remove it again, if it holds no container.

    Raises:
        OSError: EBUSY while it does.
    """
    for mount_point in all_hierarchies(hierarchies):
        throttled = mount_point / throttled_parent_of(tag)
        for directory in (throttled / GOOD, throttled / BAD, throttled, mount_point / parent_of(tag)):
            with suppress(FileNotFoundError):
                directory.rmdir()


def all_hierarchies(hierarchies: Hierarchies) -> list[Path]:
    """The mount point of every hierarchy that a container's path may be in.

    On v1 the runtime makes it in all that are below /sys/fs/cgroup, not only in those that we use.
    """
    points = hierarchies.distinct()
    if hierarchies.version == 1:
        root = os.scandir("/sys/fs/cgroup")
        points += [Path(entry.path) for entry in root if entry.is_dir(follow_symlinks=False)]
    return list(dict.fromkeys(points))


def furnish(cgroup: ContainerCgroup, agent_pid: int, limits: Limits) -> None:
    """Make the groups below a container that the runtime has just started, and put its limits in force."""
    if cgroup.hierarchies.version == 2:
        init = cgroup.directory("memory", INIT)
        init.mkdir(exist_ok=True)
        (init / "cgroup.procs").write_text(str(agent_pid))
        cgroup.directory("memory", "cgroup.subtree_control").write_text(_ENABLE_V2)
    for directory in cgroup.all_directories(WORK):
        directory.mkdir(exist_ok=True)
    if cgroup.hierarchies.version == 2:
        cgroup.directory("memory", WORK, "cgroup.subtree_control").write_text(_ENABLE_V2)
        cgroup.directory("memory", WORK, MAIN).mkdir(exist_ok=True)
    _make_twin(cgroup, ())
    write_limits(cgroup, limits)


def add_process_group(cgroup: ContainerCgroup, leaf: tuple[str, ...], limits: Limits) -> None:
    """Make the group of one process that is counted by itself."""
    for directory in cgroup.all_directories(*leaf):
        directory.mkdir(exist_ok=True)
    _make_twin(cgroup, leaf)
    write_limits(cgroup, limits, leaf=leaf)


def _make_twin(cgroup: ContainerCgroup, below: tuple[str, ...]) -> None:
    twin = cgroup.twin_directory(below)
    if twin is not None:
        twin.mkdir(exist_ok=True)


def remove_process_group(cgroup: ContainerCgroup, leaf: tuple[str, ...]) -> bool:
    """Remove that group if nothing is in it any more; False while a child of the process lives on."""
    try:
        remove_leaf(cgroup, leaf)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def remove_leaf(cgroup: ContainerCgroup, leaf: tuple[str, ...]) -> None:
    """Remove one group below the container; gone is fine.

    Raises:
        OSError: EBUSY while a task is still in it.
    """
    for directory in cgroup.all_directories(*leaf):
        remove_tree(directory)
    if (twin := cgroup.twin_directory(leaf)) is not None:
        remove_tree(twin)


def open_procs(cgroup: ContainerCgroup, leaf: tuple[str, ...], *, throttled: bool = False) -> list[int]:
    """Descriptors through which a single-threaded process joins the leaf, by writing "0" to each. Caller closes.

    Args:
        cgroup: of the container.
        leaf: which of its groups.
        throttled: in the cpu hierarchy its twin, if it has one.

    On v1 it is the file `tasks`: a thread that moves itself needs no system-wide lock, while a write to cgroup.procs
    waits for an RCU grace period, 5 to 20 ms on an idle machine (kernel commit 9a3284fad42f, "cgroup: Optimize single
    thread migration"). On v2 a thread cannot move between resource domains, so it is cgroup.procs.
    """
    file = "tasks" if cgroup.hierarchies.version == 1 else "cgroup.procs"
    opened: list[int] = []
    directories = cgroup.all_directories(*leaf)
    if throttled and (twin := cgroup.twin_directory(leaf)) is not None:
        own = cgroup.directory("cpu", *leaf)
        directories = [twin if directory == own else directory for directory in directories]
    try:
        for directory in directories:
            opened.append(os.open(directory / file, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        for fd in opened:
            os.close(fd)
        raise
    return opened


def pids_in(cgroup: ContainerCgroup) -> list[int]:
    """Every process in the container's groups, PID 1 included, as the host numbers them; empty if it is gone."""
    return pids_below(cgroup.directory("pids"))


def pids_below(top: Path) -> list[int]:
    """Every process in a cgroup directory and those below it; empty if it is gone."""
    found: list[int] = []
    for parent, _, _ in os.walk(top):
        try:
            # 0 is none that could be signalled, but the reader itself and its group (kill(2)).
            found += [pid for pid in map(int, Path(parent, "cgroup.procs").read_text().split()) if pid]
        except (FileNotFoundError, OSError) as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # removed while we looked
                raise
    return found


def workload_count(cgroup: ContainerCgroup) -> int:
    """Tasks (threads included) of the workload, agents not counted."""
    work, *beside = _workload_directories(cgroup)
    count = _count(work)
    for directory in beside:
        with suppress(FileNotFoundError):  # that sidecar has ended since
            count += _count(directory)
    return count


def workload_pids(cgroup: ContainerCgroup) -> list[int]:
    """Processes of the workload, as the host numbers them."""
    return [pid for directory in _workload_directories(cgroup) for pid in pids_below(directory)]


def _workload_directories(cgroup: ContainerCgroup) -> list[Path]:
    top = cgroup.directory("pids")
    return [top / WORK, *(top / name for name in os.listdir(top) if name.startswith("p-"))]


def _count(directory: Path) -> int:
    return int((directory / "pids.current").read_text())


def thaw(cgroup: ContainerCgroup) -> None:
    """Let go of what somebody has frozen in the container's groups: what v1's freezer holds, SIGKILL does not end.

    A group above them that is frozen stays so; it is none of ours.

    Source: cgroup-v1/freezer-subsystem.rst; cgroup-v2.rst, cgroup.freeze.
    """
    for mount_point in all_hierarchies(cgroup.hierarchies):
        top = mount_point / cgroup.path
        for asked, change, thawed in _FREEZERS:
            if not (top / asked).exists():
                continue
            for parent, _, _ in os.walk(top):
                _thaw_one(Path(parent, asked), Path(parent, change), thawed)


def _thaw_one(asked: Path, change: Path, thawed: str) -> None:
    try:
        if read_small(asked).strip() == "1":
            change.write_text(thawed)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # removed while we looked
            raise


def kill_all(cgroup: ContainerCgroup) -> None:
    """SIGKILL everything in the container's groups; repeat until `pids_in` is empty.

    v2 does it in one atomic step (cgroup-v2.rst, cgroup.kill); v1 races with forks, which the caller's loop ends.
    """
    if cgroup.hierarchies.version == 2:
        try:
            cgroup.directory("pids", "cgroup.kill").write_text("1")
            return
        except FileNotFoundError:
            return
    _kill_each(pids_in(cgroup))


def kill_leaf(cgroup: ContainerCgroup, leaf: tuple[str, ...]) -> None:
    """SIGKILL everything in one group below the container; repeat until it can be removed."""
    _kill_each(pids_below(cgroup.directory("pids", *leaf)))


def _kill_each(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def remove(cgroup: ContainerCgroup) -> None:
    """Remove the container's groups in every hierarchy, also those that only the runtime made.

    Raises:
        OSError: EBUSY while a task is still in one of them.
    """
    for mount_point in all_hierarchies(cgroup.hierarchies):
        directory = mount_point / cgroup.path
        if directory.exists():
            remove_tree(directory)
    if (twin := cgroup.twin_directory(())) is not None:
        remove_tree(twin)
