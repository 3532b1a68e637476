"""The host's mount namespace, for a process that has one of its own.

A namespace of one's own is told of mounts that the host makes later only where the host's are shared
(mount_namespaces(7)); systemd makes them so, many containers and small systems do not. A bind mount taken there would
show what lies below the mount, without a word. So what is the host's is taken in the host's namespace.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from garden_py.backend.host import syscalls

_THREAD_END_S, _TRY_AGAIN_S = 1.0, 0.0002


class HostMounts:
    """Remembers a namespace, and goes there for moments. For a process with one thread (setns(2))."""

    def __init__(self) -> None:
        self._host = self._own = -1

    def remember(self) -> None:
        """This is the host's namespace, where this process is still."""
        self._host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def left(self) -> None:
        """This process has gone to a namespace of its own.

        A process whose root directory is not its namespace's (chroot(2)) would lose it on the way back. It stays where
        it is, and sees the mounts that its namespace is told of.
        """
        before = os.stat("/")
        self._own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _join(self._own)
            if not os.path.samestat(before, os.stat("/")):
                self._host = -1
                os.fchdir(root)
                os.chroot(".")
        finally:
            os.close(root)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the host's namespace for the length of a block; here, if there is no other."""
        if self._own < 0 or self._host < 0:
            yield
            return
        _join(self._host)
        try:
            yield
        finally:
            _join(self._own)


def _join(namespace: int) -> None:
    """setns(2), which refuses whoever shares its root and working directory with another thread (EINVAL).

    A thread that has been joined ends a little later for the kernel than for Python.
    """
    deadline = time.monotonic() + _THREAD_END_S
    while True:
        try:
            syscalls.set_namespace(namespace, syscalls.CLONE_NEWNS)
        except OSError as error:
            if error.errno != errno.EINVAL or time.monotonic() > deadline:
                raise
            time.sleep(_TRY_AGAIN_S)
        else:
            return


HOST_MOUNTS = HostMounts()
"""Of this process and those that it forks."""
