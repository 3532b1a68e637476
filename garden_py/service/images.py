"""Images: pull, list, inspect, remove, prune, import. Containers fetch by themselves what they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import structlog

from garden_py.model.errors import InvalidField
from garden_py.model.image import (
    BadReference,
    ImageInfo,
    ImageRef,
    PullProgress,
    RegistryAuth,
    Transport,
    parse_image,
)
from garden_py.service.ports import Backend, ImageKeeper

log = structlog.get_logger()


class Images:
    """The verbs about images."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def _keeper(self) -> ImageKeeper:
        return self._backend.images

    async def pull(
        self, image: str, auth: RegistryAuth | None
    ) -> AsyncGenerator[PullProgress | ImageInfo, None]:
        """Bring an image into the store, or up to date.

        Yields:
            How it gets on, at most one step behind, and at last the image.

        Raises:
            InvalidField, and the errors of ImageKeeper.pull. Leaving ends the pull; layers that are complete are kept.
        """
        ref = _parse(image)
        latest: list[PullProgress] = []
        news = asyncio.Event()

        def report(progress: PullProgress) -> None:
            latest[:] = [progress]
            news.set()

        job = asyncio.ensure_future(self._keeper.pull(ref, auth, report))
        job.add_done_callback(lambda _: news.set())
        try:
            while not job.done():
                await news.wait()
                news.clear()
                if latest:
                    yield latest.pop()
            yield job.result()
        finally:
            if not job.done():
                job.cancel()
                await asyncio.wait([job])

    async def import_image(self, name: str, chunks: AsyncIterator[bytes]) -> ImageInfo:
        """Make an image of a tar of a root file system.

        Args:
            name: to keep it under, `store:NAME[:TAG]` or NAME[:TAG].
            chunks: of the tar; plain, gzip or zstd.

        Raises:
            InvalidField, and the errors of ImageKeeper.import_image.
        """
        ref = _parse(name if name.startswith("store:") else f"store:{name}", "name")
        if ref.id:
            raise InvalidField("name", "must be a name; an id is the server's to give")
        return await self._keeper.import_image(ref, chunks)

    def list_images(self) -> list[ImageInfo]:
        """All images, the latest used first."""
        return self._keeper.list_images()

    def count(self) -> dict[str, float]:
        """How many images there are, by whether anything is made of them."""
        images = self.list_images()
        used = sum(image.in_use > 0 for image in images)
        return {"used": used, "unused": len(images) - used}

    def count_bytes(self) -> dict[str, float]:
        """Disk space of layers, by whether anything is made of an image that has them; each layer once."""
        images = self.list_images()
        every = {layer.diff_id: layer.bytes for image in images for layer in image.layers}
        used = {layer.diff_id for image in images if image.in_use for layer in image.layers}
        used_bytes = sum(every[diff_id] for diff_id in used)
        return {"used": used_bytes, "unused": sum(every.values()) - used_bytes}

    def inspect(self, image: str) -> ImageInfo:
        """One image, by reference or id; ImageUnknown."""
        return self._keeper.inspect(_canonical(image))

    def remove(self, image: str) -> ImageInfo:
        """Remove a name and, with the last one or by id, the image; ImageUnknown, ImageInUse."""
        removed = self._keeper.remove(_canonical(image))
        log.info("image.removed", image=image, id=removed.id)
        return removed

    def prune(self, *, named: bool) -> tuple[list[str], int]:
        """Remove what nobody uses; see ImageKeeper.prune."""
        gone, freed = self._keeper.prune(named=named)
        log.info("images.pruned", images=gone, bytes=freed)
        return gone, freed


def _parse(image: str, field: str = "image") -> ImageRef:
    try:
        return parse_image(image)
    except BadReference as error:
        raise InvalidField(field, str(error)) from error


def _canonical(image: str) -> str:
    """A reference as the store knows it; what is none may be an id, or the beginning of one."""
    try:
        ref = parse_image(image)
    except BadReference:
        return image
    return ref.name if ref.transport is Transport.STORE and ref.id else str(ref)
