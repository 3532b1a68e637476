"""Which block device a directory is on, and which there are."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from garden_py.backend.host.small_files import lines_of, read_mountinfo, unescape

_SYS_DEV = Path("/sys/dev/block")


def device_below(directory: Path) -> str | None:
    """`MAJOR:MINOR` of the whole device that carries a directory's file system; None: there is none, or it is many.

    A file system of its own numbering, as btrfs has, is looked up by what is mounted there. Limits go on whole devices,
    not on partitions (block/blk-cgroup.c, blkg_conf_open_bdev).
    """
    number = directory.stat().st_dev
    if os.major(number) == 0:
        source = _mount_source(read_mountinfo(), directory)
        if source is None:
            return None
        number = source
    return whole_device(f"{os.major(number)}:{os.minor(number)}")


def whole_device(number: str) -> str | None:
    """The device that a partition is of, or the device itself; None: the kernel knows no such."""
    place = _SYS_DEV / number
    if not place.exists():
        return None
    if (place / "partition").exists():
        return (place.resolve().parent / "dev").read_text().strip()
    return number


def _mount_source(mountinfo: str, directory: Path) -> int | None:
    """Device number of what is mounted at the nearest mount point above a directory; a later mount covers a former."""
    nearest, source = "", ""
    path = str(directory.resolve())
    for line in lines_of(mountinfo):
        left, _, right = line.partition(" - ")
        point = unescape(left.split(" ")[4])
        if len(point) >= len(nearest) and f"{path}/".startswith(f"{point.rstrip('/')}/"):
            nearest, source = point, right.split(" ")[1]
    try:
        found = os.stat(source)
    except OSError:  # no path: "tmpfs", "pool/name", "host:/export"
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def real_devices() -> list[str]:
    """Every whole device that is hardware, not made of others or of memory."""
    found = (entry for entry in Path("/sys/block").iterdir() if (entry / "device").exists())
    return sorted((entry / "dev").read_text().strip() for entry in found)


def scheduler_of(device: str) -> str:
    """The I/O scheduler in use by a device; empty if that cannot be told. Documentation/block/switching-sched.rst."""
    try:
        text = (_SYS_DEV / device / "queue" / "scheduler").read_text()
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]
