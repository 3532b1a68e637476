"""What is asked of a container whose cgroup or link goes away meanwhile fails for the container, not the server."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from garden_py.backend.cgroup.layout import ContainerCgroup, Hierarchies
from garden_py.backend.disk.volumes import Volumes
from garden_py.backend.images.store import ImageStore
from garden_py.backend.linux import backend as module
from garden_py.backend.linux.backend import LinuxBackend
from garden_py.backend.linux.block_io import BlockIo
from garden_py.backend.linux.container import LinuxContainer
from garden_py.backend.linux.container_limits import ContainerLimits
from garden_py.backend.linux.disk import ContainerDisk, WritableLayer
from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.linux.namespaces import Namespaces
from garden_py.backend.linux.processes import LinuxProcesses
from garden_py.config import Config
from garden_py.model.errors import ContainerBroken
from garden_py.model.limits import Limits
from garden_py.model.process import ProcessSpec
from garden_py.service.ports import DiskUsage


class NoDisk(ContainerDisk):
    """Of a host that counts nothing."""

    async def limits(self, layer: WritableLayer) -> Limits:
        return Limits()

    async def usage(self, layer: WritableLayer) -> DiskUsage:
        return DiskUsage()


@pytest.fixture
def backend(tmp_path: Path) -> LinuxBackend:
    """With one container, whose cgroup is not there."""
    backend = LinuxBackend(Config())
    cgroup = ContainerCgroup(
        Hierarchies(2, {"pids": tmp_path, "memory": tmp_path, "cpu": tmp_path}), "garden-test/box"
    )
    nobody: Any = None
    images: Any = SimpleNamespace(store=ImageStore(tmp_path / "images", nobody))
    facts: Any = SimpleNamespace(lease=NetworkLease(None, ()))
    backend._containers["box"] = LinuxContainer("box", facts, cgroup, tmp_path, nobody)
    backend._site = cast(
        Any, SimpleNamespace(block_io=BlockIo(cgroup.hierarchies, "none", tmp_path, Config()))
    )
    backend._disk = NoDisk(Volumes(tmp_path, None, nobody), images, str(tmp_path), nobody)
    backend._limits = ContainerLimits(backend._site, backend._disk, nobody, nobody)
    backend._processes = LinuxProcesses(nobody, nobody, images, nobody, nobody, nobody)
    return backend


def start(backend: LinuxBackend, limits: Limits) -> Any:
    spec = ProcessSpec(path="true", id="p", limits=limits)
    return backend.start_process("box", spec, (), lambda: None)


async def count(backend: LinuxBackend) -> int:
    return backend.workload_count("box")


@pytest.mark.parametrize(
    "ask",
    [
        lambda backend: backend.usage("box"),
        lambda backend: backend.limits("box"),
        lambda backend: backend.update_limits("box", Limits(pids=10)),
        lambda backend: start(backend, Limits()),
        lambda backend: start(backend, Limits(pids=10)),
        count,
    ],
    ids=["usage", "limits", "update_limits", "start", "start with limits", "count"],
)
async def test_container_without_its_cgroup_is_broken(backend: LinuxBackend, ask: Any) -> None:
    """Somebody has removed it, and ended what was in it; the message names the file."""
    with pytest.raises(ContainerBroken, match=r"garden-test/box.* is gone"):
        await ask(backend)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.EINVAL])
async def test_link_that_goes_while_it_is_measured(
    backend: LinuxBackend, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sysfs answers EINVAL for the statistics of a link that was removed between open and read, cgroups ENODEV."""
    with pytest.raises(ContainerBroken, match="gone"):
        await measure(backend, number, monkeypatch)


async def test_any_other_failure_is_not_swallowed(
    backend: LinuxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMFILE says nothing about the container."""
    with pytest.raises(OSError, match="no statistics"):
        await measure(backend, errno.EMFILE, monkeypatch)


async def measure(backend: LinuxBackend, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_traffic(lease: object) -> None:
        raise OSError(number, "no statistics")

    monkeypatch.setattr(module, "read_usage", lambda cgroup: None)
    network: Any = SimpleNamespace(read_traffic=read_traffic)
    backend._network = network
    container: Any = SimpleNamespace(
        cgroup=None, sidecars={}, facts=SimpleNamespace(lease=NetworkLease(None, ()))
    )
    backend._containers["box"] = container
    await backend.usage("box")


def test_namespaces_of_a_container_whose_pid_1_has_just_ended() -> None:
    """Once an internal error of the server's (found by chaos); of a create it is the host's fault still."""
    with pytest.raises(ContainerBroken), Namespaces("box", 2**22 + 1, privileged=False):
        raise AssertionError("there is no such process")
    with pytest.raises(FileNotFoundError), Namespaces("", 2**22 + 1, privileged=False):
        raise AssertionError("there is no such process")
