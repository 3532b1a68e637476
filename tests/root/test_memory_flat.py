"""Output that nobody reads costs the server no memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.patience import FACTOR
from kit.server import ServerProcess, running_server

from garden_py.client import GardenClient, ProcessSpec

pytestmark = pytest.mark.root
PROCESSES = 32
# The promise was measured over a minute (docs/promises.md); what grows does so from the first second.
SECONDS = 8 * FACTOR


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    with running_server("--log-level", "info") as server:
        yield server


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) << 10


def test_32_processes_that_write_without_a_reader_leave_memory_flat(server: ServerProcess) -> None:
    """Their pipes go to disk, and the oldest segments go: neither memory nor disk grows with what was written."""
    with GardenClient(server.address) as garden, garden.create() as box:
        for number in range(PROCESSES):
            box.start(ProcessSpec("yes", id=f"p{number}", output_retention_bytes=1 << 20))
        time.sleep(2)
        before, began = private_bytes(server.pid), written(box, 0)
        time.sleep(SECONDS)
        after = private_bytes(server.pid)
        assert written(box, 0) - began > 8 << 20, "they have not written more than is kept"
        assert after - before < 8 << 20, f"{before} bytes became {after}"
        kept = bytes_kept(server.place / "state/containers" / box.handle)
        assert kept <= PROCESSES * (1 << 20)
        assert box.run(["echo", "alive"]).output().stdout == b"alive\n"


def written(box, number: int) -> int:
    """Bytes that a process has written so far: where a reader from the end would begin."""
    with box.attach(f"p{number}", stdout_offset=None) as process:
        return next(iter(process)).offset


def bytes_kept(directory: Path) -> int:
    """Of all segments; one that goes between listing and looking is not kept."""
    total = 0
    for where, _, names in os.walk(directory):
        for name in names:
            if name.startswith(("stdout.", "stderr.")):
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(Path(where, name)).st_size
    return total
