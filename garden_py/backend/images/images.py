"""From a reference to directories that a container can be made of: found in the store, or fetched into it.

Fetches of different images go on side by side; a layer that several of them need is fetched by the first one, and by
the next one should that fail.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.boot import read_boot_id
from garden_py.backend.host import syscalls
from garden_py.backend.host.threads import in_thread
from garden_py.backend.images.config import parse_config
from garden_py.backend.images.fetch import Failed, Puller, pulling, unpack_tar
from garden_py.backend.images.plan import ImagePlan, PlannedLayer, plan_of
from garden_py.backend.images.sources import sources_of
from garden_py.backend.images.store import Image, ImageStore, Layer, Name
from garden_py.config import Config
from garden_py.model.errors import (
    GardenError,
    HostFault,
    ImageNotFound,
    ImageTooLarge,
    InvalidField,
    NotSupported,
)
from garden_py.model.image import (
    ImageInfo,
    ImageRef,
    PullProgress,
    RegistryAuth,
    Transport,
    UsedImage,
    parse_image,
)

log = structlog.get_logger()
_STORE_SHARE = 0.5  # of its file system, that images nobody uses may take
_ROOT_FS = "fs"

Report = Callable[[PullProgress], None]


@dataclass(frozen=True, slots=True)
class Rootfs:
    """What a root file system is made of.

    Attributes:
        name: the reference.
        directories: on the host, lowest first.
        used: the image in the store; None for a plain directory.
    """

    name: str
    directories: tuple[Path, ...]
    used: UsedImage | None = None


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
        self._fetching = _Locks()
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
        text = text or self._default
        ref = parse_image(text)
        if ref.transport is Transport.PATH and not is_tar(ref.path, field):
            yield Rootfs(text, (Path(ref.path),))
            return
        self._allow_images()
        with ExitStack() as pins:
            image = self._find(ref, auth) or await self.fetch(ref, auth, field, report, pins)
            pins.enter_context(self.store.pinned(image.diff_ids))
            yield Rootfs(text, self.store.directories(image.diff_ids), self.store.use(image, text))
        self._collect()

    def _allow_images(self) -> None:
        if self._config.no_image_plugin:  # the reference's words come first (statement M1)
            raise NotSupported("no image plugin configured: this server makes containers of directories only")

    def _find(self, ref: ImageRef, auth: RegistryAuth | None) -> Image | None:
        """What the store has and may give out without asking again.

        Raises:
            ImageUnknown: a reference into the store leads nowhere.
        """
        if ref.transport is Transport.STORE:
            return self.store.image(ref.id) if ref.id else self.store.look_up(str(ref))
        name = self.store.find_name(str(ref))
        if name is None:
            return None
        if ref.transport is Transport.REGISTRY:
            known_caller = not name.auth or name.auth == self.store.fingerprint(auth)
            fresh = self._config.image_pull == "missing" and known_caller
        else:
            fresh = name.stamp == stamp_of(ref)
        return self.store.image(name.image) if fresh else None

    # --- fetch

    async def fetch(
        self, ref: ImageRef, auth: RegistryAuth | None, field: str, report: Report, pins: ExitStack
    ) -> Image:
        """Bring an image into the store, or up to date; layers that are there are not fetched again.

        Args:
            ref: which.
            auth: for a registry.
            field: of the request, for errors.
            report: is told how it gets on.
            pins: is given what keeps the layers there until it is closed.

        Raises:
            As `prepared`.
        """
        if ref.transport is Transport.STORE:
            return self.store.look_up(str(ref))
        try:
            if ref.transport is Transport.PATH:
                return await self._fetch_tar(ref, report)
            with self.store.staging() as scratch:
                return await self._fetch_image(ref, auth, scratch, report, pins)
        except Failed as failure:
            if failure.facts.get("kind") == "no_space":
                self._make_room()
            raise failure.as_garden_error(str(ref), field) from failure
        except OSError as error:
            raise _host_fault(error) from error

    @property
    def _limits(self) -> dict[str, int]:
        """For the unpacker."""
        return {"max_bytes": self._config.image_max_bytes, "max_entries": self._config.image_max_entries}

    def _make_room(self) -> None:
        """The disk is full: the next try shall find what nobody uses gone."""
        if self._config.image_gc_bytes:
            gone, freed = self.store.prune(named=True)
            log.warning("images.made_room", images=[image.id for image in gone], bytes=freed)

    async def _fetch_image(
        self, ref: ImageRef, auth: RegistryAuth | None, scratch: Path, report: Report, pins: ExitStack
    ) -> Image:
        stamp = stamp_of(ref)  # before it is read, so that a change meanwhile is seen
        report(PullProgress("resolving"))
        sources = sources_of(ref, auth, self._config)
        async with pulling(sources, scratch, self._limits, stall_s=self._config.image_stall_s) as puller:
            told = await puller.image()
            plan = plan_of(str(ref), told)
            pins.enter_context(self.store.pinned(plan.diff_ids))
            try:
                await self._fetch_layers(str(ref), plan, puller, scratch, report)
            except ImageTooLarge:
                pins.close()
                self.store.sweep()
                raise
            image = Image(
                id=plan.id,
                diff_ids=plan.diff_ids,
                manifest_digest=told["manifest_digest"],
                pulled_ns=time.time_ns(),
                **parse_config(told["config"]),
            )
            name = Name(str(ref), image.id, stamp, self.store.fingerprint(auth))
            image = self.store.save_image(image, name)
        log.info("image.fetched", image=str(ref), id=image.id, source=told["source"])
        self.start_writing_out()
        return image

    def _check_size(self, image: str, diff_ids: Iterable[str]) -> None:
        """Each layer was small enough; are those that are there together?"""
        size, entries = self.store.layer_bytes(diff_ids), self.store.layer_entries(diff_ids)
        if size > (most := self._config.image_max_bytes):
            raise ImageTooLarge(image, f"{size} bytes unpacked, {most} are allowed", "--image-max-bytes")
        if entries > (most := self._config.image_max_entries):
            raise ImageTooLarge(image, f"{entries} entries, {most} are allowed", "--image-max-entries")

    async def _fetch_layers(
        self, image: str, plan: ImagePlan, puller: Puller, scratch: Path, report: Report
    ) -> None:
        account = _Account(plan, self.store, report)
        try:
            async with asyncio.TaskGroup() as group:
                for number, layer in plan.distinct():
                    staged = scratch / str(number)
                    done = partial(self._check_size, image, plan.diff_ids)
                    group.create_task(self._fetch_layer(number, layer, puller, staged, account, done))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _fetch_layer(
        self,
        number: int,
        layer: PlannedLayer,
        puller: Puller,
        staged: Path,
        account: _Account,
        check: Callable[[], None],
    ) -> None:
        async with self._fetching.hold(layer.diff_id):
            if not self.store.has_layer(layer.diff_id):
                target = staged / _ROOT_FS
                target.mkdir(mode=0o755, parents=True)
                job = layer.job(target)
                self._commit(staged, await puller.layer(number, job, partial(account.fetched, number)))
        check()
        account.done(number)

    def _commit(self, staged: Path, done: dict[str, Any]) -> None:
        layer = Layer(
            done["diff_id"],
            done["bytes"],
            read_boot_id(),
            hides_lower=done["opaque_root"],
            entries=done["entries"],
        )
        self.store.commit_layer(staged, layer)

    async def _fetch_tar(self, ref: ImageRef, report: Report) -> Image:
        """A tar of a root file system, on the server's disk."""
        fd = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            return await self.import_tar(fd, str(ref), report, size=found.st_size, stamp=stamp)
        finally:
            os.close(fd)

    async def import_tar(
        self, fd: int, name: str, report: Report, *, size: int | None = None, stamp: tuple[int, ...] = ()
    ) -> Image:
        """Make an image of a tar of a root file system, plain, gzip or zstd.

        Args:
            fd: to read it from; the caller closes it.
            name: reference to keep it under.
            report: is told how it gets on.
            size: of what there is to read, in bytes, if known.
            stamp: of its file; see store.Name.

        Raises:
            Failed.
        """
        with self.store.staging() as staged:
            target = staged / _ROOT_FS
            target.mkdir()
            job = {
                "target": str(target),
                "size": None,
                "media_type": "",
                "digest": None,
                "diff_id": None,
                **self._limits,
            }

            def progress(count: int) -> None:
                report(PullProgress("unpacking", 1, 0, size or 0, count))

            done = await unpack_tar(fd, job, progress, stall_s=self._config.image_stall_s)
            with self.store.pinned([done["diff_id"]]):
                self._commit(staged, done)
                config = {"rootfs": {"type": "layers", "diff_ids": [done["diff_id"]]}}
                image = Image(
                    id=done["diff_id"],  # there is no config to take a digest of
                    diff_ids=(done["diff_id"],),
                    pulled_ns=time.time_ns(),
                    **parse_config(config),
                )
                image = self.store.save_image(image, Name(name, image.id, stamp))
        self.start_writing_out()
        self._collect(keep=image.id)
        return image

    async def pull(self, ref: ImageRef, auth: RegistryAuth | None, report: Report) -> ImageInfo:
        """As `fetch`, for callers."""
        self._allow_images()
        if ref.transport is Transport.PATH and not is_tar(ref.path, "image"):
            raise InvalidField(
                "image", f"{ref.path} is a directory, which is used as it is; there is nothing to fetch"
            )
        with ExitStack() as pins:
            image = await self.fetch(ref, auth, "image", report, pins)
            self._collect(keep=image.id)
        return self.store.describe(image)

    # --- for callers

    async def import_image(self, ref: ImageRef, chunks: AsyncIterator[bytes]) -> ImageInfo:
        """Make an image of a tar that comes in pieces; see service.ports."""
        self._allow_images()
        reading, writing = os.pipe()
        feeding = asyncio.ensure_future(_feed(writing, chunks))
        feeding.add_done_callback(lambda _: os.close(writing))
        try:
            image = await self.import_tar(reading, str(ref), lambda progress: None)
            await feeding
        except Failed as failure:
            if feeding.done() and not feeding.cancelled() and (error := feeding.exception()) is not None:
                raise error from failure
            raise failure.as_garden_error(str(ref), "name") from failure
        except OSError as error:
            raise _host_fault(error) from error
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


