"""Tries things in a forked child with namespaces of its own; the kernel cleans up when the child ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from garden_py.backend.host import syscalls

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
    """A descriptor of a user namespace in which TRIAL_UID is root; kept by a child until the block ends."""
    ours, theirs = socket.socketpair()
    holder = os.fork()
    if holder == 0:
        try:
            ours.close()
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            theirs.send(b"+")
            theirs.recv(1)  # until we are killed, or the end of the one who forked us
        finally:
            os._exit(1)
    theirs.close()
    try:
        if ours.recv(1) != b"+":
            raise OSError("unshare(CLONE_NEWUSER) failed; see user.max_user_namespaces")
        for kind in ("uid", "gid"):
            Path(f"/proc/{holder}/{kind}_map").write_text(f"0 {TRIAL_UID} 65536")
        userns_fd = os.open(f"/proc/{holder}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield userns_fd
        finally:
            os.close(userns_fd)
    finally:
        ours.close()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


@contextmanager
def scratch_directory(near: Path) -> Iterator[Path]:
    """A new directory on the file system that holds (or will hold) `near`, removed at the end."""
    existing = near
    while not existing.is_dir():
        existing = existing.parent
    with tempfile.TemporaryDirectory(prefix="garden-doctor-", dir=existing) as name:
        yield Path(name)
