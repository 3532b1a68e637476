"""Limits of one process and its children, read and changed while it runs."""

from __future__ import annotations

from dataclasses import replace

from garden_py.backend.cgroup.limits import change_limits, read_limits
from garden_py.backend.linux.container import LinuxContainer, may_be_gone
from garden_py.backend.linux.process import LinuxProcess
from garden_py.model.errors import ContainerBroken, ProcessExited, ProcessNotFound, ProcessNotLimited
from garden_py.model.limits import Limits


def read(container: LinuxContainer, process_id: str) -> Limits:
    """The limits in force of a process that is counted by itself; those on disk space are not among them.

    Raises:
        ProcessNotFound, ProcessExited, ProcessNotLimited.
    """
    process = _find(container, process_id)
    try:
        with may_be_gone(container.handle):
            return read_limits(container.cgroup, leaf=container.leaf_of(process.spec))
    except ContainerBroken as error:  # only its own group is gone: it has just ended
        raise ProcessExited(process_id) from error


def change(container: LinuxContainer, process_id: str, limits: Limits) -> Limits:
    """Change limits of such a process, all or none; those in force then.

    Its own out-of-memory events are told from here on, if it had no limits before (a sidecar).

    Raises:
        LimitRefused, HostFault, and as `read`: nothing has changed.
    """
    process = _find(container, process_id)
    leaf = container.leaf_of(process.spec)
    try:
        with may_be_gone(container.handle):
            now = change_limits(container.cgroup, limits, leaf=leaf)
            if process.spec.limits.empty():
                container.watch_oom(process_id, leaf)
    except ContainerBroken as error:
        raise ProcessExited(process_id) from error
    process.spec = replace(process.spec, limits=limits.over(process.spec.limits))
    return now


def _find(container: LinuxContainer, process_id: str) -> LinuxProcess:
    process = container.processes.get(process_id)
    if process is None:
        raise ProcessNotFound(container.handle, process_id)
    if process.exit is not None:
        raise ProcessExited(process_id)
    if not process.own_group:
        raise ProcessNotLimited(container.handle, process_id)
    return process
