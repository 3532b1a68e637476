"""Turning `linux.seccomp` into the program that the kernel runs, once for all containers.

A runtime compiles the policy anew for every container, which takes it 15 ms for three architectures. The program
depends on nothing but the policy and the host's libseccomp, so it is compiled when the server starts, and the agent
installs it (docs/decisions/0013-filter-compiled-once.md).

Source: OCI runtime-spec 1.0.2 config-linux.md "Seccomp"; seccomp(2); seccomp_rule_add(3), seccomp_export_bpf(3).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

_LIBRARY: Final = "libseccomp.so.2"
_UNKNOWN_SYSCALL: Final = -1  # __NR_SCMP_ERROR; numbers below are pseudo system calls of other architectures
_ALREADY_THE_DEFAULT: Final = -errno.EACCES

# seccomp.h
_ACTIONS: Final = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000}
_COMPARISONS: Final = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
_OPTIMIZE: Final = 8  # SCMP_FLTATR_CTL_OPTIMIZE
_BINARY_TREE: Final = 2  # looked up in a tree by number, not one after the other


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How libseccomp and the kernel name one.

    Attributes:
        token: SCMP_ARCH_*, seccomp.h.
        audit: AUDIT_ARCH_* that the kernel puts into seccomp_data, linux/audit.h.
        bit: set in the numbers of its system calls; 0: none.
    """

    token: int
    audit: int
    bit: int = 0


X32_BIT: Final = 0x4000_0000  # __X32_SYSCALL_BIT, asm/unistd.h: an architecture of its own only by this bit
_ARCHITECTURES: Final = {
    "SCMP_ARCH_X86_64": _Architecture(0xC000003E, 0xC000003E),
    "SCMP_ARCH_X86": _Architecture(0x40000003, 0x40000003),
    "SCMP_ARCH_X32": _Architecture(0x4000003E, 0xC000003E, X32_BIT),
    "SCMP_ARCH_AARCH64": _Architecture(0xC00000B7, 0xC00000B7),
    "SCMP_ARCH_ARM": _Architecture(0x40000028, 0x40000028),
}

# linux/bpf_common.h, linux/filter.h
_LOAD_WORD, _JUMP, _RETURN = 0x20, 0x05, 0x06
_JUMP_EQUAL, _JUMP_GREATER, _JUMP_GREATER_EQUAL = 0x15, 0x25, 0x35
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # offsets in struct seccomp_data
_FIRST_ARGUMENT_AT: Final = 16  # its lower half, on the little-endian machines that we know
_ENOSYS: Final = 0x0005_0000 | errno.ENOSYS
_EPERM: Final = 0x0005_0000 | errno.EPERM

# sys/socket.h; linux/net.h; socket(2) in the kernel's tables of system calls, by AUDIT_ARCH_*
_AF_XDP, _SYS_SOCKET, _I386_SOCKETCALL, _AUDIT_I386 = 44, 1, 102, 0x40000003
_SOCKET_CALLS: Final = {
    0xC000003E: (41, 41 | X32_BIT), _AUDIT_I386: (359,), 0xC00000B7: (198,), 0x40000028: (281,),
}  # fmt: skip
_Instruction: TypeAlias = tuple[int, int, int, int]  # struct sock_filter: code, jt, jf, k


class NoFilter(Exception):
    """This host cannot compile the policy; the message says why."""


class _Argument(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def compile_filter(policy: dict[str, Any], *, without_xdp: bool = False) -> bytes:
    """The BPF program of a policy.

    Args:
        policy: `linux.seccomp` of an OCI configuration, with the actions and comparisons that ours uses.
        without_xdp: sockets of the family AF_XDP are refused as well. They send past every hook of netfilter, and
            libseccomp cannot express it: i386 has a second way to make a socket.

    Returns:
        An array of struct sock_filter (8 bytes each), in the host's byte order. System calls that are newer than all
        that the policy names answer ENOSYS, so that a libc falls back to what it knows; the runtimes do the same.

    Raises:
        NoFilter: there is no libseccomp, or it knows too little.
    """
    library = _load_library()
    architectures = [_ARCHITECTURES[name] for name in policy["architectures"]]
    names = {name for rule in policy["syscalls"] for name in rule["names"]}
    newest = [(each, _newest(library, each, names)) for each in architectures]
    refusals = _refuse_newer(newest) + (_refuse_xdp(architectures) if without_xdp else b"")
    return refusals + _compile(library, policy, architectures)


def _load_library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
        library.seccomp_init.restype = ctypes.c_void_p
        library.seccomp_init.argtypes = [ctypes.c_uint32]
        library.seccomp_release.argtypes = [ctypes.c_void_p]
        library.seccomp_release.restype = None
        library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
        library.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        library.seccomp_arch_remove.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
        library.seccomp_rule_add_array.argtypes = [
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Argument),
        ]  # fmt: skip
        library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    except (OSError, AttributeError) as error:
        raise NoFilter(f"{_LIBRARY}: {error}") from error
    return library


def _newest(library: ctypes.CDLL, architecture: _Architecture, names: set[str]) -> int:
    resolve: Callable[[int, bytes], int] = library.seccomp_syscall_resolve_name_arch
    return max(resolve(architecture.token, name.encode()) for name in names)


