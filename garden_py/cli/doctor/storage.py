"""Checks of the state directory's file system: its kind, room, and whether it can limit disk use."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from garden_py.backend.host.small_files import lines_of, read_mountinfo, unescape
from garden_py.cli.doctor.finding import Finding, Level

_LOW_FREE_BYTES: Final = 5 << 30
_LOW_FREE_INODES: Final = 100_000
# Written through and lost at a reboot, or unable to carry an overlayfs upper layer.
_UNFIT: Final = {
    "tmpfs": "lost at a reboot, and counted as memory",
    "overlay": "cannot carry another overlayfs",
}


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo, as far as it matters here."""

    point: Path
    kind: str
    options: frozenset[str]


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts; of those at one point, the last is the one to be seen. proc_pid_mountinfo(5). Pure."""
    mounts = []
    for line in lines_of(text):
        head, _, tail = line.partition(" - ")
        fields, tail_fields = head.split(" "), tail.split(" ")
        options = frozenset(fields[5].split(",")) | frozenset(tail_fields[-1].split(","))
        mounts.append(Mount(Path(unescape(fields[4])), tail_fields[0], options))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount:
    """The mount that holds an absolute path: the longest mount point above it. Pure."""
    above = [mount for mount in mounts if mount.point == path or mount.point in path.parents]
    return max(above, key=lambda mount: (len(mount.point.parts), mounts.index(mount)))


def check_state_directory(state_dir: Path) -> Finding:
    """Kind of file system and room on it."""
    mount = mount_of(state_dir, parse_mountinfo(read_mountinfo()))
    existing = state_dir
    while not existing.is_dir():
        existing = existing.parent
    room = os.statvfs(existing)
    free_bytes = room.f_bavail * room.f_frsize
    found = f"{state_dir} on {mount.kind}, {free_bytes >> 30} GiB free"
    if mount.kind in _UNFIT:
        return Finding(
            "state directory", Level.WARN, found, _UNFIT[mount.kind], "garden server --state-dir on a disk"
        )
    if free_bytes < _LOW_FREE_BYTES or (room.f_files > 0 and room.f_favail < _LOW_FREE_INODES):
        low = f"{found}, {room.f_favail} inodes free"
        return Finding("state directory", Level.WARN, low, "containers may run out of disk", "make room")
    return Finding("state directory", Level.OK, found)


def check_disk_quota(state_dir: Path) -> Finding:
    """Whether the file system could limit what one container writes."""
    mount = mount_of(state_dir, parse_mountinfo(read_mountinfo()))
    if mount.kind == "btrfs":
        return Finding("disk quota", Level.OK, "btrfs: one subvolume with a qgroup limit per container")
    if mount.options & {"prjquota", "pquota"}:
        return Finding("disk quota", Level.OK, f"{mount.kind} with project quotas")
    loop_store = shutil.which("mkfs.btrfs") is not None and Path("/dev/loop-control").exists()
    return Finding(
        "disk quota",
        Level.WARN,
        f"none on {mount.kind} at {mount.point}",
        "disk limits are refused, and nothing bounds what one container writes but the size of the disk",
        "garden server --store-size 20G"
        + ("" if loop_store else " (apt-get install btrfs-progs)")
        + ", or --state-dir on btrfs, or on xfs or ext4 mounted with prjquota",
    )
