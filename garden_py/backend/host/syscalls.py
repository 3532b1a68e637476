"""System calls that Python 3.11 does not wrap: declare, call, raise OSError with errno and path."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# asm/unistd.h: the new mount calls have the same numbers on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPENAT2, _RESOLVE_IN_ROOT = 437, 0x10
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 0x4

MS_REC, MS_SLAVE, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x4000, 0x80000, 2, 4, 8  # sys/mount.h
MNT_DETACH = 2
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000  # sched.h
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 0x1, 0x2, 0x4, 0x0010_0000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _fail(path: str | Path | None = None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), None if path is None else str(path))


def mount(source: str, target: Path, fstype: str, flags: int = 0, data: str = "") -> None:
    """Attach a file system at target.

    Source: mount(2).
    """
    if _libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, data.encode()) != 0:
        raise _fail(target)


def umount(target: Path, *, lazy: bool = False) -> None:
    """Detach what is mounted at target; lazy: even if it is busy. Source: umount2(2)."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH if lazy else 0) != 0:
        raise _fail(target)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the storage of a range of a file, which reads as zeros from then on. Source: fallocate(2)."""
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        raise _fail()


def open_in_root(root_fd: int, path: str) -> int:
    """A descriptor (O_PATH) of what a path means to a process whose root directory is root_fd; links stay inside.

    Source: openat2(2), RESOLVE_IN_ROOT; Linux 5.6.
    """
    how = struct.pack("=3Q", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    fd = _libc.syscall(_OPENAT2, root_fd, os.fsencode(path), how, len(how))
    if fd < 0:
        raise _fail(path)
    return int(fd)


class _StatFs(ctypes.Structure):
    _fields_ = (("type", ctypes.c_long), ("rest", ctypes.c_char * 256))


def file_system_magic(path: Path) -> int:
    """What kind of file system a path is on, by its number in linux/magic.h. Source: statfs(2)."""
    found = _StatFs()
    if _libc.statfs(os.fsencode(path), ctypes.byref(found)) != 0:
        raise _fail(path)
    return int(found.type) & 0xFFFF_FFFF


def sync_file_system(fd: int) -> None:
    """Write out what is cached of the file system that fd is on. Source: syncfs(2)."""
    if _libc.syncfs(fd) != 0:
        raise _fail()


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_* flags for new ones.

    Source: unshare(2).
    """
    if _libc.unshare(flags) != 0:
        raise _fail()


def set_namespace(fd: int, kind: int) -> None:
    """Join the namespace that fd is of; kind: CLONE_*, what it has to be. Source: setns(2)."""
    if _libc.setns(fd, kind) != 0:
        raise _fail()


def die_with_parent() -> None:
    """Be killed when the thread that forked us ends; for the time after fork. Source: PR_SET_PDEATHSIG, prctl(2)."""
    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise _fail()


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends. Source: PR_SET_CHILD_SUBREAPER, prctl(2)."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise _fail()


def clone_mount(source: Path) -> int:
    """A detached, non-recursive copy of the mount at source, as a descriptor.

    Source: open_tree(2), OPEN_TREE_CLONE.
    """
    fd = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if fd < 0:
        raise _fail(source)
    return int(fd)


def set_mount_attributes(mount_fd: int, attributes: int, *, userns_fd: int | None = None) -> None:
    """Set MOUNT_ATTR_* on a detached mount; with userns_fd also map its owners through that user namespace.

    Source: mount_setattr(2); struct mount_attr is four u64: attr_set, attr_clr, propagation, userns_fd.
    """
    if userns_fd is not None:
        attributes |= MOUNT_ATTR_IDMAP
    packed = struct.pack("=QQQQ", attributes, 0, 0, userns_fd or 0)
    argument = ctypes.create_string_buffer(packed, len(packed))
    if _libc.syscall(_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, argument, len(packed)) != 0:
        raise _fail()


def attach_mount(mount_fd: int, target: Path) -> None:
    """Attach a detached mount at target. Source: move_mount(2)."""
    if (
        _libc.syscall(_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        != 0
    ):
        raise _fail(target)
