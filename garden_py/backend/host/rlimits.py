"""Resource limits of processes, getrlimit(2).

Names are in lower case without RLIMIT_; values are 0 to 2^64-1, which is unlimited.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_LOCKS: Final = 10  # asm-generic/resource.h; the standard library leaves it out
_VALUES: Final = 1 << 64
_CAP_SYS_RESOURCE: Final = 24  # linux/capability.h
# The lines of /proc/PID/limits, proc_pid_limits(5); the numbers begin behind 26 characters (fs/proc/base.c).
_TITLES: Final = {
    "Max cpu time": "cpu",
    "Max file size": "fsize",
    "Max data size": "data",
    "Max stack size": "stack",
    "Max core file size": "core",
    "Max resident set": "rss",
    "Max processes": "nproc",
    "Max open files": "nofile",
    "Max locked memory": "memlock",
    "Max address space": "as",
    "Max file locks": "locks",
    "Max pending signals": "sigpending",
    "Max msgqueue size": "msgqueue",
    "Max nice priority": "nice",
    "Max realtime priority": "rtprio",
    "Max realtime timeout": "rttime",
}
_TITLE_WIDTH: Final = 26
# What the maker of a user namespace may have of these is the most that all processes in it get together, whatever
# limits they have themselves (create_user_ns in kernel/user_namespace.c). So it is with nproc, but not
# when root makes one.
COUNTED_BY_NAMESPACE: Final = ("memlock", "msgqueue", "sigpending")


def _number(name: str) -> int:
    return _LOCKS if name == "locks" else int(getattr(resource, f"RLIMIT_{name.upper()}"))


def _signed(value: int) -> int:
    """As the standard library takes and gives it: with -1 for unlimited."""
    return value - _VALUES if value >= _VALUES >> 1 else value


def read_own_limit(name: str) -> tuple[int, int]:
    """Soft and hard limit of this process."""
    soft, hard = resource.getrlimit(_number(name))
    return soft % _VALUES, hard % _VALUES


def may_raise_limits() -> bool:
    """Whether this process may raise hard limits: its own, and others'. capabilities(7)."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


def obstacle_to(name: str, value: int, hard: int) -> str:
    """Why this process cannot set a limit where the hard one is `hard`; empty if it can. do_prlimit in kernel/sys.c."""
    if name == "nofile" and value > (most := int(Path("/proc/sys/fs/nr_open").read_text())):
        return f"is above {most}, the most that this kernel allows (fs.nr_open)"
    if value > hard and not may_raise_limits():
        return f"is above the hard limit {hard}, and the server has no CAP_SYS_RESOURCE to raise it"
    return ""


def parse_limits(text: str) -> dict[str, tuple[int, int]]:
    """Soft and hard limit of each resource in /proc/PID/limits."""
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        name = _TITLES.get(line[:_TITLE_WIDTH].strip())
        if name is not None:
            soft, hard = (
                _VALUES - 1 if word == "unlimited" else int(word) for word in line[_TITLE_WIDTH:].split()[:2]
            )
            found[name] = soft, hard
    return found


def read_limits(pid: int) -> dict[str, tuple[int, int]]:
    """Soft and hard limit of each resource of any process, which prlimit(2) would tell only of some.

    Raises:
        ProcessLookupError, FileNotFoundError: it has gone.
    """
    return parse_limits(Path(f"/proc/{pid}/limits").read_text())


def exchange_limit(pid: int, name: str, limit: tuple[int, int] | None = None) -> tuple[int, int]:
    """Set soft and hard limit of a process, if one is given; those before. prlimit(2).

    Raises:
        ProcessLookupError: it has gone.
        PermissionError: this process may not, see obstacle_to; or the other one has other ids and is not in a user
            namespace of ours, which takes CAP_SYS_RESOURCE too.
    """
    if pid <= 0:
        raise ProcessLookupError(
            errno.ESRCH, "no process has this number, by which the kernel means the caller", str(pid)
        )
    if limit is None:
        soft, hard = resource.prlimit(pid, _number(name))
    else:
        soft, hard = resource.prlimit(pid, _number(name), (_signed(limit[0]), _signed(limit[1])))
    return soft % _VALUES, hard % _VALUES


def lift_namespace_ceilings() -> None:
    """Let user namespaces that this process and its children make hold back none of COUNTED_BY_NAMESPACE.

    Without CAP_SYS_RESOURCE it changes nothing.
    """
    for name in COUNTED_BY_NAMESPACE:
        with suppress(PermissionError, ValueError):
            resource.setrlimit(_number(name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def set_limits(pid: int, limits: Iterable[tuple[str, int]], *, beside: int) -> None:
    """Set soft and hard limits of a process that waits for it, in the pid namespace of another one.

    Args:
        pid: of the process, as we number it; if it is in another pid namespace than `beside`, nothing is changed.
        limits: name and value of each.
        beside: a process of ours in that pid namespace.

    Raises:
        OSError: they are not all set. PermissionError: not even this process may raise them so far, be it for want of
            CAP_SYS_RESOURCE, or as more files than fs.nr_open.

    Source: prlimit(2), which knows no pidfd. That the number becomes another process's within this function would take
    all other numbers first, kernel.pid_max of them.
    """
    pidfd = os.pidfd_open(pid)  # ESRCH if it has gone
    try:
        if os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat(f"/proc/{beside}/ns/pid").st_ino:
            raise ProcessLookupError(errno.ESRCH, "it is in another pid namespace", str(pid))
        for name, value in limits:
            try:
                resource.prlimit(pid, _number(name), (_signed(value), _signed(value)))
            except ValueError as error:
                raise OSError(errno.EINVAL, str(error), name) from error
    finally:
        os.close(pidfd)
