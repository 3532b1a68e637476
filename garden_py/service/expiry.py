"""Grace time: a container that nobody uses goes after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from garden_py.observe.apart import apart
from garden_py.service.registry import Container


class Expiry:
    """Arms a timer when a container's last use ends.

    Args:
        default_s: grace time of containers that state none; 0: never.
        on_expired: called with a container whose time has passed.
    """

    def __init__(self, default_s: float, on_expired: Callable[[Container], None]) -> None:
        self._default_s = default_s
        self._on_expired = on_expired

    def grace_time_s(self, container: Container) -> float:
        """The grace time in force; 0: never."""
        stated = container.spec.grace_time_s
        return self._default_s if stated is None else stated

    @contextmanager
    def use(self, container: Container) -> Iterator[Container]:
        """Hold a container in use for the length of a call or a stream."""
        container.uses += 1
        self.disarm(container)
        try:
            yield container
        finally:
            container.uses -= 1
            self.arm(container)

    def touch(self, container: Container) -> None:
        """Take notice of a use that is over at once."""
        with self.use(container):
            pass

    def arm(self, container: Container) -> None:
        """Start the timer anew, unless the container is in use or lives for ever."""
        self.disarm(container)
        grace_s = self.grace_time_s(container)
        if grace_s > 0 and container.uses == 0:
            loop = asyncio.get_running_loop()
            container.expiry = apart(loop.call_later, grace_s, self._on_expired, container)

    def disarm(self, container: Container) -> None:
        """Stop the timer."""
        if container.expiry is not None:
            container.expiry.cancel()
            container.expiry = None
