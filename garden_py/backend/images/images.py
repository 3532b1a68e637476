"""The images of one server: what containers are made of, what callers ask for, and housekeeping.

How they come into the store: intake.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.host import syscalls
from garden_py.backend.host.threads import in_thread
from garden_py.backend.images.fetch import Failed
from garden_py.backend.images.intake import Intake, Report, host_fault, is_tar
from garden_py.backend.images.store import Image, ImageStore
from garden_py.config import Config
from garden_py.model.errors import InvalidField, NotSupported
from garden_py.model.image import ImageInfo, ImageRef, RegistryAuth, Transport, UsedImage, parse_image

log = structlog.get_logger()
_STORE_SHARE = 0.5  # of its file system, that images nobody uses may take


@dataclass(frozen=True, slots=True)
class Rootfs:
    """What a root file system is made of.

    Attributes:
        name: the reference.
        directories: on the host, lowest first.
        used: the image in the store; None for a plain directory.
        ready: one that an image plugin has made, which is written to as it is; else None.
        mounts: of the OCI's runtime-spec, to be made in it before all others.
    """

    name: str
    directories: tuple[Path, ...]
    used: UsedImage | None = None
    ready: Path | None = None
    mounts: tuple[dict[str, Any], ...] = ()


class Images:
    """The images of one server.

    Args:
        store: of the server; opened by somebody else.
        config: the server's.
        default: reference for those who state none.
    """

    def __init__(self, store: ImageStore, config: Config, default: str) -> None:
        self.store = store
        self._config = config
        self._default = default
        self._intake = Intake(store, config)
        self._background: set[asyncio.Task[None]] = set()
        self.start_writing_out()

    # --- for containers

    @asynccontextmanager
    async def prepared(
        self, text: str, auth: RegistryAuth | None, field: str, report: Report
    ) -> AsyncIterator[Rootfs]:
        """The directories of an image, which stay there while the context is open.

        Args:
            text: a well-formed reference; empty for the default.
            auth: for a registry.
            field: of the request, for errors.
            report: is told how a fetch gets on.

        Raises:
            ImageNotFound, ImageUnknown, ImageAccessDenied, ImageUnreachable, ImageInvalid, ImageTooLarge, HostFault,
            NotSupported: there is nothing to make a container of.
        """
        text = self.name_of(text)
        ref = parse_image(text)
        if ref.transport is Transport.PATH and not is_tar(ref.path, field):
            yield Rootfs(text, (Path(ref.path),))
            return
        self._allow_images()
        with ExitStack() as pins:
            image = self._intake.find(ref, auth) or await self._fetch(ref, auth, field, report, pins)
            pins.enter_context(self.store.pinned(image.diff_ids))
            yield Rootfs(text, self.store.directories(image.diff_ids), self.store.use(image, text))
        self._collect()

    def name_of(self, text: str) -> str:
        """The reference itself; the default's for an empty one."""
        return text or self._default

    def is_for_plugin(self, text: str, field: str) -> bool:
        """Whether an image plugin would make a container of this image: not of a directory, nor of one in the store.

        Raises:
            ImageNotFound: it is a path that leads to nothing.
        """
        ref = parse_image(self.name_of(text))
        if ref.transport is Transport.STORE:
            return False
        return ref.transport is not Transport.PATH or is_tar(ref.path, field)

    def _allow_images(self) -> None:
        if self._config.no_image_plugin:  # the reference's words come first (statement M1)
            raise NotSupported("no image plugin configured: this server makes containers of directories only")

    async def _fetch(
        self, ref: ImageRef, auth: RegistryAuth | None, field: str, report: Report, pins: ExitStack
    ) -> Image:
        image = await self._intake.fetch(ref, auth, field, report, pins)
        self.start_writing_out()
        return image

    # --- for callers

    async def pull(self, ref: ImageRef, auth: RegistryAuth | None, report: Report) -> ImageInfo:
        """Bring an image into the store, or up to date; see service.ports."""
        self._allow_images()
        if ref.transport is Transport.PATH and not is_tar(ref.path, "image"):
            raise InvalidField(
                "image", f"{ref.path} is a directory, which is used as it is; there is nothing to fetch"
            )
        with ExitStack() as pins:
            image = await self._fetch(ref, auth, "image", report, pins)
            self._collect(keep=image.id)
        return self.store.describe(image)

    async def import_image(self, ref: ImageRef, chunks: AsyncIterator[bytes]) -> ImageInfo:
        """Make an image of a tar that comes in pieces; see service.ports."""
        self._allow_images()
        reading, writing = os.pipe()
        feeding = asyncio.ensure_future(_feed(writing, chunks))
        feeding.add_done_callback(lambda _: os.close(writing))
        try:
            image = await self._intake.import_tar(reading, str(ref), lambda progress: None)
            self.start_writing_out()
            self._collect(keep=image.id)
            await feeding
        except Failed as failure:
            if feeding.done() and not feeding.cancelled() and (error := feeding.exception()) is not None:
                raise error from failure
            raise failure.as_garden_error(str(ref), "name") from failure
        except OSError as error:
            raise host_fault(error) from error
        finally:
            os.close(reading)
            feeding.cancel()
            await asyncio.wait([feeding])
        return self.store.describe(image)

    def list_images(self) -> list[ImageInfo]:
        """See service.ports."""
        return self.store.list_images()

    def inspect(self, image: str) -> ImageInfo:
        """See service.ports."""
        return self.store.describe(self.store.look_up(image))

    def remove(self, image: str) -> ImageInfo:
        """See service.ports."""
        found = self.store.describe(self.store.look_up(image))
        self.store.forget(image)
        self.store.sweep()
        return found

    def prune(self, *, named: bool) -> tuple[list[str], int]:
        """See service.ports."""
        gone, freed = self.store.prune(named=named)
        return [image.id for image in gone], freed

    # --- housekeeping

    def _collect(self, keep: str = "") -> None:
        """Remove what is unused for longest when the store has grown over its threshold, or most of its disk."""
        most = self._config.image_gc_bytes
        if not most:
            return
        found = os.statvfs(self.store.root)
        most = min(most, int(found.f_blocks * found.f_frsize * _STORE_SHARE))
        if self.store.total_bytes() <= most:
            return
        gone, freed = self.store.prune(named=True, above_bytes=most, keep=keep)
        log.info("images.collected", images=[image.id for image in gone], bytes=freed)

    def start_writing_out(self) -> None:
        """Have layers written to the disk in the background; until then they are worth nothing after a power cut."""
        wanted = self.store.not_written_out()
        if wanted and not self._background:
            task = asyncio.ensure_future(self._write_out(wanted))
            self._background.add(task)
            task.add_done_callback(self._written)

    async def _write_out(self, diff_ids: list[str]) -> None:
        directories = [self.store.directory(diff_id) for diff_id in diff_ids if self.store.has_layer(diff_id)]
        for directory in directories[:1]:  # they are on one file system
            await asyncio.to_thread(_sync, directory)
        self.store.written_out(diff_ids)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("images.not_written_out", error=str(error))
        elif not task.cancelled():
            self.start_writing_out()

    async def settle(self) -> None:
        """Wait for what goes on in the background."""
        while self._background:
            await asyncio.wait(set(self._background))


async def _feed(fd: int, chunks: AsyncIterator[bytes]) -> None:
    """Write what comes into a pipe. Who reads it says what was wrong if it breaks."""
    try:
        async for chunk in chunks:
            await in_thread(_write_all, fd, chunk)  # whoever cancels has closed the other end
    except BrokenPipeError:
        return


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.sync_file_system(fd)
    finally:
        os.close(fd)
