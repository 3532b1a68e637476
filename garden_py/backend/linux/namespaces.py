"""A container's namespaces as descriptors, for whoever works in them."""

from __future__ import annotations

import os

from garden_py.model.errors import ContainerBroken


class Namespaces:
    """Descriptors of a container's network and user namespace, for the length of a job.

    Args:
        handle: of a container that is up, whose PID 1 may just have ended; empty: of one that is being made.
        pid: its PID 1 as the host numbers it.
        privileged: it has no user namespace of its own.
    """

    def __init__(self, handle: str, pid: int, *, privileged: bool) -> None:
        self._handle = handle
        self._paths = [f"/proc/{pid}/ns/net"] + ([] if privileged else [f"/proc/{pid}/ns/user"])
        self._fds: list[int] = []

    def __enter__(self) -> list[int]:
        try:
            for path in self._paths:
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.__exit__()
            if self._handle and isinstance(error, FileNotFoundError | ProcessLookupError):
                raise ContainerBroken(self._handle, "its PID 1 has ended") from error
            raise
        return self._fds

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())
