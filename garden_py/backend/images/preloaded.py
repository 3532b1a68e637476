"""A layer that is put into a directory of a root file system, instead of onto its root.

What the layer's own names mean begins at that directory. The directories on the way to it show in the container as the
layer has them, for the topmost one counts in an overlay; so they are given the owners and modes that they have below.
What such a layer becomes therefore depends on these, and it has an id of its own in the store, not its tar's digest.

Source: Garden statement M2; kernel docs, filesystems/overlayfs.rst, "Directories".
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from garden_py.backend.host import syscalls
from garden_py.backend.images.fetch import Failed, Progress, downloading, unpack_tar
from garden_py.config import Config, RegistrySettings
from garden_py.model.image import ExtraLayer, RegistryAuth

_MISSING = (0, 0, 0o755)  # owner, group and mode of what the root file system lacks (Garden statement M5)

Attributes = tuple[int, int, int]


class NoSuchSpot(Exception):
    """The directory cannot be in that root file system; the message says why."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a layer is put.

    Attributes:
        parts: names from the root of the tree down to it, without links.
        attributes: owner, group and mode of the root and of each of them.
    """

    parts: tuple[str, ...]
    attributes: tuple[Attributes, ...]

    def layer_id(self, digest: str) -> str:
        """Tells what a layer becomes here from what it becomes elsewhere, and from every layer for the root."""
        facts = json.dumps(["layer at a directory", digest, self.parts, self.attributes])
        return f"sha256:{hashlib.sha256(facts.encode()).hexdigest()}"

    def make(self, root: Path) -> Path:
        """Make the directories in an empty one; the deepest is still to be given its attributes."""
        places = [root.joinpath(*self.parts[:depth]) for depth in range(len(self.parts) + 1)]
        for place in places[1:]:
            place.mkdir()
        for place, (uid, gid, mode) in zip(places[:-1], self.attributes, strict=False):
            os.chown(place, uid, gid)
            place.chmod(mode)
        return places[-1]


def find_spot(tree: Path, directory: str) -> Spot:
    """Find a directory in a tree. Links lead on within the tree, as they do in a container.

    Args:
        tree: that nobody writes to.
        directory: absolute; it may be missing, with some of its parents.

    Raises:
        NoSuchSpot: something else is in the way.
    """
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found, missing = _resolve(root, [part for part in directory.split("/") if part])
        places = [tree.joinpath(*found[:depth]) for depth in range(len(found) + 1)]
    finally:
        os.close(root)
    attributes = [
        (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) for status in map(os.lstat, places)
    ]
    return Spot((*found, *missing), (*attributes, *[_MISSING] * len(missing)))


def _resolve(root: int, parts: list[str]) -> tuple[list[str], list[str]]:
    """The real names of what is there, and those of what is missing below it."""
    real: list[str] = []
    for depth, part in enumerate(parts):
        where = "/" + "/".join(parts[: depth + 1])
        try:
            fd = syscalls.open_in_root(root, "/".join([*real, part]))
        except FileNotFoundError:
            if _is_there(root, [*real, part]):
                raise NoSuchSpot(f"{where} is a link that leads nowhere") from None
            return real, parts[depth:]
        except OSError as error:
            raise NoSuchSpot(f"{where}: {error.strerror}") from error
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise NoSuchSpot(f"{where} is not a directory")
            real = _name_below(root, fd)
        finally:
            os.close(fd)
    return real, []


def _is_there(root: int, parts: list[str]) -> bool:
    """Whether there is anything of that name; all but the last are real directories."""
    try:
        os.stat("/".join(parts), dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _name_below(root: int, fd: int) -> list[str]:
    top, place = (os.readlink(f"/proc/self/fd/{each}") for each in (root, fd))
    return [part for part in place.removeprefix(top).split("/") if part]


async def unpack_at(
    layer: ExtraLayer,
    spot: Spot,
    root: Path,
    auth: RegistryAuth | None,
    config: Config,
    progress: Progress,
    on_size: Progress,
) -> dict[str, Any]:
    """Fetch a layer and unpack it; `done` as unpack.py says it.

    Args:
        layer: which.
        spot: where to.
        root: an empty directory that becomes the layer's root.
        auth: for the host it is on.
        config: the server's.
        progress: is told the compressed bytes read so far.
        on_size: is told how many there will be, if that is known.

    Raises:
        Failed.
    """
    job = {
        "target": str(spot.make(root)),
        "root": spot.attributes[-1],
        "digest": layer.digest,
        "diff_id": None,
        "max_bytes": config.image_max_bytes,
        "max_entries": config.image_max_entries,
    }
    if urlsplit(layer.url).scheme == "file":
        with _opened(unquote(urlsplit(layer.url).path)) as (fd, size):
            on_size(size)
            return await unpack_tar(fd, {**job, "size": size}, progress, stall_s=config.image_stall_s)
    async with downloading(_request(layer, auth, config), stall_s=config.image_stall_s) as download:
        on_size(download.size or 0)
        try:
            return await unpack_tar(
                download.fd, {**job, "size": download.size}, progress, stall_s=config.image_stall_s
            )
        except Failed as failure:
            # What came was cut short because it failed, not the other way round.
            raise await download.failure() or failure from failure


def _request(layer: ExtraLayer, auth: RegistryAuth | None, config: Config) -> dict[str, Any]:
    """For the downloader. Its host may be named among the registries, with what its certificate must chain to."""
    host = urlsplit(layer.url).netloc
    settings = config.registry.get(host) or RegistrySettings()
    return {
        "url": layer.url,
        "username": auth.username if auth else "",
        "password": auth.password if auth else "",
        "ca": str(settings.ca) if settings.ca else "",
        "insecure": settings.plain_http or host in config.insecure_registry,
        "stall_s": config.image_stall_s,
    }


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """A file of the server's, and its size.

    Raises:
        Failed: there is none.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would have us wait
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Failed({"kind": "missing", "message": f"the layer {path}: {error.strerror}"}) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Failed({"kind": "missing", "message": f"the layer {path} is not a file"})
        yield fd, found.st_size
    finally:
        os.close(fd)
