"""How images come into the store: found in it, fetched, or made of tars.

Fetches of different images go on side by side; a layer that several of them need is fetched by the first one, and by
the next one should that fail.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.boot import read_boot_id
from garden_py.backend.images.config import parse_config
from garden_py.backend.images.download import shown
from garden_py.backend.images.fetch import Failed, Puller, pulling, unpack_tar
from garden_py.backend.images.plan import ImagePlan, PlannedLayer, plan_of
from garden_py.backend.images.preloaded import NoSuchSpot, Spot, find_spot, unpack_at
from garden_py.backend.images.sources import sources_of
from garden_py.backend.images.store import Image, ImageStore, Layer, Name
from garden_py.config import Config
from garden_py.model.errors import GardenError, HostFault, ImageNotFound, ImageTooLarge, InvalidField
from garden_py.model.image import ExtraLayer, ImageRef, PullProgress, RegistryAuth, Transport

log = structlog.get_logger()
_ROOT_FS = "fs"

Report = Callable[[PullProgress], None]


class Intake:
    """What brings images into one store.

    Args:
        store: opened by somebody else.
        config: the server's.
    """

    def __init__(self, store: ImageStore, config: Config) -> None:
        self._store = store
        self._config = config
        self._fetching = _Locks()

    def find(self, ref: ImageRef, auth: RegistryAuth | None) -> Image | None:
        """What the store has and may give out without asking again.

        Raises:
            ImageUnknown: a reference into the store leads nowhere.
        """
        if ref.transport is Transport.STORE:
            return self._store.image(ref.id) if ref.id else self._store.look_up(str(ref))
        name = self._store.find_name(str(ref))
        if name is None:
            return None
        if ref.transport is Transport.REGISTRY:
            known_caller = not name.auth or name.auth == self._store.fingerprint(auth)
            fresh = self._config.image_pull == "missing" and known_caller
        else:
            fresh = name.stamp == stamp_of(ref)
        return self._store.image(name.image) if fresh else None

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
            return self._store.look_up(str(ref))
        try:
            if ref.transport is Transport.PATH:
                return await self._fetch_tar(ref, report)
            if ref.layer is not None:
                return await self._fetch_preloaded(ref, ref.layer, auth, field, report, pins)
            with self._store.staging() as scratch:
                return await self._fetch_image(ref, auth, scratch, report, pins)
        except Failed as failure:
            if failure.facts.get("kind") == "no_space":
                self._make_room()
            raise failure.as_garden_error(str(ref), field) from failure
        except OSError as error:
            raise host_fault(error) from error

    @property
    def _limits(self) -> dict[str, int]:
        """For the unpacker."""
        return {"max_bytes": self._config.image_max_bytes, "max_entries": self._config.image_max_entries}

    def _make_room(self) -> None:
        """The disk is full: the next try shall find what nobody uses gone."""
        if self._config.image_gc_bytes:
            gone, freed = self._store.prune(named=True)
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
            pins.enter_context(self._store.pinned(plan.diff_ids))
            with self._swept_if_too_large(pins):
                await self._fetch_layers(str(ref), plan, puller, scratch, report)
            image = Image(
                id=plan.id,
                diff_ids=plan.diff_ids,
                manifest_digest=told["manifest_digest"],
                pulled_ns=time.time_ns(),
                **parse_config(told["config"]),
            )
            name = Name(str(ref), image.id, stamp, self._store.fingerprint(auth))
            image = self._store.save_image(image, name)
        log.info("image.fetched", image=str(ref), id=image.id, source=told["source"])
        return image

    @contextmanager
    def _swept_if_too_large(self, pins: ExitStack) -> Iterator[None]:
        """Layers that make an image too large together need not stay until somebody collects them."""
        try:
            yield
        except ImageTooLarge:
            pins.close()
            self._store.sweep()
            raise

    def _check_size(self, image: str, diff_ids: Iterable[str]) -> None:
        """Each layer was small enough; are those that are there together?"""
        size, entries = self._store.layer_bytes(diff_ids), self._store.layer_entries(diff_ids)
        if size > (most := self._config.image_max_bytes):
            raise ImageTooLarge(image, f"{size} bytes unpacked, {most} are allowed", "--image-max-bytes")
        if entries > (most := self._config.image_max_entries):
            raise ImageTooLarge(image, f"{entries} entries, {most} are allowed", "--image-max-entries")

    async def _fetch_layers(
        self, image: str, plan: ImagePlan, puller: Puller, scratch: Path, report: Report
    ) -> None:
        account = _Account(plan, self._store, report)
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
            if not self._store.has_layer(layer.diff_id):
                target = staged / _ROOT_FS
                target.mkdir(mode=0o755, parents=True)
                job = layer.job(target)
                self._commit(staged, await puller.layer(number, job, partial(account.fetched, number)))
        check()
        account.done(number)

    def _commit(self, staged: Path, done: dict[str, Any], spot: Spot | None = None) -> None:
        layer = Layer(
            done["diff_id"] if spot is None else spot.layer_id(done["digest"]),
            done["bytes"],
            read_boot_id(),
            hides_lower=done["opaque_root"] and not (spot and spot.parts),
            entries=done["entries"],
        )
        self._store.commit_layer(staged, layer)

    async def _fetch_preloaded(
        self,
        ref: ImageRef,
        extra: ExtraLayer,
        auth: RegistryAuth | None,
        field: str,
        report: Report,
        pins: ExitStack,
    ) -> Image:
        """A tar on the server's disk, and a layer on it."""
        if not is_tar(ref.path, field):  # in the reference's words (statement M2)
            raise InvalidField(field, "invalid base image: directory provided instead of a tar file")
        stamp = stamp_of(ref)  # before it is read, so that a change meanwhile is seen
        tar = ImageRef(Transport.PATH, path=ref.path)
        base = self.find(tar, None) or await self._fetch_tar(tar, report)
        pins.enter_context(self._store.pinned(base.diff_ids))
        try:
            spot = find_spot(self._store.directory(base.diff_ids[-1]), extra.directory)
        except NoSuchSpot as error:
            raise InvalidField(field, f"layer_path in {ref.path}: {error}") from error
        layer_id = spot.layer_id(extra.digest)
        diff_ids = (*base.diff_ids, layer_id)
        pins.enter_context(self._store.pinned([layer_id]))
        with self._swept_if_too_large(pins):
            async with self._fetching.hold(layer_id):
                if not self._store.has_layer(layer_id):
                    await self._fetch_extra_layer(extra, spot, auth, report)
            self._check_size(str(ref), diff_ids)
        image = Image(
            id=id_of_layers(diff_ids),
            diff_ids=diff_ids,
            pulled_ns=time.time_ns(),
            **parse_config({}),
        )
        image = self._store.save_image(image, Name(str(ref), image.id, stamp))
        log.info("image.fetched", image=str(ref), id=image.id, source=shown(extra.url))
        return image

    async def _fetch_extra_layer(
        self, extra: ExtraLayer, spot: Spot, auth: RegistryAuth | None, report: Report
    ) -> None:
        at = PullProgress("pulling", layers=2, layers_done=1)

        def on_size(size: int) -> None:
            nonlocal at
            at = replace(at, bytes=size)
            report(at)

        with self._store.staging() as staged:
            root = staged / _ROOT_FS
            root.mkdir()
            done = await unpack_at(
                extra,
                spot,
                root,
                auth,
                self._config,
                lambda count: report(replace(at, bytes_done=count)),
                on_size,
            )
            self._commit(staged, done, spot)
        report(replace(at, layers_done=2, bytes_done=at.bytes))

    async def _fetch_tar(self, ref: ImageRef, report: Report) -> Image:
        """A tar of a root file system, on the server's disk; once, however many want it at the same time."""
        async with self._fetching.hold(str(ref)):
            return self.find(ref, None) or await self._read_tar(ref, report)

    async def _read_tar(self, ref: ImageRef, report: Report) -> Image:
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
        with self._store.staging() as staged:
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
            with self._store.pinned([done["diff_id"]]):
                self._commit(staged, done)
                config = {"rootfs": {"type": "layers", "diff_ids": [done["diff_id"]]}}
                image = Image(
                    id=done["diff_id"],  # there is no config to take a digest of
                    diff_ids=(done["diff_id"],),
                    pulled_ns=time.time_ns(),
                    **parse_config(config),
                )
                image = self._store.save_image(image, Name(name, image.id, stamp))
        return image


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


def id_of_layers(diff_ids: Iterable[str]) -> str:
    """Of an image that has no config to take a digest of."""
    return f"sha256:{hashlib.sha256(' '.join(diff_ids).encode()).hexdigest()}"


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


def host_fault(error: OSError) -> GardenError:
    """What a system error while an image was brought in means to a caller."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostFault("fetch image", "no space left on the disk that holds the server's images")
    return HostFault("fetch image", str(error))