class _Locks:
    """A lock for each name that somebody holds or waits for."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of a name; waits while another does."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[name]
            if users == 1:
                del self._locks[name]
            else:
                self._locks[name] = (lock, users - 1)


class _Account:
    """Adds up how far the layers of one fetch are."""

    def __init__(self, plan: ImagePlan, store: ImageStore, report: Report) -> None:
        self._missing = {
            number: layer.size for number, layer in plan.distinct() if not store.has_layer(layer.diff_id)
        }
        self._fetched = dict.fromkeys(self._missing, 0)
        self._todo = set(self._missing)
        distinct = len(plan.distinct())
        self._base = PullProgress(
            "pulling", distinct, distinct - len(self._todo), sum(self._missing.values())
        )
        self._report = report
        report(self._base)

    def fetched(self, number: int, count: int) -> None:
        """So many bytes of a layer are there."""
        self._fetched[number] = min(count, self._missing[number])
        self._tell()

    def done(self, number: int) -> None:
        """A layer is there."""
        if number in self._todo:
            self._todo.discard(number)
            self._fetched[number] = self._missing[number]
            self._tell()

    def _tell(self) -> None:
        done = self._base.layers - len(self._todo)
        self._report(replace(self._base, layers_done=done, bytes_done=sum(self._fetched.values())))


def is_tar(path: str, field: str) -> bool:
    """Whether a path leads to a file, and not to a directory.

    Raises:
        ImageNotFound: to neither.
    """
    place = Path(path)
    if place.is_dir():
        return False
    if place.is_file():
        return True
    problem = "is not a directory or a tar file" if place.exists() else "does not exist"
    raise ImageNotFound(field, f"{path} {problem}")


def stamp_of(ref: ImageRef) -> tuple[int, ...]:
    """Tells the present state of an image in the file system from a later one; empty if it is elsewhere or missing."""
    if not ref.path:
        return ()
    path = Path(ref.path) / "index.json" if ref.transport is Transport.OCI else Path(ref.path)
    try:
        found = path.stat()
    except OSError:
        return ()  # whoever reads it will say so
    return found.st_mtime_ns, found.st_size, found.st_ino


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


def _host_fault(error: OSError) -> GardenError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostFault("fetch image", "no space left on the disk that holds the server's images")
    return HostFault("fetch image", str(error))


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.sync_file_system(fd)
    finally:
        os.close(fd)
