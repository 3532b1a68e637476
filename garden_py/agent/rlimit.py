"""Resource limits of a process, getrlimit(2)."""

from __future__ import annotations

from garden_py.agent import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

UNLIMITED = 2**64 - 1
NOFILE = 7

# asm-generic/resource.h; x86, arm, riscv and s390 use these numbers
_NUMBERS = {
    "cpu": 0,
    "fsize": 1,
    "data": 2,
    "stack": 3,
    "core": 4,
    "rss": 5,
    "nproc": 6,
    "nofile": NOFILE,
    "memlock": 8,
    "as": 9,
    "locks": 10,
    "sigpending": 11,
    "msgqueue": 12,
    "nice": 13,
    "rtprio": 14,
    "rttime": 15,
}


class BadLimit(ValueError):
    """A limit with an unknown name or an impossible value."""


def parse_limits(limits: Mapping[str, object]) -> list[tuple[str, int, int, int]]:
    """(name, number, soft, hard) for each entry `name: value` or `name: [soft, hard]`.

    A value is 0 or more; -1 means unlimited (a wire int has 64 bits with a sign). Names are lower case
    without the RLIMIT_ prefix.

    Raises:
        BadLimit: unknown name, other value, or soft above hard.
    """
    return [(name, _number(name), *_pair(name, value)) for name, value in limits.items()]


def _number(name: str) -> int:
    try:
        return _NUMBERS[name]
    except KeyError:
        raise BadLimit(f"unknown resource limit {name!r}; known are {', '.join(_NUMBERS)}") from None


def _pair(name: str, value: object) -> tuple[int, int]:
    soft, hard = value if isinstance(value, list) and len(value) == 2 else (value, value)
    if type(soft) is not int or type(hard) is not int or soft < -1 or hard < -1:
        raise BadLimit(
            f"resource limit {name}: an integer or [soft, hard], each 0 or more or -1 for unlimited"
        )
    soft, hard = soft % (UNLIMITED + 1), hard % (UNLIMITED + 1)
    if soft > hard:
        raise BadLimit(f"resource limit {name}: soft {soft} is above hard {hard}")
    return soft, hard


def read_own_open_files() -> tuple[int, int]:
    """(soft, hard) limit of open files, for the children: they start with what PID 1 started with."""
    return syscalls.read_resource_limit(NOFILE)


def raise_own_open_files() -> int:
    """Lift PID 1's soft limit of open files to the hard one, for it keeps up to six for each process; the limit."""
    _, hard = syscalls.read_resource_limit(NOFILE)
    syscalls.set_resource_limit(NOFILE, hard, hard)
    return hard
