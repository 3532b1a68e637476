"""The images of a server, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence

from garden_py.client import image_calls as calls
from garden_py.client.aio.link import AsyncLink
from garden_py.client.errors import DataLoss
from garden_py.client.image_values import ImageInfo, Pruned, PullProgress, RegistryAuth


class AsyncImages:
    """As `Images` of the blocking client; the verbs' docstrings are there."""

    def __init__(self, link: AsyncLink) -> None:
        self._link = link

    async def pull(self, image: str, auth: RegistryAuth | None = None) -> ImageInfo:
        """Bring an image into the store, or up to date."""
        async for news in self.pulling(image, auth):
            if isinstance(news, ImageInfo):
                return news
        raise DataLoss("the pull ended without an image")

    def pulling(
        self, image: str, auth: RegistryAuth | None = None
    ) -> AsyncIterator[PullProgress | ImageInfo]:
        """As `pull`, but tells how it gets on; the image is the last. Closing the iterator ends the pull."""
        return self._link.answers(calls.pull(image, auth))

    async def import_tar(self, name: str, chunks: AsyncIterable[bytes]) -> ImageInfo:
        """Make an image `store:NAME` of a tar of a root file system, plain, gzip or zstd."""
        return await self._link.upload(calls.import_upload(name), chunks)

    async def list(self) -> Sequence[ImageInfo]:
        """All images, the latest used first."""
        return await self._link.unary(calls.list_images())

    async def inspect(self, image: str) -> ImageInfo:
        """One image, by reference, id, or at least 12 digits of the id."""
        return await self._link.unary(calls.inspect(image))

    async def remove(self, image: str) -> None:
        """Remove a name and, with its last name or by id, the image."""
        await self._link.unary(calls.remove(image))

    async def prune(self, *, named: bool = False) -> Pruned:
        """Remove images that no container uses; named: also those that have a name."""
        return await self._link.unary(calls.prune(named=named))
