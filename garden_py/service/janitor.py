"""The janitor: compares journal and host, tells of what differs, removes what is surely the server's own and orphaned.

Two looks, a moment apart, must agree before anything is believed. While it looks, every row that comes or goes is
witnessed (service/registry.py), so what is being made or destroyed is never taken for a leak. Before it removes, it
asks for the claims once more; a handle it works on is kept free by a job in the guard, which a create waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import structlog

from garden_py.model.errors import GardenError, ShuttingDown
from garden_py.model.leak import Direction, Leak, LeakReport
from garden_py.observe.metrics import Metrics
from garden_py.service.events import EventHub, EventKind
from garden_py.service.guard import Guard
from garden_py.service.ports import Claim, LeakFinder, Witness

log = structlog.get_logger()
RECLAIM = "reclaim"
SETTLE_S = 1.0
_REMEDY_OF_CONTAINER = "it is missing: what works without it goes on; destroying the container works too"
_REMEDY_OF_SERVER = "it is missing: a server makes it when it starts"
_PUT_BACK = "it was missing and has been put back"
_Key = tuple[object, ...]


class Claims(Protocol):
    """Where the rows are: the registry, or a journal that no server works on."""

    def witness(self) -> AbstractContextManager[Witness]:
        """See every claim there is or comes while the context is open."""

    def claims(self) -> list[Claim]:
        """What is claimed at this moment."""


class Janitor:
    """Checks on demand, and every `interval_s` seconds once started.

    Args:
        finder: the backend.
        claims: of the journal.
        guard: keeps creates off a handle whose leftovers are being removed.
        events: told of each leak once.
        metrics: counts them.
        interval_s: seconds between two rounds; 0: `start` does nothing.
        wait_for_loss: returns when a round should be made at once.
        settle_s: seconds between the two looks of a round that has found something.
    """

    def __init__(
        self,
        finder: LeakFinder,
        claims: Claims,
        guard: Guard,
        events: EventHub,
        metrics: Metrics,
        *,
        interval_s: float = 0.0,
        wait_for_loss: Callable[[], Awaitable[None]] | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._finder = finder
        self._claims = claims
        self._guard = guard
        self._events = events
        self._metrics = metrics
        self._interval_s = interval_s
        self._wait_for_loss = wait_for_loss
        self._settle_s = settle_s
        self._one_at_a_time = asyncio.Lock()
        self._told: set[_Key] = set()
        self._rounds: asyncio.Task[None] | None = None

    # --- rounds

    def start(self) -> None:
        """Make a round now, and then one every interval."""
        if self._interval_s > 0:
            self._rounds = asyncio.ensure_future(self._go_round())

    async def close(self) -> None:
        """Stop; a removal under way is finished by the guard."""
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.wait([self._rounds])
            self._rounds = None

    async def _go_round(self) -> None:
        while True:
            try:
                await self.check(remove=True)
            except ShuttingDown:
                return
            except (GardenError, OSError) as error:
                self._metrics.janitor_failures.inc()
                log.error("janitor.round_failed", error=str(error))
            except Exception:
                self._metrics.janitor_failures.inc()
                log.exception("janitor.ended")
                raise
            await self._rest()

    async def _rest(self) -> None:
        """Until it is time for a round again, or there is a reason for one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._interval_s):
                if self._wait_for_loss is None:
                    await asyncio.sleep(self._interval_s)
                else:
                    await self._wait_for_loss()

    # --- one check

    async def check(self, *, remove: bool) -> list[LeakReport]:
        """Compare journal and host.

        Args:
            remove: also remove what is surely the server's own and orphaned, and put back what is missing where that
                can be done.

        Returns:
            What differs, in the order in which it was, or would be, removed.

        Raises:
            HostFault: the host could not be looked at.
        """
        async with self._one_at_a_time:
            leaks = await self._confirmed()
            put_back = await self._put_back(leaks) if remove else set()
            reports = [
                LeakReport(leak, kept_because=_PUT_BACK)
                if leak.key in put_back
                else await self._deal_with(leak, remove=remove)
                for leak in leaks
            ]
            self._tell(reports, put_back)
            return reports

    async def _confirmed(self) -> list[Leak]:
        first = {leak.key for leak in await self._look()}
        if not first:
            return []
        await asyncio.sleep(self._settle_s)
        return [leak for leak in await self._look() if leak.key in first]

    async def _look(self) -> list[Leak]:
        with self._metrics.leak_check_seconds.time(), self._claims.witness() as witness:
            return await self._finder.find_leaks(witness)

    async def _put_back(self, leaks: list[Leak]) -> set[_Key]:
        missing = [leak for leak in leaks if leak.direction is Direction.MISSING]
        try:
            found = await self._finder.put_back(missing) if missing else []
        except GardenError as error:
            log.error("leak.not_put_back", error=str(error))
            return set()
        return {leak.key for leak in found}

    async def _deal_with(self, leak: Leak, *, remove: bool) -> LeakReport:
        reason = leak.keep_because
        if leak.direction is Direction.MISSING:
            reason = _REMEDY_OF_CONTAINER if leak.handle else _REMEDY_OF_SERVER
        if reason or not remove:
            return LeakReport(leak, kept_because=reason)
        try:
            removed = await self._reclaim(leak)
        except ShuttingDown:
            raise
        except (GardenError, OSError) as error:
            return LeakReport(leak, kept_because=str(error))
        return LeakReport(leak, removed, "" if removed else "it is in use again")

    async def _reclaim(self, leak: Leak) -> bool:
        name = leak.handle or leak.name
        if any(self._guard.running(kind, name) for kind in ("create", "destroy", RECLAIM)):
            return False
        return await self._guard.run(RECLAIM, name, self._remove(leak))

    async def _remove(self, leak: Leak) -> bool:
        return await self._finder.remove_leak(leak, self._claims.claims())

    def _tell(self, reports: list[LeakReport], put_back: set[_Key]) -> None:
        """Each leak is told and counted once, however long it stays."""
        for report in reports:
            leak = report.leak
            facts = {"what": leak.kind.value, "direction": leak.direction.value, "name": leak.name}
            if leak.key not in self._told:
                self._metrics.leaks_found.labels(leak.kind.value, leak.direction.value).inc()
                log.warning(
                    "leak.found", handle=leak.handle, **facts, detail=leak.detail, removed=report.removed
                )
                self._events.publish(
                    EventKind.LEAK_FOUND,
                    leak.handle,
                    what=leak.kind.value,
                    direction=leak.direction.value,
                    name=leak.name,
                    removed="yes" if report.removed else "no",
                    put_back="yes" if leak.key in put_back else "",
                )
            if report.removed:
                self._metrics.leaks_removed.labels(leak.kind.value).inc()
                log.info("leak.removed", handle=leak.handle, **facts)
        self._told = {
            report.leak.key for report in reports if not report.removed and report.leak.key not in put_back
        }
