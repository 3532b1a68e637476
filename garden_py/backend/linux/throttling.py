"""Giving containers over their CPU entitlement only what the others leave, at one site."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Mapping

import structlog

from garden_py.backend.cgroup import throttle
from garden_py.backend.linux.container import LinuxContainer
from garden_py.backend.linux.site import Site
from garden_py.model.cpu import Balance, Entitlement, Standing

log = structlog.get_logger()
_GONE = (errno.ENOENT, errno.ENODEV)


class Throttling:
    """The verbs of it. What is decided is the service's (service/throttling.py)."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def adopt(self, container: LinuxContainer) -> None:
        """Find out how an earlier server has left a container; with throttling turned off since, release it.

        Raises:
            OSError: ENOENT or ENODEV: it has gone.
        """
        if not throttle.is_throttled(container.cgroup):
            return
        if self._site.config.enable_cpu_throttling:
            container.throttled = True
        else:
            await asyncio.to_thread(throttle.release, container.cgroup)

    async def balance(
        self,
        containers: Iterable[LinuxContainer],
        standings: Mapping[str, Standing],
        entitlement: Entitlement,
    ) -> None:
        """Put each container where it belongs, and divide the processors between the two kinds.

        Processes that are started meanwhile go to the right side already: they look at `throttled`, which is set first.
        """
        able = [each for each in containers if throttle.can_throttle(each.cgroup)]
        for container in able:
            over = standings[container.handle].is_over
            if over is not container.throttled:
                container.throttled = over
                log.info("container.throttled" if over else "container.unthrottled", handle=container.handle)
        bad_shares = sum(standings[each.handle].shares for each in able if each.throttled)
        balance = entitlement.balance(bad_shares)
        apply = self._apply_v1 if self._site.hierarchies.version == 1 else self._apply_v2
        await asyncio.to_thread(apply, able, balance)

    def _apply_v1(self, containers: list[LinuxContainer], balance: Balance) -> None:
        """Each write to cgroup.procs can wait for an RCU grace period, so this is no work for the event loop."""
        for container in containers:
            try:
                throttle.move(container.cgroup, throttled=container.throttled)
            except OSError as error:
                _unless_gone(container.handle, error)
        throttle.divide_v1(self._site.hierarchies, self._site.config.tag, balance)

    def _apply_v2(self, containers: list[LinuxContainer], balance: Balance) -> None:
        good = {each.handle: each.cgroup for each in containers if not each.throttled}
        bad = {each.handle: each.cgroup for each in containers if each.throttled}
        try:
            throttle.divide_v2(good, bad, balance)
        except OSError as error:
            _unless_gone("", error)  # the next look divides among those that are left


def _unless_gone(handle: str, error: OSError) -> None:
    if error.errno not in _GONE:
        raise error
    log.debug("throttling.container_gone", handle=handle, file=error.filename)
