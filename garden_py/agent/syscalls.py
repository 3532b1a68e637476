"""The few system calls that Python 3.11 does not offer, through `_ctypes` alone.

`ctypes`, the Python package over `_ctypes`, costs 5 ms at start-up and pulls in `struct`; the C module is
enough to call functions of libc with integers and byte buffers. All functions raise `OSError`.
"""

from __future__ import annotations

import _ctypes
import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import c_char, c_int, c_long, c_ulong
else:

    class c_char(_ctypes._SimpleCData):  # noqa: D101
        _type_ = "c"

    class c_int(_ctypes._SimpleCData):  # noqa: D101
        _type_ = "i"

    class c_long(_ctypes._SimpleCData):  # noqa: D101
        _type_ = "l"

    class c_ulong(_ctypes._SimpleCData):  # noqa: D101
        _type_ = "L"


# linux/prctl.h, prctl(2)
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAP_CHOWN, _CAP_SYS_PTRACE, _CAP_SYS_ADMIN, _CAP_WAKE_ALARM = 0, 19, 21, 35  # linux/capability.h
_SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
_FILTER_INSTRUCTION_BYTES = 8  # struct sock_filter, linux/filter.h
_LINUX_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h, capget(2): 64 bit sets
_SYS_OPENAT2 = 437  # one number on all architectures since Linux 5.6


_inherits = False  # whether processes have inheritable capabilities; see prepare_capabilities

# Types are made once: making one takes 50 µs, and a fresh child has only what its parent made.
_Capabilities = c_char * 24
_Limit = c_char * 16


class _LongFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = c_long


class _IntFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = c_int


_LIBC = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # dlopen(NULL): what is loaded already
_prctl = _IntFunction(_ctypes.dlsym(_LIBC, "prctl"))
_capget = _IntFunction(_ctypes.dlsym(_LIBC, "capget"))
_capset = _IntFunction(_ctypes.dlsym(_LIBC, "capset"))
_prlimit = _IntFunction(_ctypes.dlsym(_LIBC, "prlimit"))
_setfsuid = _IntFunction(_ctypes.dlsym(_LIBC, "setfsuid"))
_setfsgid = _IntFunction(_ctypes.dlsym(_LIBC, "setfsgid"))
_syscall = _LongFunction(_ctypes.dlsym(_LIBC, "syscall"))


def _check(result: int) -> int:
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, posix.strerror(number))
    return result


def _call_prctl(option: int, argument: int | bytes = 0, second: int = 0) -> int:
    # prctl(2) is variadic with unsigned long arguments; a bare int would leave the upper half undefined.
    first = argument if isinstance(argument, bytes) else c_ulong(argument)
    return _check(_prctl(option, first, c_ulong(second), c_ulong(0), c_ulong(0)))


def set_process_name(name: bytes) -> None:
    """Set comm, what `ps` shows; at most 15 bytes. PR_SET_NAME."""
    _call_prctl(_PR_SET_NAME, name)


