"""Root file systems of containers and sidecars that image plugins make: begun, found again, removed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from garden_py.backend.images.images import Images, Rootfs
from garden_py.backend.linux.container import ContainerFacts
from garden_py.backend.plugin.image import Command, ImagePlugins
from garden_py.model.image import ImageConfig, RegistryAuth, UsedImage
from garden_py.model.limits import Limits

_LEAST_S = 1.0


class PluginRoots:
    """What a server's image plugins do for its containers.

    Args:
        images: of the server; notes in a container's directory what it is made of.
        plugins: may have none.
    """

    def __init__(self, images: Images, plugins: ImagePlugins) -> None:
        self._images = images
        self._plugins = plugins

    def commands_for(self, image: str, field: str) -> tuple[Command, ...]:
        """The plugins that a container of this image is to be removed by; none: they do not make it.

        Raises:
            ImageNotFound: the image is a path that leads to nothing.
        """
        commands = self._plugins.commands
        return commands if commands and self._images.is_for_plugin(image, field) else ()

    def is_free(self, owner: str) -> bool:
        """Whether plugins know no other root file system by the id that they would know the owner's by.

        Should one be made all the same, it would fail, and what removes it would remove the other's.
        """
        return not any(
            used.made_by and other != owner and plugin_id_of(other) == plugin_id_of(owner)
            for other, used in self._images.store.holders()
        )

    async def make(
        self,
        owner: str,
        directory: Path,
        image: str,
        auth: RegistryAuth | None,
        limits: Limits,
        *,
        privileged: bool,
    ) -> Rootfs:
        """Have one made.

        Args:
            owner: as the store of images knows the container or sidecar.
            directory: of the container or sidecar, where it is noted before it is begun.
            image: the reference; empty for the default.
            auth: for a registry.
            limits: on disk space.
            privileged: whether the container is.

        Raises:
            NotSupported, HostFault: there may be something to remove.
        """
        name = self._images.name_of(image)
        used = UsedImage("", name, (), ImageConfig(), 0, made_by=self._plugins.commands)
        self._images.store.hold(owner, directory, used)
        made = await self._plugins.create(plugin_id_of(owner), name, auth, limits, privileged=privileged)
        used = replace(used, config=ImageConfig(env=made.env))
        self._images.store.hold(owner, directory, used)
        return Rootfs(name, (), used, ready=Path(made.path), mounts=made.mounts)

    async def remove(self, owner: str, *, timeout_s: float) -> None:
        """Have one removed, if a plugin was to make it; gone is fine.

        Raises:
            HostFault.
        """
        used = self._images.store.held_by(owner)
        if used is not None and used.made_by:
            await self._plugins.delete(plugin_id_of(owner), used.made_by, timeout_s=timeout_s)

    async def remove_all(
        self, handle: str, facts: ContainerFacts, sidecars: Sequence[str], *, deadline: float
    ) -> None:
        """Have those of a container and of its sidecars removed.

        Args:
            handle: of the container.
            facts: as recorded.
            sidecars: those that there may be, as owners.
            deadline: for all of it, by time.monotonic().

        Raises:
            HostFault.
        """
        for owner in sidecars:
            await self.remove(owner, timeout_s=seconds_until(deadline))
        if facts.image_plugins:
            await self._plugins.delete(handle, facts.image_plugins, timeout_s=seconds_until(deadline))


def plugin_id_of(owner: str) -> str:
    """By which an image plugin knows a container or sidecar: of the latter its process's id (Garden statement MP4)."""
    return owner.rpartition("/")[2]


def seconds_until(deadline: float) -> float:
    """What a plugin is given till a deadline of time.monotonic(): a second in any case."""
    return max(_LEAST_S, deadline - time.monotonic())
