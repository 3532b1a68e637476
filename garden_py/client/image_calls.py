"""The RPCs about images as values; see `calls`."""

from __future__ import annotations

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client.calls import Call, Upload
from garden_py.client.image_values import (
    ImageInfo,
    Pruned,
    PullProgress,
    RegistryAuth,
    auth_to_pb,
    image_from_pb,
    news_from_pb,
)


def pull(image: str, auth: RegistryAuth | None) -> Call[PullProgress | ImageInfo]:
    """A stream of answers: progress, and at last the image."""
    request = pb.PullImageRequest(image=image, auth=auth_to_pb(auth))
    return Call("PullImage", request, pb.PullImageResponse, news_from_pb, waits=True)


def list_images() -> Call[list[ImageInfo]]:
    """All images."""
    return Call(
        "ListImages",
        pb.ListImagesRequest(),
        pb.ListImagesResponse,
        lambda reply: [image_from_pb(each) for each in reply.images],
    )


def inspect(image: str) -> Call[ImageInfo]:
    """One image."""
    return Call("GetImage", pb.GetImageRequest(image=image), pb.Image, image_from_pb)


def remove(image: str) -> Call[None]:
    """The end of a name, or of an image."""
    request = pb.RemoveImageRequest(image=image)
    return Call("RemoveImage", request, pb.RemoveImageResponse, lambda _reply: None)


def prune(*, named: bool) -> Call[Pruned]:
    """The end of what nobody uses."""
    request = pb.PruneImagesRequest(all=named)
    return Call(
        "PruneImages",
        request,
        pb.PruneImagesResponse,
        lambda reply: Pruned(tuple(reply.ids), reply.freed_bytes),
    )


def import_upload(name: str) -> Upload[ImageInfo]:
    """A tar that becomes an image."""
    return Upload(
        "ImportImage",
        pb.ImportImageRequest(name=name),
        lambda piece: pb.ImportImageRequest(data=piece),
        pb.Image,
        image_from_pb,
    )