def forbid_tracing() -> None:
    """Nobody without CAP_SYS_PTRACE may trace this process or read its /proc entries. PR_SET_DUMPABLE.

    Inherited by fork, undone by exec: a child is covered exactly until it is the user's own program.
    """
    _call_prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, for an agent that is not PID 1. PR_SET_CHILD_SUBREAPER."""
    _call_prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """From now on exec grants nothing (setuid bits, file capabilities). PR_SET_NO_NEW_PRIVS."""
    _call_prctl(_PR_SET_NO_NEW_PRIVS, 1)


def install_filter(program: bytes) -> None:
    """Filter the system calls of this process and of all that it starts, for ever. PR_SET_SECCOMP.

    It takes CAP_SYS_ADMIN, without which only processes that can gain no privileges may filter themselves (seccomp(2)).
    PID 1 has it for this alone and lays it down here: nothing in the container has it afterwards, or can get it.

    Args:
        program: an array of struct sock_filter.
    """
    held = c_char * len(program)
    instructions = held.from_buffer_copy(program)
    # struct sock_fprog: unsigned short, and a pointer on its own alignment.
    header = (len(program) // _FILTER_INSTRUCTION_BYTES).to_bytes(8, "little")
    argument = (c_char * 16).from_buffer_copy(header + _ctypes.addressof(instructions).to_bytes(8, "little"))
    _call_prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _ctypes.addressof(argument))
    words = _read_capabilities()
    without = ~(1 << _CAP_SYS_ADMIN) & 0xFFFF_FFFF
    for index in range(3):
        words[index] = (int.from_bytes(words[index], "little") & without).to_bytes(4, "little")
    _call_prctl(_PR_CAPBSET_DROP, _CAP_SYS_ADMIN)
    _check(_capset(_capability_header(), b"".join(words)))


def limit_bounding_set(keep_mask: int) -> None:
    """Drop every capability from the bounding set whose bit is not in `keep_mask`. PR_CAPBSET_DROP."""
    for capability in range(64):
        if keep_mask >> capability & 1:
            continue
        try:
            is_bounded_in = _call_prctl(_PR_CAPBSET_READ, capability)
        except OSError:  # EINVAL: beyond the last capability this kernel knows
            return
        if is_bounded_in:
            _call_prctl(_PR_CAPBSET_DROP, capability)


def _capability_header() -> bytes:
    return _LINUX_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)


def _read_capabilities() -> list[bytes]:
    """Six 32 bit words: effective, permitted, inheritable of the low half, then of the high half."""
    buffer = _Capabilities()
    _check(_capget(_capability_header(), buffer))
    data = buffer.raw
    return [data[at : at + 4] for at in range(0, 24, 4)]


def _has(words: list[bytes], index: int, capability: int) -> bool:
    """Whether set `index` (0 effective, 1 permitted, 2 inheritable) holds the capability."""
    word = int.from_bytes(words[index + 3 * (capability // 32)], "little")
    return bool(word >> capability % 32 & 1)


def _write_inheritable(words: list[bytes], low: bytes, high: bytes) -> None:
    words[2], words[5] = low, high
    _check(_capset(_capability_header(), b"".join(words)))


def limit_inheritable_capabilities(keep_mask: int | None) -> None:
    """Empty the inheritable set: exec can only give what the file and bounding set allow.

    But as the Garden reference does it (`prepare_capabilities`), keep what is in `keep_mask`, None being everything.

    Source: capabilities(7); non-empty inheritable sets were CVE-2022-29162.
    """
    words = _read_capabilities()
    keep = 0 if not _inherits else 0xFFFF_FFFF_FFFF_FFFF if keep_mask is None else keep_mask
    low, high = int.from_bytes(words[2], "little") & keep, int.from_bytes(words[5], "little") & keep >> 32
    _write_inheritable(words, low.to_bytes(4, "little"), high.to_bytes(4, "little"))


def prepare_capabilities() -> None:
    """Prepare PID 1's sets. If the runtime has given it inheritable ones, all stays as it is (`--compat garden`).

    Else empty the inheritable and ambient sets, but keep CAP_WAKE_ALARM for PID 1, and for PID 1 alone.

    Nothing may trace a process that has a capability which the tracer lacks (ptrace(2), "Ptrace access mode checking").
    So no process of the container can get at PID 1 even in the moment after an exec in which it is dumpable. The
    capability itself is of no use in a user namespace. Taken from the bounding set, nobody can get it any more; in the
    inheritable set, it is still there after PID 1 has executed another agent. Every child empties its own set before
    its exec. Where it is missing, or where the container may trace everything (privileged), there is no such shield.
    """
    global _inherits
    words = _read_capabilities()
    _inherits = _has(words, 2, _CAP_CHOWN)
    if _inherits:
        return
    shielded = _has(words, 1, _CAP_WAKE_ALARM) and not _has(words, 1, _CAP_SYS_PTRACE)
    _write_inheritable(words, bytes(4), (shielded << _CAP_WAKE_ALARM - 32).to_bytes(4, "little"))
    _call_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if shielded:
        _call_prctl(_PR_CAPBSET_DROP, _CAP_WAKE_ALARM)


def act_on_files_as(uid: int, gid: int) -> None:
    """What is created from now on belongs to uid and gid; file permissions stay root's (setfsuid(2)).

    Creating a file under its final owner leaves no moment at which a rename could make a later chown hit
    something else. setfsuid(2) never reports failure, so the change is read back.

    Raises:
        OSError: EPERM if the ids could not be taken on.
    """
    for change, wanted in ((_setfsgid, gid), (_setfsuid, uid)):
        change(c_ulong(wanted))
        if change(c_ulong(0xFFFFFFFF)) & 0xFFFFFFFF != wanted:
            raise OSError(1, posix.strerror(1))  # EPERM
    # Leaving fsuid 0 clears the file capabilities from the effective set (capabilities(7)); they are still
    # permitted, so take them back.
    words = _read_capabilities()
    words[0], words[3] = words[1], words[4]
    _check(_capset(_capability_header(), b"".join(words)))


def set_resource_limit(resource: int, soft: int, hard: int) -> None:
    """prlimit(2) on the calling process; values are unsigned, 2**64-1 is "unlimited"."""
    new = soft.to_bytes(8, "little") + hard.to_bytes(8, "little")
    _check(_prlimit(0, resource, new, None))


def read_resource_limit(resource: int) -> tuple[int, int]:
    """(soft, hard) of the calling process; 2**64-1 is "unlimited". prlimit(2)."""
    buffer = _Limit()
    _check(_prlimit(0, resource, None, buffer))
    old = buffer.raw
    return int.from_bytes(old[:8], "little"), int.from_bytes(old[8:], "little")


def open_beneath(directory_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """openat2(2): open `path` under the directory; `resolve` are RESOLVE_* flags. Close-on-exec is added."""
    how = (flags | posix.O_CLOEXEC).to_bytes(8, "little") + bytes(8) + resolve.to_bytes(8, "little")
    return _check(_syscall(c_long(_SYS_OPENAT2), directory_fd, path, how, c_ulong(len(how))))
