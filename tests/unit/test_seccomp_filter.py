"""The compiled filter decides as the policy says: it is run here, by a small interpreter of classic BPF."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator

import pytest

from garden_py.backend.oci import seccomp_filter
from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.rules.seccomp import seccomp_policy
from garden_py.backend.oci.seccomp_filter import X32_BIT, NoFilter, compile_filter

X86_64, X86 = 0xC000003E, 0x40000003  # AUDIT_ARCH_*
TOKENS = {X86_64: 0xC000003E, X86: 0x40000003}
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x00000000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
FACTS = HostFacts(cgroup_version=1, bounding_capabilities=(1 << 41) - 1, nofile_hard=1024)
# Calls that i386 made through socketcall(2) and ipc(2) before it had numbers for them: libseccomp resolves their names
# to numbers of its own. Source: arch/x86/entry/syscalls/syscall_32.tbl.
MULTIPLEXED_ON_X86 = {337, 345, *range(359, 374), *range(393, 403)}
KERNEL_MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS, linux/bpf_common.h


@pytest.fixture(scope="module")
def program() -> list[tuple[int, int, int, int]]:
    """Instructions of struct sock_filter: code, jt, jf, k."""
    data = compile_filter(seccomp_policy(FACTS, load_runc_config()), without_xdp=True)
    return [struct.unpack_from("=HBBI", data, at) for at in range(0, len(data), 8)]


def run(program: list[tuple[int, int, int, int]], arch: int, number: int, *arguments: int) -> int:
    """What the kernel would return for a system call. Source: linux/filter.h; struct seccomp_data of seccomp(2)."""
    call = struct.pack("=iIQ6Q", number - (number >> 31 << 32), arch, 0, *(*arguments, *[0] * 6)[:6])
    accumulator = at = 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("=I", call, value)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= value
            case 0x05:  # BPF_JMP | BPF_JA
                at += value
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += yes if accumulator == value else no
            case 0x25:  # BPF_JMP | BPF_JGT | BPF_K
                at += yes if accumulator > value else no
            case 0x35:  # BPF_JMP | BPF_JGE | BPF_K
                at += yes if accumulator >= value else no
            case 0x06:  # BPF_RET | BPF_K
                return value
            case _:
                raise AssertionError(f"instruction {code:#x}")


def numbers_of(arch: int, names: list[str]) -> Iterator[tuple[str, int]]:
    """Those that the architecture has."""
    library = ctypes.CDLL("libseccomp.so.2")
    for name in names:
        number = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(TOKENS[arch]), name.encode())
        if number >= 0:
            yield name, number


def allowed_names() -> list[str]:
    rules = load_runc_config().seccomp["syscalls"]
    return [
        name
        for rule in rules
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    ]


def test_program_is_one_that_the_kernel_takes(program: list[tuple[int, int, int, int]]) -> None:
    """No longer than allowed, and it ends whatever the number is."""
    assert len(program) <= KERNEL_MAX_INSTRUCTIONS
    for number in range(600):
        run(program, X86_64, number)
        run(program, X86_64, number | X32_BIT)
        run(program, X86, number)


@pytest.mark.parametrize("arch", [X86_64, X86])
def test_what_the_policy_names_is_allowed_and_nothing_else(
    program: list[tuple[int, int, int, int]], arch: int
) -> None:
    """Every number up to the newest that the policy knows; with arguments all 0."""
    allowed = dict(numbers_of(arch, allowed_names()))
    conditional = dict(numbers_of(arch, ["personality", "clone"]))
    refused = dict(numbers_of(arch, ["clone3"]))
    newest = max([*allowed.values(), *refused.values()])
    for number in range(newest + 1):
        expected = EPERM
        if number in {*allowed.values(), *conditional.values()} or (
            arch == X86 and number in MULTIPLEXED_ON_X86
        ):
            expected = ALLOW
        elif number in refused.values():
            expected = ENOSYS
        assert run(program, arch, number) == expected, number
    assert len(allowed) > 250


@pytest.mark.parametrize(("arch", "bit"), [(X86_64, 0), (X86_64, X32_BIT), (X86, 0)])
def test_what_is_newer_than_the_policy_does_not_exist(
    program: list[tuple[int, int, int, int]], arch: int, bit: int
) -> None:
    """EPERM would make a libc give up where ENOSYS makes it do without."""
    assert run(program, arch, 600 | bit) == ENOSYS
    assert run(program, arch, 5000 | bit) == ENOSYS


def test_arguments_are_looked_at(program: list[tuple[int, int, int, int]]) -> None:
    """New namespaces are refused, threads are not; three personalities are allowed."""
    (_, clone), (_, personality) = numbers_of(X86_64, ["clone", "personality"])
    for flag in (0x0002_0000, 0x0400_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000, 0x0800_0000):
        assert run(program, X86_64, clone, flag) == EPERM, hex(flag)
    assert run(program, X86_64, clone, 0x003D_0F00) == ALLOW  # what pthread_create(3) asks for
    assert [run(program, X86_64, personality, p) for p in (0, 8, 0xFFFF_FFFF, 4)] == [ALLOW] * 3 + [EPERM]


def test_other_architectures_are_no_way_round(program: list[tuple[int, int, int, int]]) -> None:
    """A call that says it is of another machine ends its thread."""
    assert run(program, 0xC00000B7, 0) == KILL


def test_x32_has_the_same_policy(program: list[tuple[int, int, int, int]]) -> None:
    """mount(2) has the number 165 there as well, and read(2) is 0."""
    assert run(program, X86_64, 165 | X32_BIT) == EPERM
    assert run(program, X86_64, 0 | X32_BIT) == ALLOW


def test_host_without_the_library_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime filters then."""
    monkeypatch.setattr(seccomp_filter, "_LIBRARY", "libseccomp-that-is-not-there.so")
    with pytest.raises(NoFilter, match="libseccomp-that-is-not-there"):
        compile_filter(seccomp_policy(FACTS, load_runc_config()))


@pytest.mark.parametrize(
    ("arch", "number", "arguments", "answer"),
    [
        (X86_64, 41, (44, 3), EPERM),
        (X86_64, 41 | X32_BIT, (44, 3), EPERM),
        (X86, 359, (44, 3), EPERM),
        (X86, 102, (1,), ENOSYS),
        (X86_64, 41, (17, 3), ALLOW),
        (X86_64, 41, (2, 1), ALLOW),
        (X86, 359, (2, 1), ALLOW),
        (X86, 102, (3,), ALLOW),
        (X86_64, 42, (44,), ALLOW),
        (X86_64, 1, (44,), ALLOW),
    ],
)
def test_no_socket_passes_by_the_rules_of_the_network(
    program: list[tuple[int, int, int, int]], arch: int, number: int, arguments: tuple[int, ...], answer: int
) -> None:
    """AF_XDP sends past netfilter; i386's old way to make a socket, which would hide the family, is not there."""
    assert run(program, arch, number, *arguments) == answer
