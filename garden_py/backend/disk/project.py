"""ext4 and xfs: a volume is a directory with a project id of its own, counted and limited by the project quota.

Source: quotactl(2), quotactl_fd (Linux 5.14), linux/quota.h, linux/dqblk_xfs.h, linux/fs.h (fsxattr), xfs_quota(8),
ext4(5) (prjquota). Both file systems answer the generic commands. overlayfs works on its upper layer without
CAP_SYS_RESOURCE (fs/overlayfs/super.c), so that the quota binds root, too.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import struct
from pathlib import Path
from typing import Final

from garden_py.backend.disk.driver import DiskLimits, DiskUse, opened

_FSXATTR = struct.Struct("=5I8s")  # xflags, extsize, nextents, projid, cowextsize, padding
_FS_IOC_FSGETXATTR = 2 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 31
_FS_IOC_FSSETXATTR = 1 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 32
_PROJECT_INHERIT: Final = 0x200  # FS_XFLAG_PROJINHERIT
_QUOTACTL_FD: Final = 443  # asm/unistd.h, the same on every architecture
_PROJECT_QUOTA: Final = 2  # PRJQUOTA
_Q_GETQUOTA, _Q_SETQUOTA, _Q_XGETQSTATV = 0x800007, 0x800008, ord("X") << 8 | 8
_DQBLK = struct.Struct(
    "=8QI4x"
)  # if_dqblk: hard and soft blocks, space, hard and soft inodes, inodes, two times, valid
_STATE = struct.Struct("=bxH156x")  # fs_quota_statv: version, flags; sizes and times that we do not ask for
_STATE_VERSION, _PROJECT_ENFORCED = 1, 1 << 5  # FS_QSTATV_VERSION1, FS_QUOTA_PDQ_ENFD
_BLOCK_BYTES: Final = 1024  # QIF_DQBLKSIZE
_BLOCK_LIMITS, _INODE_LIMITS = 1, 4  # QIF_BLIMITS, QIF_ILIMITS
# Above what people number by hand in /etc/projects, below 2^31.
_FIRST_ID, _IDS = 0x4000_0000, 0x3FFF_FFFF
_TRIES: Final = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class ProjectQuota:
    """Directories below one on a file system with project quotas in force; see Driver.

    Args:
        root: of the volumes.

    Raises:
        OSError: the file system has none (ENOSYS, ESRCH, ENOTSUP), is not mounted with them, or only counts (ext4 with
            the feature but without the option, xfs with pqnoenforce).
    """

    name = "project quotas"
    counts_inodes = True

    def __init__(self, root: Path) -> None:
        self._root = root
        with opened(root) as fd:
            state = ctypes.create_string_buffer(_STATE.pack(_STATE_VERSION, 0), _STATE.size)
            self._quotactl(fd, _Q_XGETQSTATV, 0, state)
            flags = _STATE.unpack(state.raw)[1]
            if not flags & _PROJECT_ENFORCED:
                raise OSError(
                    errno.ESRCH, "project quotas are not enforced: mount it with prjquota", str(root)
                )
            _project_of(fd)

    def make(self, volume: Path) -> None:
        """See Driver."""
        volume.mkdir(mode=0o700)
        try:
            with opened(volume) as fd:
                project = self._free_project(fd, volume.name)
                facts = bytearray(_FSXATTR.size)
                fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, facts)
                flags, extent, count, _, copied, padding = _FSXATTR.unpack(bytes(facts))
                wanted = _FSXATTR.pack(flags | _PROJECT_INHERIT, extent, count, project, copied, padding)
                fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, wanted)
        except BaseException:
            volume.rmdir()
            raise

    def _free_project(self, fd: int, name: str) -> int:
        """An id that nothing is counted under, also not the rubbish of an earlier volume."""
        for number in range(_TRIES):
            digest = hashlib.sha256(f"{name}/{number}".encode()).digest()
            project = _FIRST_ID + int.from_bytes(digest[:8], "big") % _IDS
            quota = self._get(fd, project)
            if not any(quota[:6]):
                return project
        raise OSError(errno.EAGAIN, "no project id is free", str(self._root))

    def limit(self, volume: Path, limits: DiskLimits) -> None:
        """See Driver. Bytes are rounded up to blocks of 1024."""
        with opened(volume) as fd:
            self._set(fd, _project_of(fd), limits)

    def limits(self, volume: Path) -> DiskLimits:
        """See Driver."""
        with opened(volume) as fd:
            quota = self._get(fd, _project_of(fd))
        return DiskLimits(quota[0] * _BLOCK_BYTES, quota[3])

    def use(self, volume: Path) -> DiskUse:
        """See Driver."""
        with opened(volume) as fd:
            quota = self._get(fd, _project_of(fd))
        return DiskUse(quota[2], quota[5])

    def remove(self, volume: Path) -> bool:
        """See Driver: its limits go; the directory is deleted like any other."""
        with opened(volume) as fd:
            self._set(fd, _project_of(fd), DiskLimits())
        return False

    def _set(self, fd: int, project: int, limits: DiskLimits) -> None:
        blocks = -(-limits.bytes // _BLOCK_BYTES)
        valid = _BLOCK_LIMITS | _INODE_LIMITS
        quota = _DQBLK.pack(blocks, blocks, 0, limits.inodes, limits.inodes, 0, 0, 0, valid)
        self._quotactl(fd, _Q_SETQUOTA, project, ctypes.create_string_buffer(quota, _DQBLK.size))

    def _get(self, fd: int, project: int) -> tuple[int, ...]:
        found = ctypes.create_string_buffer(_DQBLK.size)
        try:
            self._quotactl(fd, _Q_GETQUOTA, project, found)
        except FileNotFoundError:  # xfs has no record of it
            return (0,) * 9
        return _DQBLK.unpack(found.raw)

    def _quotactl(self, fd: int, command: int, project: int, record: ctypes.Array[ctypes.c_char]) -> None:
        code = command << 8 | _PROJECT_QUOTA
        if _libc.syscall(_QUOTACTL_FD, fd, ctypes.c_uint(code), ctypes.c_uint(project), record) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self._root))


def _project_of(fd: int) -> int:
    facts = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, facts)
    return int(_FSXATTR.unpack(bytes(facts))[3])
