"""Processes that SIGKILL does not end for a while: held by the freezer of cgroup v1 (freezer-subsystem.rst)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kit.garden import wait_until

FREEZER = Path("/sys/fs/cgroup/freezer")
_numbers = itertools.count()


@contextmanager
def held(*pids: int) -> Iterator[None]:
    """While this lasts they sleep in the kernel, in a group that no server may thaw: it is the test's own."""
    group = FREEZER / f"stuck-{os.getpid()}-{next(_numbers)}"
    group.mkdir()
    try:
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        state = group / "freezer.state"
        state.write_text("FROZEN")
        wait_until(lambda: state.read_text().strip() == "FROZEN", "the freeze")
        try:
            yield
        finally:
            state.write_text("THAWED")
    finally:
        wait_until(lambda: _is_left(group), "the end of those that were held")


def _is_left(group: Path) -> bool:
    """Remove the group, with those that have not been killed put where they were; False: one is just ending."""
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            (FREEZER / "cgroup.procs").write_text(pid)
    try:
        group.rmdir()
    except OSError:
        return False
    return True
