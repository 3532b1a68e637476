"""Disk space of containers and sidecars: their volumes, and their images where a limit counts these too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from garden_py.backend.disk.driver import DiskLimits
from garden_py.backend.disk.sizes import directory_bytes
from garden_py.backend.disk.volumes import Volumes
from garden_py.backend.images.images import Images, Rootfs
from garden_py.backend.images.intake import is_tar
from garden_py.backend.linux.container import LinuxContainer
from garden_py.backend.linux.plugin_roots import plugin_id_of
from garden_py.backend.plugin.image import Command, ImagePlugins
from garden_py.model.errors import GardenError, InvalidField, NotSupported
from garden_py.model.image import Transport, parse_image
from garden_py.model.limits import DISK_FLOOR_BYTES, DiskScope, Limits
from garden_py.service.ports import DiskUsage, Usage


@dataclass(frozen=True, slots=True)
class WritableLayer:
    """What a container or a sidecar writes to, over its image.

    Attributes:
        volume_id: of its volume: the runtime's id of what it belongs to.
        owner: who holds the image, as the store of images knows it.
        image: the reference; empty for the server's default.
        stated: its limits on disk space, as stated.
    """

    volume_id: str
    owner: str
    image: str
    stated: Limits

    @property
    def plugin_id(self) -> str:
        """By which an image plugin knows it."""
        return plugin_id_of(self.owner)


def layer_of(container: LinuxContainer) -> WritableLayer:
    """A container's own."""
    return WritableLayer(container.facts.runtime_id, container.handle, container.image, container.disk)


def with_disk(usage: Usage, disk: DiskUsage) -> Usage:
    """A usage with that of disk space."""
    return replace(
        usage,
        disk_exclusive_bytes=disk.exclusive_bytes,
        disk_total_bytes=disk.total_bytes,
        disk_exclusive_inodes=disk.exclusive_inodes,
    )


_parsed = lru_cache(maxsize=256)(parse_image)  # metrics of many containers ask for the same few


class ContainerDisk:
    """The verbs about disk space at one site."""

    def __init__(self, volumes: Volumes, images: Images, default_image: str, plugins: ImagePlugins) -> None:
        self._volumes = volumes
        self._images = images
        self._default_image = default_image
        self._plugins = plugins

    def check(self, limits: Limits) -> None:
        """Refuse limits that cannot be enforced here.

        Raises:
            NotSupported.
        """
        self._volumes.check(DiskLimits(limits.disk_bytes or 0, limits.disk_inodes or 0))

    async def make(self, volume_id: str, limits: Limits, rootfs: Rootfs, field: str) -> Path | None:
        """Make a volume with limits in force; None where there are no volumes.

        Raises:
            NotSupported: the limits cannot be enforced here.
            InvalidField: the image alone is larger than the limit.
            HostFault.
        """
        self.check(limits)
        image_bytes = 0
        if _counts_image(limits):
            image_bytes = rootfs.used.bytes if rootfs.used else await directory_bytes(rootfs.directories[0])
        return await self._volumes.make(volume_id, _volume_limits(limits, image_bytes, field))

    def check_for_plugin(self, limits: Limits) -> None:
        """As `check`, for a root file system that an image plugin is to make.

        Raises:
            NotSupported.
        """
        if limits.disk_inodes:
            raise NotSupported("limits.disk_inodes: image plugins know none")

    async def _image_bytes(self, layer: WritableLayer) -> int:
        used = self._images.store.held_by(layer.owner)
        if used is not None:
            return used.bytes
        directory = self._directory_of(layer.image)
        try:
            return 0 if directory is None else await directory_bytes(directory)
        except FileNotFoundError:  # it has just gone
            return 0

    def _directory_of(self, image: str) -> Path | None:
        """The directory that an image is; None if it is none, or not there any more."""
        ref = _parsed(image or self._default_image)
        try:
            plain = ref.transport is Transport.PATH and not is_tar(ref.path, "image")
        except GardenError:
            return None
        return Path(ref.path) if plain else None

    async def limits(self, layer: WritableLayer) -> Limits:
        """The limits in force; 0 where there is none."""
        if self._made_by_plugin(layer):
            most = layer.stated.disk_bytes or 0
            return Limits(
                disk_bytes=most, disk_inodes=0, disk_scope=layer.stated.disk_scope if most else None
            )
        found = self._volumes.limits(layer.volume_id)
        scope, most = layer.stated.disk_scope, found.bytes
        if most and scope is DiskScope.TOTAL:
            most += await self._image_bytes(layer)
        scope = (scope or DiskScope.EXCLUSIVE) if most else None
        return Limits(disk_bytes=most, disk_inodes=found.inodes, disk_scope=scope)

    def _made_by_plugin(self, layer: WritableLayer) -> tuple[Command, ...]:
        used = self._images.store.held_by(layer.owner)
        return () if used is None else used.made_by

    def require_changeable(self, layer: WritableLayer) -> None:
        """Refuse a change of limits that are not this server's to enforce.

        Raises:
            NotSupported.
        """
        if self._made_by_plugin(layer):
            raise NotSupported("limits on disk space are the image plugin's, which takes them at create only")

    async def update(self, layer: WritableLayer, changed: Limits) -> Limits:
        """Change limits; what is not stated stays. Those in force then, with what they count.

        Raises:
            NotSupported, InvalidField, HostFault.
        """
        wanted = changed.over(await self.limits(layer))
        image_bytes = await self._image_bytes(layer) if _counts_image(wanted) else 0
        await self._volumes.limit(layer.volume_id, _volume_limits(wanted, image_bytes, "limits"))
        return await self.limits(replace(layer, stated=wanted.disk_only()))

    async def usage(self, layer: WritableLayer) -> DiskUsage:
        """What was written to a layer, and that with its image. What is not counted is 0.

        Raises:
            HostFault: an image plugin does not say.
        """
        if made_by := self._made_by_plugin(layer):
            return await self._plugins.usage(layer.plugin_id, made_by)
        image_bytes = await self._image_bytes(layer)
        use = self._volumes.use(layer.volume_id)
        if use is None:
            return DiskUsage(total_bytes=image_bytes)
        return DiskUsage(use.bytes, use.bytes + image_bytes, use.inodes)

    async def remove(self, runtime_id: str) -> None:
        """Remove the volume of a container with those of its sidecars, or of one sidecar; gone is fine."""
        ids = [
            each for each in self._volumes.ids() if each == runtime_id or each.startswith(f"{runtime_id}-")
        ]
        for volume_id in ids:
            await self._volumes.remove(volume_id)


def _counts_image(limits: Limits) -> bool:
    return bool(limits.disk_bytes) and limits.disk_scope is DiskScope.TOTAL


def _volume_limits(limits: Limits, image_bytes: int, field: str) -> DiskLimits:
    """What the writable layer may take, so that all that counts stays within limits."""
    most = limits.disk_bytes or 0
    if _counts_image(limits):
        rest = most - image_bytes
        if rest <= 0:  # the reference's words come first (Garden statement M11)
            problem = f"disk limit is smaller than volume size: the image takes {image_bytes} bytes"
            raise InvalidField(f"{field}.disk_bytes", problem)
        most = max(rest, DISK_FLOOR_BYTES)
    return DiskLimits(most, limits.disk_inodes or 0)
