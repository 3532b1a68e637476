"""Giving up, for good, whatever unpacking a stranger's archive does not need.

    die with the parent · few files, bounded memory, no core · own mount, network and IPC namespaces, whose only file
    system is the target · five capabilities, and one more behind a filter · no new privileges

A bug in the decompressors or in the interpreter then reaches the tree that is being made, and nothing else.

Sources: pivot_root(2), capabilities(7), seccomp(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter
from pathlib import Path
from typing import Any, Final

from garden_py.backend.host import syscalls
from garden_py.backend.oci.seccomp_filter import NoFilter, compile_filter

ADDRESS_SPACE_MAX_BYTES: Final = (
    1 << 30
)  # zstd may want a window of 128 MiB, each thread's allocator reserves 64
_FILES_MAX: Final = 64
_CLONE_NEWIPC: Final = 0x08000000  # sched.h
_MS_BIND, _MS_PRIVATE = 0x1000, 1 << 18  # sys/mount.h
_PR_SET_SECCOMP, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 22, 23, 24, 38  # linux/prctl.h
_SECCOMP_MODE_FILTER: Final = 2
_CAPABILITIES_V3: Final = 0x2008_0522  # _LINUX_CAPABILITY_VERSION_3, linux/capability.h
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}  # asm/unistd.h

# linux/capability.h. Whiteouts need no CAP_MKNOD, so that nothing here can make a device.
_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID, _SETFCAP, _SYS_ADMIN = 0, 1, 3, 4, 31, 21
_KEPT: Final = sum(1 << bit for bit in (_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID, _SETFCAP))

# trusted.overlay.opaque needs CAP_SYS_ADMIN, which allows so much more: none of that.
_REFUSED_CALLS: Final = (
    "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "setns", "unshare", "execve", "execveat", "bpf", "perf_event_open", "ptrace", "process_vm_readv",
    "process_vm_writev", "open_by_handle_at", "init_module", "finit_module", "delete_module", "kexec_load",
    "kexec_file_load", "swapon", "swapoff", "quotactl", "quotactl_fd", "reboot", "socket", "socketpair", "keyctl",
    "add_key", "request_key", "userfaultfd", "io_uring_setup", "fanotify_init", "syslog", "sethostname",
    "setdomainname", "acct", "iopl", "ioperm", "kcmp", "lookup_dcookie", "nfsservctl", "vhangup",
)  # fmt: skip
_FILTERED: Final = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    """struct sock_fprog, linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(target: Path, *, source_fd: int) -> None:
    """Make target the root directory, and give up all but what making files in it needs.

    For a process without threads that has imported whatever it will need.

    Args:
        target: absolute.
        source_fd: the only descriptor that stays open beside the standard ones.

    Raises:
        OSError: this host or its capability bounding set does not allow it.
    """
    syscalls.die_with_parent()
    os.closerange(3, source_fd)
    os.closerange(source_fd + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # A module that is looked for from now on would be looked for in the layer.
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter]
    program = _compile_refusals()  # before the library and /sys are out of sight
    _leave_the_host(target)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _FILES_MAX),
        (resource.RLIMIT_AS, ADDRESS_SPACE_MAX_BYTES),
    ):
        _, hard = resource.getrlimit(limit)
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lower, lower))
    os.umask(0)
    # Without a filter CAP_SYS_ADMIN is too much; a layer with an opaque directory is refused then.
    _keep_capabilities(_KEPT | (1 << _SYS_ADMIN if program else 0))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if program:
        filter_ = _Program(len(program) // 8, program)
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


def _leave_the_host(target: Path) -> None:
    """A mount namespace that holds the target only: not even a process that may chroot finds a way back."""
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | _CLONE_NEWIPC)
    syscalls.mount("none", Path("/"), "", syscalls.MS_REC | _MS_PRIVATE)
    syscalls.mount(str(target), target, "", _MS_BIND)
    os.chdir(target)
    # The old root comes to lie on the new one, from where it is taken away (pivot_root(2), "pivot_root(".", ".")").
    if _libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") != 0:
        raise _failure("pivot_root")
    syscalls.umount(Path("."), lazy=True)
    os.chdir("/")


def _keep_capabilities(wanted: int) -> None:
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    words = ctypes.create_string_buffer(24)
    if _libc.capget(header, words) != 0:
        raise _failure("capget")
    low, high = struct.unpack_from("=4xI8xI", words.raw)  # permitted, 32 bits each
    kept = wanted & (low | high << 32)
    capability = 0
    while (is_bounded_in := _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:
        if is_bounded_in and not kept >> capability & 1:
            _prctl(_PR_CAPBSET_DROP, capability)
        capability += 1
    sets = struct.pack("=6I", *[kept & 0xFFFF_FFFF] * 2, 0, *[kept >> 32] * 2, 0)
    if _libc.capset(header, sets) != 0:
        raise _failure("capset")


def _compile_refusals() -> bytes | None:
    policy: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": _FILTERED[platform.machine()],
        "syscalls": [{"names": _REFUSED_CALLS, "action": "SCMP_ACT_ERRNO"}],
    }
    try:
        return compile_filter(policy)
    except NoFilter:
        return None


def _prctl(option: int, first: int, second: int = 0) -> None:
    if _libc.prctl(option, first, second, 0, 0) != 0:
        raise _failure("prctl")


def _failure(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), call)
