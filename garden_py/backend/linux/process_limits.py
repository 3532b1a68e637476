"""Limits of one process and its children, read and changed while it runs."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

from garden_py.backend.cgroup.limits import change_limits, read_limits
from garden_py.backend.linux.container import LinuxContainer, may_be_gone
from garden_py.backend.linux.disk import ContainerDisk
from garden_py.backend.linux.process import LinuxProcess
from garden_py.backend.linux.sidecars import sidecar_layer
from garden_py.model.errors import ContainerBroken, ProcessExited, ProcessNotFound, ProcessNotLimited
from garden_py.model.limits import Limits


async def read(container: LinuxContainer, process_id: str, disk: ContainerDisk) -> Limits:
    """The limits in force of a process that is counted by itself; on disk space, only of a sidecar.

    Raises:
        ProcessNotFound, ProcessExited, ProcessNotLimited.
    """
    process = _find(container, process_id)
    try:
        with may_be_gone(container.handle):
            found = read_limits(container.cgroup, leaf=container.leaf_of(process.spec))
    except ContainerBroken as error:  # only its own group is gone: it has just ended
        raise ProcessExited(process_id) from error
    layer = sidecar_layer(container, process_id)
    return found if layer is None else found.over(await disk.limits(layer))


async def change(container: LinuxContainer, process_id: str, limits: Limits, disk: ContainerDisk) -> Limits:
    """Change limits of such a process, all or none; those in force then.

    Its own out-of-memory events are told from here on, if it had no limits before (a sidecar).

    Raises:
        LimitRefused, NotSupported, InvalidField, HostFault, and as `read`: nothing has changed.
    """
    process = _find(container, process_id)
    leaf, layer = container.leaf_of(process.spec), sidecar_layer(container, process_id)
    stated = limits.over(process.spec.limits)
    async with AsyncExitStack() as undo:
        if layer is not None and limits.states_disk:
            undo.push_async_callback(disk.update, layer, await disk.limits(layer))
            now_disk = await disk.update(layer, limits)
            layer = replace(layer, scope=now_disk.disk_scope)
            stated = now_disk.over(stated.without_disk())
        try:
            with may_be_gone(container.handle):
                now = change_limits(container.cgroup, limits, leaf=leaf)
                if process.spec.limits.empty():
                    container.watch_oom(process_id, leaf)
        except ContainerBroken as error:
            raise ProcessExited(process_id) from error
        undo.pop_all()
    process.spec = replace(process.spec, limits=stated)
    return now if layer is None else now.over(await disk.limits(layer))


def _find(container: LinuxContainer, process_id: str) -> LinuxProcess:
    process = container.processes.get(process_id)
    if process is None:
        raise ProcessNotFound(container.handle, process_id)
    if process.exit is not None:
        raise ProcessExited(process_id)
    if not process.own_group:
        raise ProcessNotLimited(container.handle, process_id)
    return process
