"""The volumes of one server: one for each container and sidecar, by the runtime's id of it, if its file system counts.

<root>/volumes/<runtime id>/{upper,work}    where there is a driver
<container's directory>/{upper,work}        where there is none: nothing is counted, and limits are refused
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from garden_py.backend.disk.btrfs import MAGIC as BTRFS
from garden_py.backend.disk.btrfs import Btrfs
from garden_py.backend.disk.driver import DiskLimits, DiskUse, Driver
from garden_py.backend.disk.project import ProjectQuota
from garden_py.backend.host.syscalls import file_system_magic
from garden_py.backend.host.threads import in_thread
from garden_py.model.errors import HostFault, NotSupported

log = structlog.get_logger()


class Volumes:
    """Volumes below one directory. What changes one has a thread: it may have to wait for what others write.

    Args:
        root: the directory; it is made.
        driver: None: the file system cannot count.
        throw_away: takes a directory away at once and deletes it later; called on the event loop's thread only.
    """

    def __init__(self, root: Path, driver: Driver | None, throw_away: Callable[[Path], None]) -> None:
        self._place = root / "volumes"
        self._driver = driver
        self._throw_away = throw_away

    @property
    def place(self) -> Path:
        """Where they are."""
        return self._place

    @property
    def driver_name(self) -> str:
        """For people; empty without one."""
        return "" if self._driver is None else self._driver.name

    def check(self, limits: DiskLimits) -> None:
        """Refuse what cannot be enforced.

        Raises:
            NotSupported: says what would be needed.
        """
        if self._driver is None and (limits.bytes or limits.inodes):
            raise NotSupported(
                "disk limits cannot be enforced: the file system of --state-dir has neither btrfs qgroups nor project "
                "quotas in force; start the server with --store-size, or see `garden doctor`"
            )
        if self._driver is not None and limits.inodes and not self._driver.counts_inodes:
            raise NotSupported(
                f"inodes cannot be limited by {self._driver.name}; they can on ext4 or xfs mounted with prjquota"
            )

    async def make(self, volume_id: str, limits: DiskLimits) -> Path | None:
        """Make a volume with limits in force; None without a driver.

        Raises:
            HostFault: it cannot be made. What may be there of it is `remove`d.
        """
        if self._driver is None:
            return None
        volume = self._place / volume_id
        if volume.exists():  # of a start that failed
            await self.remove(volume_id)
        try:
            await in_thread(self._make, self._driver, volume, limits)
        except OSError as error:
            raise HostFault("make volume", str(error)) from error
        return volume

    def _make(self, driver: Driver, volume: Path, limits: DiskLimits) -> None:
        self._place.mkdir(mode=0o700, exist_ok=True)
        driver.make(volume)
        if limits != DiskLimits():
            driver.limit(volume, limits)

    def find(self, volume_id: str) -> Path | None:
        """A volume, if there is one: containers of before there was a driver have none."""
        volume = self._place / volume_id
        return volume if self._driver is not None and volume.is_dir() else None

    async def limit(self, volume_id: str, limits: DiskLimits) -> None:
        """Replace the limits of a volume.

        Raises:
            NotSupported: there is none, or it cannot be limited so.
            HostFault.
        """
        self.check(limits)
        volume = self.find(volume_id)
        if self._driver is None or volume is None:
            if limits == DiskLimits():
                return
            raise NotSupported("this container was made by a server that could not limit its disk space")
        try:
            await in_thread(self._driver.limit, volume, limits)
        except OSError as error:
            raise HostFault("limit disk space", str(error)) from error

    def limits(self, volume_id: str) -> DiskLimits:
        """Those in force; none for what is not there."""
        volume = self.find(volume_id)
        if self._driver is None or volume is None:
            return DiskLimits()
        try:
            return self._driver.limits(volume)
        except OSError as error:
            raise HostFault("read disk limits", str(error)) from error

    def use(self, volume_id: str) -> DiskUse | None:
        """What a volume takes now; None where nothing is counted, or it is just going."""
        volume = self.find(volume_id)
        if self._driver is None or volume is None:
            return None
        try:
            return self._driver.use(volume)
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.warning("disk.use_unknown", volume=volume_id, error=str(error))
            return None

    async def remove(self, volume_id: str) -> None:
        """Remove a volume; gone is fine.

        Raises:
            HostFault: it cannot be removed.
        """
        if not await in_thread(self._release, volume_id):  # what is thrown away belongs to the event loop
            self._discard(volume_id)

    def _release(self, volume_id: str) -> bool:
        """Have the driver remove a volume; False: its directory is still to be thrown away."""
        try:
            return self._driver is not None and self._driver.remove(self._place / volume_id)
        except FileNotFoundError:
            return True
        except OSError as error:
            raise HostFault("remove volume", str(error)) from error

    def _discard(self, volume_id: str) -> None:
        try:
            self._throw_away(self._place / volume_id)
        except OSError as error:
            raise HostFault("remove volume", str(error)) from error

    def ids(self) -> list[str]:
        """All there are."""
        try:
            return sorted(os.listdir(self._place))
        except FileNotFoundError:
            return []


def find_driver(root: Path, *, turn_on: bool = True) -> Driver | None:
    """What the file system of a directory offers; turn_on: also what has to be turned on first."""
    try:
        if file_system_magic(root) == BTRFS:
            return Btrfs(root, turn_on=turn_on)
        return ProjectQuota(root)
    except OSError as error:
        log.info("disk.no_driver", root=str(root), reason=str(error))
        return None
