"""Every test of this directory runs against the fake backend, and with --root against the real one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from kit.fake_backend import FakeBackend, FakeHost
from kit.stage import Stage
from kit.trace import assert_no_trace, snapshot

from garden_py.backend.linux import open_linux_backend
from garden_py.config import Config, load_config


@pytest.fixture(scope="session")
def linux_config() -> Iterator[Config]:
    """Directories, addresses, ports and ids that no other test uses; gone without a trace at the end."""
    before = snapshot()
    place = Path(tempfile.mkdtemp(prefix="gc-", dir="/var/tmp"))
    place.chmod(0o755)
    slot = os.getpid() % 20
    yield load_config(
        {
            "state_dir": str(place / "state"),
            "run_dir": str(place / "run"),
            "network_pool": f"10.{230 + slot}.0.0/28",
            "port_pool_start": 45_000 + slot * 10,
            "port_pool_size": 4,
            "uid_pool_start": 0x7000_0000 + (300 + slot) * 65_536 * 20,
            "uid_pool_size": 20,
            "output_retention_bytes": 1 << 20,
        },
        environ={},
    )
    shutil.rmtree(place)
    assert_no_trace(before)


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """An open backend; afterwards its containers are destroyed."""
    if request.param == "fake":
        host = FakeHost()
        stage = Stage(lambda: FakeBackend(host), FakeBackend(host))
    else:
        config: Config = request.getfixturevalue("linux_config")
        config.state_dir.mkdir(mode=0o711, exist_ok=True, parents=True)
        stage = Stage(lambda: open_linux_backend(config), open_linux_backend(config))
    await stage.backend.open(stage.heard.events(), [])
    yield stage
    await stage.clear()
