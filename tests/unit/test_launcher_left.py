"""A job whose caller has left."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from garden_py.backend.launcher.client import Launcher
from garden_py.model.errors import HostFault


async def test_a_job_that_fails_after_its_caller_has_left_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever cancels it, e.g. the destroy of a container in which a sidecar is started, undoes it in any case."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    left = asyncio.Event()

    async def fail(*_: object) -> dict[str, Any]:
        await left.wait()
        raise HostFault("container.launch", "runc run failed")

    launcher = Launcher(tmp_path / "mnt", workers=1)
    monkeypatch.setattr(launcher, "_run", fail)
    job = asyncio.ensure_future(launcher.run("container.launch", {}))
    await asyncio.sleep(0)
    job.cancel()
    await asyncio.sleep(0)
    left.set()
    with pytest.raises(asyncio.CancelledError):
        await job
    del job
    await asyncio.sleep(0)
    gc.collect()
    assert complaints == []
