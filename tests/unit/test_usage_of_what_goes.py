"""Measuring a container whose cgroup or link goes away at that moment is the container's fault, not the server's."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from garden_py.backend.linux import backend as module
from garden_py.backend.linux.backend import LinuxBackend
from garden_py.config import Config
from garden_py.model.errors import ContainerBroken


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> LinuxBackend:
    """With one container, of which everything can be read."""
    backend = LinuxBackend(Config())
    container: Any = SimpleNamespace(cgroup=None, facts=SimpleNamespace(lease=None))
    backend._containers["box"] = container
    monkeypatch.setattr(module, "read_usage", lambda cgroup: None)
    return backend


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.EINVAL])
async def test_what_is_gone_is_told_as_broken(backend: LinuxBackend, number: int) -> None:
    """Sysfs answers EINVAL for the statistics of a link that was removed between open and read, cgroups ENODEV."""

    def read_traffic(handle: str, lease: object) -> None:
        raise OSError(number, "gone")

    network: Any = SimpleNamespace(read_traffic=read_traffic)
    backend._network = network
    with pytest.raises(ContainerBroken, match="gone"):
        await backend.usage("box")


async def test_any_other_failure_is_not_swallowed(backend: LinuxBackend) -> None:
    """EMFILE says nothing about the container."""

    def read_traffic(handle: str, lease: object) -> None:
        raise OSError(errno.EMFILE, "too many")

    network: Any = SimpleNamespace(read_traffic=read_traffic)
    backend._network = network
    with pytest.raises(OSError, match="too many"):
        await backend.usage("box")
