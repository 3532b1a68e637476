"""Limits of one process and its children, read and changed while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from garden_py.backend.cgroup.limits import change_limits, read_limits
from garden_py.backend.linux import resource_limits
from garden_py.backend.linux.container import LinuxContainer, may_be_gone
from garden_py.backend.linux.disk import ContainerDisk
from garden_py.backend.linux.process import LinuxProcess
from garden_py.backend.linux.refusals import telling_memory_in_use
from garden_py.backend.linux.sidecars import sidecar_layer
from garden_py.backend.linux.undo import all_or_nothing
from garden_py.model.errors import ContainerBroken, ProcessExited, ProcessNotFound, ProcessNotLimited
from garden_py.model.limits import Limits, rlimits_over
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point


async def read(container: LinuxContainer, process_id: str, disk: ContainerDisk) -> Limits:
    """The limits in force of a process.

    Those of its cgroup, if it is counted by itself; on disk space, of a sidecar; rlimits that it or its container
    states.

    Raises:
        ProcessNotFound, ProcessExited, ContainerBroken.
        ProcessNotLimited: there are none of these.
    """
    process = find(container, process_id)
    if not process.own_group and not container.rlimits_for(process.spec):
        raise ProcessNotLimited(container.handle, process_id)
    found = _read_group(container, process) if process.own_group else Limits()
    return await _with_the_rest(container, process, found, disk)


async def change(
    container: LinuxContainer,
    process_id: str,
    limits: Limits,
    disk: ContainerDisk,
    record: Callable[[Limits], None] | None = None,
) -> Limits:
    """Change limits of a process, all or none; those in force then.

    Args:
        container: that it is in.
        process_id: of it.
        limits: what is not stated stays.
        disk: limits on that.
        record: as of service.ports.

    Raises:
        LimitRefused, NotSupported, InvalidField, HostFault, ProcessNotFound, ProcessExited, ContainerBroken: nothing
            has changed.
        ProcessNotLimited: they are not of rlimits alone, and the process is not counted by itself; likewise.
    """
    process = find(container, process_id)
    if not process.own_group and (not limits.rlimits or not limits.without_rlimits().empty()):
        raise ProcessNotLimited(container.handle, process_id)
    layer, former = sidecar_layer(container, process_id), process.spec
    stated = limits.without_rlimits().over(former.limits)
    if layer is not None and limits.states_disk:
        disk.require_changeable(layer)
    async with all_or_nothing("limits", container.handle) as undo:
        if layer is not None and limits.states_disk:
            undo.push_async_callback(disk.update, layer, await disk.limits(layer))
            now_disk = await disk.update(layer, limits)
            stated = now_disk.over(stated.without_disk())
        spec = replace(former, limits=stated, rlimits=rlimits_over(limits.rlimits, former.rlimits))
        now = _change_group(container, process, limits, undo) if process.own_group else Limits()
        if limits.rlimits:  # last of all: not every limit that is lowered can be raised again
            undo.callback(await resource_limits.change_process(container, process, limits.rlimits))
        undo.callback(setattr, process, "spec", former)
        process.spec = spec
        now = await _with_the_rest(container, process, now, disk)
        failpoints.reach(Point.LIMITS_CHANGE)
        if record is not None:
            record(now)
    return now


def _read_group(container: LinuxContainer, process: LinuxProcess) -> Limits:
    try:
        with may_be_gone(container.handle):
            return read_limits(container.cgroup, leaf=container.leaf_of(process.spec))
    except ContainerBroken as error:  # only its own group is gone: it has just ended
        raise ProcessExited(process.id) from error


def _change_group(
    container: LinuxContainer, process: LinuxProcess, limits: Limits, undo: AsyncExitStack
) -> Limits:
    before, leaf = _read_group(container, process), container.leaf_of(process.spec)
    try:
        with may_be_gone(container.handle), telling_memory_in_use(container.cgroup, leaf):
            now = change_limits(container.cgroup, limits, leaf=leaf)
    except ContainerBroken as error:
        raise ProcessExited(process.id) from error
    undo.callback(change_limits, container.cgroup, limits.those_of(before), leaf=leaf)
    return now


async def _with_the_rest(
    container: LinuxContainer, process: LinuxProcess, found: Limits, disk: ContainerDisk
) -> Limits:
    """Limits of its cgroup, and those in force elsewhere."""
    layer = sidecar_layer(container, process.id)
    if layer is not None:
        found = found.over(await disk.limits(layer))
    return resource_limits.read(container, process).over(found)


def find(container: LinuxContainer, process_id: str) -> LinuxProcess:
    """A running process.

    Raises:
        ProcessNotFound, ProcessExited.
    """
    process = container.processes.get(process_id)
    if process is None:
        raise ProcessNotFound(container.handle, process_id)
    if process.exit is not None:
        raise ProcessExited(process_id)
    return process
