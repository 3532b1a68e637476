"""Starting a sidecar fails with errors that say what they are."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from garden_py.backend.images.images import Rootfs
from garden_py.backend.linux.container import LinuxContainer
from garden_py.backend.linux.sidecars import Sidecars, runtime_id_of
from garden_py.config import Config
from garden_py.model import errors
from garden_py.model.process import ProcessSpec, Sidecar


class NoStore:
    """Takes every image for a directory."""

    @asynccontextmanager
    async def prepared(self, text: str, *_: object) -> AsyncIterator[Rootfs]:
        yield Rootfs(text, (Path(text),))


class Failing(Sidecars):
    """Gets no further than the first step."""

    def __init__(self, failure: BaseException) -> None:
        site: Any = type("OneConfig", (), {"config": Config(create_timeout_s=1)})
        nobody: Any = None
        store: Any = NoStore()
        disk: Any = type("NoDisk", (), {"check": staticmethod(lambda limits: None)})
        roots: Any = type("NoPlugins", (), {"commands_for": staticmethod(lambda image, field: ())})
        super().__init__(site, nobody, store, disk, roots, nobody)
        self._failure = failure
        self.removed: list[str] = []

    async def _claim(self, *_: object) -> Any:
        raise self._failure

    async def _remove(self, container: LinuxContainer, process_id: str) -> None:
        self.removed.append(process_id)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errors.HostFault),
        (TimeoutError(), errors.ProcessStartFailed),
        (errors.ContainerBroken("box", "its PID 1 has ended"), errors.ContainerBroken),
    ],
    ids=["full disk", "time", "broken"],
)
async def test_failure_is_typed_and_undone(
    failure: BaseException, told: type[Exception], tmp_path: Path
) -> None:
    """A full disk was once an internal error of the server (found by chaos)."""
    nobody: Any = None
    cgroup: Any = FakeCgroup()
    container = LinuxContainer("box", nobody, cgroup, tmp_path, nobody)
    sidecars = Failing(failure)
    spec = Sidecar(str(tmp_path))
    with pytest.raises(told):
        await sidecars.launch(container, ProcessSpec("true", id="p", sidecar=spec), spec)
    assert sidecars.removed == ["p"]
    assert not container.sidecars
    assert not container.jobs


class FakeCgroup:
    """As much of one as a container needs to be made."""

    def leaf(self, process_id: str | None, *, beside: bool = False) -> tuple[str, ...]:
        return ("work",)


def test_runtime_id_tells_whose_it_is_and_is_one_for_each_process() -> None:
    """The ledger takes the part before the dash for the container's."""
    first, second = runtime_id_of("ab12", "p"), runtime_id_of("ab12", "q")
    assert first != second
    assert {first.partition("-")[0], second.partition("-")[0]} == {"ab12"}
