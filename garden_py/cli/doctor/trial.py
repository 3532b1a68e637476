"""Tries things in a forked child with namespaces of its own; the kernel cleans up when the child ends."""

from __future__ import annotations

import os
import select
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from garden_py.backend.host import syscalls
from garden_py.backend.host.idmap import range_of
from garden_py.backend.host.userns import make_userns

_DEADLINE_S: Final = 10.0
_MS_PRIVATE: Final = 1 << 18  # sys/mount.h

TRIAL_UID: Final = 0x6FFF_0000
"""First host uid of a trial's user namespace; any will do, no file outside the trial ever belongs to it."""


def attempt(action: Callable[[], None], *, namespaces: int = 0) -> str:
    """Run action in a child that has left the given CLONE_* namespaces.

    Returns:
        Empty if it succeeded, else its error's text.
    """
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_fd)
        _report(action, namespaces, write_fd)
    os.close(write_fd)
    try:
        ready, _, _ = select.select([read_fd], [], [], _DEADLINE_S)
        if not ready:
            os.kill(child, signal.SIGKILL)
            return f"no answer within {_DEADLINE_S:.0f} s"
        message = os.read(read_fd, 4096)
        return message[1:].decode(errors="replace") if message else "the child died"
    finally:
        os.close(read_fd)
        os.waitpid(child, 0)


def _report(action: Callable[[], None], namespaces: int, write_fd: int) -> None:
    """In the child: say "+" or "-" and why, and end without running the parent's clean-up."""
    try:
        if namespaces:
            syscalls.unshare(namespaces)
        if namespaces & syscalls.CLONE_NEWNS:
            syscalls.mount("none", Path("/"), "", syscalls.MS_REC | _MS_PRIVATE)
        action()
        os.write(write_fd, b"+")
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the trial's outcome
        text = str(error) or type(error).__name__
        os.write(write_fd, b"-" + text.encode()[:4000])
    finally:
        os._exit(0)


@contextmanager
def user_namespace() -> Iterator[int]:
    """A descriptor of a user namespace in which TRIAL_UID is root."""
    userns_fd = make_userns(range_of(TRIAL_UID, 65536))
    try:
        yield userns_fd
    finally:
        os.close(userns_fd)


@contextmanager
def scratch_directory(near: Path) -> Iterator[Path]:
    """A new directory on the file system that holds (or will hold) `near`, removed at the end."""
    existing = near
    while not existing.is_dir():
        existing = existing.parent
    with tempfile.TemporaryDirectory(prefix="garden-doctor-", dir=existing) as name:
        yield Path(name)
