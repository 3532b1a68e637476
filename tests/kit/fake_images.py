"""The images of the fake backend: a pull ends when its gate opens, and gives an image named after its reference."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from garden_py.model import errors
from garden_py.model.image import (
    ImageConfig,
    ImageInfo,
    ImageRef,
    LayerInfo,
    PullProgress,
    RegistryAuth,
    UsedImage,
)


class FakeImages:
    """Implements service.ports.ImageKeeper; `gate` closed holds pulls back, `failure` makes the next one fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: errors.GardenError | None = None
        self.auths: list[RegistryAuth | None] = []
        self._images: dict[str, ImageInfo] = {}

    async def pull(
        self, ref: ImageRef, auth: RegistryAuth | None, report: Callable[[PullProgress], None]
    ) -> ImageInfo:
        self.auths.append(auth)
        report(PullProgress("resolving"))
        report(PullProgress("pulling", layers=2, layers_done=1, bytes=100, bytes_done=40))
        await self.gate.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return self._add(str(ref))

    def _add(self, name: str) -> ImageInfo:
        digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        config = ImageConfig(env=("A=image",), labels=(("l", "1"),))
        layers = (LayerInfo(digest, 4096),)
        self._images[name] = ImageInfo(digest, (name,), layers, config, "amd64", "linux", "", 1, 2, 0)
        return self._images[name]

    async def use(
        self, ref: ImageRef, auth: RegistryAuth | None, report: Callable[[PullProgress], None]
    ) -> UsedImage:
        """The image for a container."""
        image = self._images.get(str(ref)) or await self.pull(ref, auth, report)
        self._images[str(ref)] = replace(image, in_use=image.in_use + 1)
        return UsedImage(image.id, str(ref), (image.id,), image.config, 4096)

    async def import_image(self, ref: ImageRef, chunks: AsyncIterator[bytes]) -> ImageInfo:
        if not b"".join([chunk async for chunk in chunks]):
            raise errors.ImageInvalid(str(ref), "it is empty")
        return self._add(str(ref))

    def list_images(self) -> list[ImageInfo]:
        return list(self._images.values())

    def inspect(self, image: str) -> ImageInfo:
        found = next((each for each in self._images.values() if image in (each.id, *each.names)), None)
        if found is None:
            raise errors.ImageUnknown(image)
        return found

    def remove(self, image: str) -> ImageInfo:
        found = self.inspect(image)
        if found.in_use:
            raise errors.ImageInUse(image, found.in_use)
        del self._images[found.names[0]]
        return found

    def prune(self, *, named: bool) -> tuple[list[str], int]:
        gone = [each for each in self._images.values() if named and not each.in_use]
        for each in gone:
            del self._images[each.names[0]]
        return [each.id for each in gone], 4096 * len(gone)
