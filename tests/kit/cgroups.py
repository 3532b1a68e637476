"""Cgroups as the host shows them, while others make and remove some all the time.

`Path.glob` fails on a directory that goes while it looks (CPython 3.11); `glob.glob` and `os.walk` do not.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# Of one server: with cgroup v2, with v1, by systemd, and for throttled containers.
_SERVERS = ("garden-*", "*/garden-*", "*/*/garden-*.scope")
_PARENTS = (*_SERVERS, "*/garden-throttled-*/*")


def servers_cgroups() -> list[Path]:
    """Servers' cgroup directories, in every hierarchy."""
    return [path for pattern in _SERVERS for path in matching(ROOT, pattern)]


def cgroups_of(handle: str) -> list[Path]:
    """A container's cgroup directories, in every hierarchy."""
    return [path for pattern in _PARENTS for path in matching(ROOT, f"{pattern}/{handle}")]


def matching(top: Path, pattern: str) -> list[Path]:
    """What is there below a directory by a shell pattern; `**` is any number of directories."""
    return [top / found for found in glob.glob(pattern, root_dir=top, recursive=True)]


def groups_in(top: Path) -> list[Path]:
    """The directory and all below it, inner ones first."""
    return [Path(place) for place, _, _ in os.walk(top, topdown=False)]


def pids_in(top: Path) -> list[int]:
    """Processes of a cgroup and of those below it, by the host's numbers."""
    return [pid for group in groups_in(top) for pid in _members(group)]


def _members(group: Path) -> list[int]:
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []  # removed meanwhile: ENOENT, or ENODEV of a file that was open
