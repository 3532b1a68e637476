"""The images of a server, blocking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from garden_py.client import image_calls as calls
from garden_py.client.errors import DataLoss
from garden_py.client.image_values import ImageInfo, Pruned, PullProgress, RegistryAuth
from garden_py.client.sync.link import Link


class Images:
    """What a server has to make containers of. References are written as in ContainerSpec.image."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def pull(self, image: str, auth: RegistryAuth | None = None) -> ImageInfo:
        """Bring an image into the store, or up to date.

        Args:
            image: reference.
            auth: user and password at its registry.

        Raises:
            InvalidArgument: no reference, or no such image.
            PermissionDenied: the registry does not take the password, or wants one.
            Unavailable: the registry cannot be reached.
            FailedPrecondition: what came is no image, or not what its digests say.
        """
        for news in self.pulling(image, auth):
            if isinstance(news, ImageInfo):
                return news
        raise DataLoss("the pull ended without an image")

    def pulling(self, image: str, auth: RegistryAuth | None = None) -> Iterator[PullProgress | ImageInfo]:
        """As `pull`, but tells how it gets on; the image is the last. Leaving the iterator ends the pull."""
        return self._link.answers(calls.pull(image, auth))

    def import_tar(self, name: str, chunks: Iterable[bytes]) -> ImageInfo:
        """Make an image `store:NAME` of a tar of a root file system, plain, gzip or zstd."""
        return self._link.upload(calls.import_upload(name), chunks)

    def list(self) -> Sequence[ImageInfo]:
        """All images, the latest used first."""
        return self._link.unary(calls.list_images())

    def inspect(self, image: str) -> ImageInfo:
        """One image, by reference, id, or at least 12 digits of the id."""
        return self._link.unary(calls.inspect(image))

    def remove(self, image: str) -> None:
        """Remove a name and, with its last name or by id, the image; FailedPrecondition while it is in use."""
        self._link.unary(calls.remove(image))

    def prune(self, *, named: bool = False) -> Pruned:
        """Remove images that no container uses; named: also those that have a name."""
        return self._link.unary(calls.prune(named=named))
