"""Who makes the cgroup that a server's containers are in: `--cgroup-driver` (docs/decisions/0023).

Containers stay where they were made: with another driver the next server takes them over as they are.
"""

from __future__ import annotations

import asyncio

import structlog

from garden_py.backend.cgroup import groups, scope
from garden_py.backend.cgroup.layout import Hierarchies, parent_of
from garden_py.backend.cgroup.scope import Scope
from garden_py.backend.host.threads import in_thread
from garden_py.config import Config
from garden_py.model.errors import HostFault, InvalidField

log = structlog.get_logger()


def check_cgroup_driver(config: Config, cgroup_version: int) -> None:
    """Refuse a driver that cannot work here.

    Raises:
        InvalidField: says why.
    """
    if config.cgroup_driver == "systemd" and (obstacle := scope.find_obstacle(cgroup_version)):
        raise InvalidField("cgroup_driver", f"systemd cannot be used: {obstacle}")


class CgroupDriver:
    """The verbs of it.

    Attributes:
        scope: with the driver systemd, the one that containers are made in; with another it may be left of before.
    """

    def __init__(self, config: Config, hierarchies: Hierarchies) -> None:
        self._config = config
        self.hierarchies = hierarchies
        self._holding = asyncio.Lock()
        self.scope = Scope(hierarchies, config.cgroup_slice, config.tag)

    @property
    def uses_systemd(self) -> bool:
        """Whether containers are made in the scope."""
        return self._config.cgroup_driver == "systemd"

    @property
    def parent(self) -> str:
        """The cgroup that containers are made in, relative to the hierarchies."""
        return self.scope.path if self.uses_systemd else parent_of(self._config.tag)

    async def open(self, used: set[str]) -> None:
        """Make it.

        Args:
            used: scopes that containers of an earlier server are in.

        Raises:
            InvalidField: that is the server's scope, but in another slice.
            HostFault: systemd refuses.
        """
        for path in used - {self.scope.path}:
            if self.scope.containers(path):
                raise _in_other_slice(path)
        if not self.uses_systemd:
            throttling = self._config.enable_cpu_throttling
            groups.ensure_parent(self.hierarchies, self._config.tag, throttling=throttling)
            return
        await in_thread(self._leave_other_slice)
        await in_thread(self.scope.hold)

    def _leave_other_slice(self) -> None:
        """A unit cannot go to another slice while it runs."""
        found = self.scope.find()
        if not found or found == self.scope.path:
            return
        if self.scope.containers(found):
            raise _in_other_slice(found)
        self.scope.stop(found)

    async def hold(self) -> None:
        """Before a container is made: make it again if somebody has ended it.

        Raises:
            HostFault: systemd refuses.
        """
        if not self.uses_systemd or self.scope.is_held:
            return
        async with self._holding:
            if not self.scope.is_held:
                await in_thread(self.scope.hold)
                log.warning("cgroup.scope_made_again", unit=self.scope.unit)

    async def close(self) -> None:
        """Remove it, by whichever driver it was made; there are no containers left."""
        for remove in (self._remove_parent, self.scope.stop):
            try:
                await in_thread(remove)
            except (OSError, HostFault) as error:
                # Something is in it that no row knows: the ledger's affair, no reason to fail.
                log.warning("cgroup.parent_kept", error=str(error))

    def _remove_parent(self) -> None:
        groups.remove_parent(self.hierarchies, self._config.tag)


def _in_other_slice(path: str) -> InvalidField:
    return InvalidField(
        "cgroup_slice",
        f"containers of this server are in {path}: destroy them first, or leave the slice as it was",
    )
