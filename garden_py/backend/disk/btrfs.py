"""btrfs: a volume is a subvolume, counted and limited by its qgroup. It counts no inodes.

Source: btrfs-subvolume(8), btrfs-quota(8), linux/btrfs.h; what is in force and in use is read from
/sys/fs/btrfs/<uuid>/qgroups/0_<id> (btrfs(5)). A qgroup's figures change with a transaction; what is reserved
meanwhile is told beside them, and counts against the limit as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from garden_py.backend.disk.driver import DiskLimits, DiskUse, opened

MAGIC: Final = 0x9123683E  # linux/magic.h, BTRFS_SUPER_MAGIC
_IOC_WRITE, _IOC_READ = 1, 2  # asm-generic/ioctl.h
_NAME = struct.Struct("=q4088s")  # btrfs_ioctl_vol_args
_LIMIT = struct.Struct("=6Q")  # btrfs_ioctl_qgroup_limit_args
_QUOTA = struct.Struct("=QQ")  # btrfs_ioctl_quota_ctl_args
_QGROUP = struct.Struct("=QQ")  # btrfs_ioctl_qgroup_create_args
_INO_LOOKUP = struct.Struct("=QQ4080s")  # btrfs_ioctl_ino_lookup_args
_FS_INFO_BYTES: Final = 1024  # btrfs_ioctl_fs_info_args; its fsid stands at 16
_QUOTA_ENABLE: Final = 1
_LIMIT_REFERENCED: Final = 1  # BTRFS_QGROUP_LIMIT_MAX_RFER
_FIRST_FREE_OBJECT: Final = 256  # inode of a subvolume's root, BTRFS_FIRST_FREE_OBJECTID


def _ioctl_number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0x94 << 8 | number


_SUBVOL_CREATE = _ioctl_number(_IOC_WRITE, 14, _NAME.size)
_SNAP_DESTROY = _ioctl_number(_IOC_WRITE, 15, _NAME.size)
_GET_ROOT = _ioctl_number(_IOC_WRITE | _IOC_READ, 18, _INO_LOOKUP.size)
_FS_INFO = _ioctl_number(_IOC_READ, 31, _FS_INFO_BYTES)
_QUOTA_CTL = _ioctl_number(_IOC_WRITE | _IOC_READ, 40, _QUOTA.size)
_QGROUP_CREATE = _ioctl_number(_IOC_WRITE, 42, _QGROUP.size)
_QGROUP_LIMIT = _ioctl_number(_IOC_READ, 43, _LIMIT.size)


class Btrfs:
    """Subvolumes below one directory; see Driver.

    Args:
        root: a directory on btrfs.
        turn_on: turn quotas on there; else they must be on.

    Raises:
        OSError: quotas cannot be turned on there.
    """

    name = "btrfs qgroups"
    counts_inodes = False

    def __init__(self, root: Path, *, turn_on: bool = True) -> None:
        with opened(root) as fd:
            if turn_on:
                fcntl.ioctl(fd, _QUOTA_CTL, bytearray(_QUOTA.pack(_QUOTA_ENABLE, 0)))
            info = bytearray(_FS_INFO_BYTES)
            fcntl.ioctl(fd, _FS_INFO, info)
        self._qgroups = Path("/sys/fs/btrfs", str(uuid.UUID(bytes=bytes(info[16:32]))), "qgroups")
        if not self._qgroups.is_dir():
            raise OSError(errno.ENOTSUP, "the kernel does not show qgroups", str(self._qgroups))

    def make(self, volume: Path) -> None:
        """See Driver."""
        with opened(volume.parent) as fd:
            fcntl.ioctl(fd, _SUBVOL_CREATE, bytearray(_NAME.pack(0, os.fsencode(volume.name))))

    def limit(self, volume: Path, limits: DiskLimits) -> None:
        """See Driver; inodes cannot be limited."""
        if limits.inodes:
            raise OSError(errno.ENOTSUP, "btrfs limits no inodes", str(volume))
        with opened(volume) as fd:
            subvolume = _subvolume_id(fd)
        # Asked for through the volume itself, the change would count against its limit, and fail in one that is full.
        with opened(volume.parent) as fd:
            most = limits.bytes or (1 << 64) - 1  # which takes a limit away
            fcntl.ioctl(
                fd, _QGROUP_LIMIT, bytearray(_LIMIT.pack(subvolume, _LIMIT_REFERENCED, most, 0, 0, 0))
            )

    def limits(self, volume: Path) -> DiskLimits:
        """See Driver."""
        group = self._group(volume)
        flags, most = _read(group / "limit_flags"), _read(group / "max_referenced")
        return DiskLimits(bytes=most if flags & _LIMIT_REFERENCED else 0)

    def use(self, volume: Path) -> DiskUse:
        """See Driver."""
        group = self._group(volume)
        return DiskUse(_read(group / "referenced") + _read(group / "rsv_data"))

    def _group(self, volume: Path) -> Path:
        with opened(volume) as fd:
            return self._qgroups / f"0_{_subvolume_id(fd)}"

    def remove(self, volume: Path) -> bool:
        """See Driver."""
        with opened(volume) as fd:
            subvolume = _subvolume_id(fd)
        with opened(volume.parent) as fd:
            try:
                fcntl.ioctl(fd, _SNAP_DESTROY, bytearray(_NAME.pack(0, os.fsencode(volume.name))))
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                return False  # somebody has made subvolumes in it, which go one by one
            # Kernels before 6.12 leave its qgroup behind, newer ones remove it when the subvolume has been cleaned
            # away.
            with suppress(OSError):
                fcntl.ioctl(fd, _QGROUP_CREATE, bytearray(_QGROUP.pack(0, subvolume)))
        return True


def is_subvolume(path: Path) -> bool:
    """Whether a directory is the root of a subvolume."""
    return path.stat().st_ino == _FIRST_FREE_OBJECT and not path.is_symlink()


def _subvolume_id(fd: int) -> int:
    found = bytearray(_INO_LOOKUP.pack(0, _FIRST_FREE_OBJECT, b""))
    fcntl.ioctl(fd, _GET_ROOT, found)
    return int(_INO_LOOKUP.unpack(bytes(found))[0])


def _read(file: Path) -> int:
    return int(file.read_text())
