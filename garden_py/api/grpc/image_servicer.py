"""The RPCs about images; see servicer.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc import convert
from garden_py.model.errors import InvalidField
from garden_py.model.image import ImageInfo
from garden_py.service.core import Core

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ImageServicer:
    """Translates; every rule is in the service."""

    def __init__(self, core: Core) -> None:
        self._images = core.images

    async def PullImage(
        self, request: pb.PullImageRequest, context: Context
    ) -> AsyncIterator[pb.PullImageResponse]:
        """See the proto."""
        auth = convert.auth_from(request.auth) if request.HasField("auth") else None
        async with aclosing(self._images.pull(request.image, auth)) as news:
            async for each in news:
                if isinstance(each, ImageInfo):
                    yield pb.PullImageResponse(image=convert.image_to(each))
                else:
                    yield pb.PullImageResponse(progress=convert.progress_to(each))

    async def ImportImage(
        self, request_iterator: AsyncIterator[pb.ImportImageRequest], context: Context
    ) -> pb.Image:
        """See the proto."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "name":
            raise InvalidField("name", "must be the first message of the stream")

        async def chunks() -> AsyncIterator[bytes]:
            async for message in request_iterator:
                if message.WhichOneof("message") != "data":
                    raise InvalidField("data", "every message after the first must be data")
                yield message.data

        return convert.image_to(await self._images.import_image(first.name, chunks()))

    async def ListImages(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        """See the proto."""
        found = self._images.list_images()
        layers = {layer.diff_id: layer.bytes for image in found for layer in image.layers}
        return pb.ListImagesResponse(
            images=[convert.image_to(image) for image in found], bytes=sum(layers.values())
        )

    async def GetImage(self, request: pb.GetImageRequest, context: Context) -> pb.Image:
        """See the proto."""
        return convert.image_to(self._images.inspect(request.image))

    async def RemoveImage(self, request: pb.RemoveImageRequest, context: Context) -> pb.RemoveImageResponse:
        """See the proto."""
        self._images.remove(request.image)
        return pb.RemoveImageResponse()

    async def PruneImages(self, request: pb.PruneImagesRequest, context: Context) -> pb.PruneImagesResponse:
        """See the proto."""
        ids, freed = self._images.prune(named=request.all)
        return pb.PruneImagesResponse(ids=ids, freed_bytes=freed)
