"""Resource limits of processes, getrlimit(2).

Names are in lower case without RLIMIT_; values are 0 to 2^64-1, which is unlimited.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

_LOCKS: Final = 10  # asm-generic/resource.h; the standard library leaves it out
_VALUES: Final = 1 << 64
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