def _compile(library: ctypes.CDLL, policy: dict[str, Any], architectures: list[_Architecture]) -> bytes:
    default = _action(policy["defaultAction"], policy.get("defaultErrnoRet"))
    with _context(library, default) as context:
        for architecture in architectures:
            if (status := library.seccomp_arch_add(context, architecture.token)) not in (0, -errno.EEXIST):
                raise NoFilter(f"seccomp_arch_add: {os.strerror(-status)}")
        # libseccomp >= 2.5; slower, not wrong, without.
        library.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE)
        for rule in policy["syscalls"]:
            _add_rule(library, context, rule, architectures[0])
        return _export(library, context)


@contextmanager
def _context(library: ctypes.CDLL, default: int) -> Iterator[int]:
    context = library.seccomp_init(default)
    if not context:
        raise NoFilter("seccomp_init failed")
    try:
        yield context
    finally:
        library.seccomp_release(context)


def _action(name: str, errno_ret: int | None) -> int:
    value = _ACTIONS[name]
    return value | (errno.EPERM if errno_ret is None else errno_ret) if name == "SCMP_ACT_ERRNO" else value


def _add_rule(library: ctypes.CDLL, context: int, rule: dict[str, Any], native: _Architecture) -> None:
    arguments = [
        _Argument(arg["index"], _COMPARISONS[arg["op"]], arg["value"], arg.get("valueTwo", 0))
        for arg in rule.get("args", ())
    ]
    packed = (_Argument * len(arguments))(*arguments)
    action = _action(rule["action"], rule.get("errnoRet"))
    for name in rule["names"]:
        # The native number stands for the call on all architectures of the filter (seccomp_rule_add(3)).
        number = library.seccomp_syscall_resolve_name_arch(native.token, name.encode())
        if number == _UNKNOWN_SYSCALL:
            continue  # newer than the library, which then answers it by the default action
        status = library.seccomp_rule_add_array(context, action, number, len(arguments), packed)
        if status not in (0, _ALREADY_THE_DEFAULT):
            raise NoFilter(f"seccomp_rule_add for {name}: {os.strerror(-status)}")


def _export(library: ctypes.CDLL, context: int) -> bytes:
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        if status := library.seccomp_export_bpf(context, fd):
            raise NoFilter(f"seccomp_export_bpf: {os.strerror(-status)}")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _refuse_newer(newest: list[tuple[_Architecture, int]]) -> bytes:
    """What runs first: ENOSYS for numbers above the newest known of their architecture; all others go on behind it."""
    program: list[_Instruction] = [(_LOAD_WORD, 0, 0, _ARCHITECTURE_AT)]
    for audit in dict.fromkeys(architecture.audit for architecture, _ in newest):
        siblings = [(each.bit, last) for each, last in newest if each.audit == audit]
        checks = [step for bit, last in sorted(siblings, reverse=True) for step in _check_number(bit, last)]
        program += [(_JUMP_EQUAL, 0, len(checks) + 1, audit), (_LOAD_WORD, 0, 0, _NUMBER_AT), *checks]
    return _pack(program)


def _refuse_xdp(architectures: list[_Architecture]) -> bytes:
    """Runs second. i386's socketcall(2) hides the family from a filter: ENOSYS leads its callers to socket(2)."""
    program: list[_Instruction] = [(_LOAD_WORD, 0, 0, _ARCHITECTURE_AT)]
    for audit in dict.fromkeys(each.audit for each in architectures):
        checks = [(_LOAD_WORD, 0, 0, _NUMBER_AT)]
        for number in _SOCKET_CALLS[audit]:
            checks += _check_argument(number, _AF_XDP, _EPERM)
        if audit == _AUDIT_I386:
            checks += _check_argument(_I386_SOCKETCALL, _SYS_SOCKET, _ENOSYS)
        program += [(_JUMP_EQUAL, 0, len(checks), audit), *checks]
        program.append((_LOAD_WORD, 0, 0, _ARCHITECTURE_AT))
    return _pack(program)


def _check_argument(number: int, value: int, answer: int) -> list[_Instruction]:
    """For this call: the answer if its first argument has the value, else leave. Jump 0 leads to the end."""
    return [
        (_JUMP_EQUAL, 0, 4, number),
        (_LOAD_WORD, 0, 0, _FIRST_ARGUMENT_AT),
        (_JUMP_EQUAL, 0, 1, value),
        (_RETURN, 0, 0, answer),
        (_JUMP, 0, 0, 0),
    ]


def _pack(program: list[_Instruction]) -> bytes:
    """Machine code; every unconditional jump leads behind the last instruction."""
    end = len(program)
    return b"".join(
        struct.pack("=HBBI", code, yes, no, end - at - 1 if code == _JUMP else value)
        for at, (code, yes, no, value) in enumerate(program)
    )


def _check_number(bit: int, last: int) -> list[_Instruction]:
    """For numbers with the bit: refuse those above the last, leave with the others. Jump 0 leads to the next step."""
    check = [(_JUMP_GREATER, 0, 1, last), (_RETURN, 0, 0, _ENOSYS), (_JUMP, 0, 0, 0)]
    return [(_JUMP_GREATER_EQUAL, 0, len(check), bit), *check] if bit else check
