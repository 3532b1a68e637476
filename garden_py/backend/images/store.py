"""What images there are on disk, and who uses them.

<root>/layers/<hex of diff id>/fs           one layer, unpacked: whiteouts as overlayfs wants them, owners as in the
archive
<root>/layers/<hex of diff id>/layer.json   size, and whether it has been written out to the disk
<root>/images/<hex of id>.json              config and diff ids; its mtime says when a container was last made from it
<root>/names/<hash of name>.json            a reference, the image it led to, and what it was then
<root>/staging/<hex>/                       layers being unpacked, and scratch files; nobody's after a restart

Every file appears complete, by rename(2). What a container or sidecar uses is written down in its own directory
(`image.json`) and kept here in memory, so a layer in use is never removed, whatever is forgotten. No lock is needed:
all of this runs in the event loop, and a layer that somebody is about to use is pinned first.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter, ValidationError

from garden_py.backend.boot import read_boot_id
from garden_py.model.errors import ImageInUse, ImageUnknown
from garden_py.model.image import ImageConfig, ImageInfo, LayerInfo, RegistryAuth, UsedImage

log = structlog.get_logger()
USE_FILE = "image.json"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in the store.

    Attributes:
        bytes: on disk.
        boot: of the machine when it was unpacked.
        synced: it has been written out; else it is worth nothing after another boot.
        entries: files and directories in it.
        hides_lower: nothing of the layers below it is to be seen. overlayfs does not look at an opaque root.
    """

    diff_id: str
    bytes: int
    boot: str
    synced: bool = False
    hides_lower: bool = False
    entries: int = 0


@dataclass(frozen=True, slots=True)
class Image:
    """One image in the store; attributes as in ImageInfo."""

    id: str
    diff_ids: tuple[str, ...]
    config: ImageConfig
    architecture: str
    os: str
    created: str
    pulled_ns: int
    used_ns: int = 0
    manifest_digest: str = ""


@dataclass(frozen=True, slots=True)
class Name:
    """What a reference led to.

    Attributes:
        image: id.
        stamp: of the file it was read from, which is read again when this changes; empty for a registry.
        auth: tells the user and password it was fetched with from others; empty: none were needed.
    """

    text: str
    image: str
    stamp: tuple[int, ...] = ()
    auth: str = ""


_LAYER, _IMAGE = TypeAdapter(Layer), TypeAdapter(Image)
_NAME, _USED = TypeAdapter(Name), TypeAdapter(UsedImage)


class ImageStore:
    """The images of one server.

    Args:
        root: directory of the store, the server's own.
        throw_away: takes a directory away at once and deletes it later.
    """

    def __init__(self, root: Path, throw_away: Callable[[Path], None]) -> None:
        self.root = self._root = root
        self._throw_away = throw_away
        self._layers: dict[str, Layer] = {}
        self._images: dict[str, Image] = {}
        self._names: dict[str, Name] = {}
        self._pins: Counter[str] = Counter()
        self._users: dict[str, UsedImage] = {}
        self._key = b""

    # --- start

    def open(self) -> None:
        """Read what there is; throw away what an earlier server left half done."""
        for name in ("layers", "images", "names", "staging"):
            (self._root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for entry in os.scandir(self._root / "staging"):
            self._throw_away(Path(entry.path))
        for name in ("images", "names"):
            for file in (self._root / name).glob(".*"):
                file.unlink()  # written, and never named
        self._key = self._open_key()
        self._layers = {layer.diff_id: layer for layer in self._load_layers()}
        self._images = {image.id: image for image in self._load_images()}
        self._names = {name.text: name for name in self._load_names()}

    def _open_key(self) -> bytes:
        path = self._root / "key"
        if not path.exists():
            _write(path, secrets.token_hex(32).encode())
        return path.read_bytes()

    def _load_layers(self) -> Iterator[Layer]:
        boot = read_boot_id()
        for entry in os.scandir(self._root / "layers"):
            layer = _load(_LAYER, Path(entry.path) / "layer.json")
            if layer is None or (not layer.synced and layer.boot != boot):
                log.info("images.layer_discarded", layer=entry.name)
                self._throw_away(Path(entry.path))
            else:
                yield layer

    def _load_images(self) -> Iterator[Image]:
        for entry in os.scandir(self._root / "images"):
            image = _load(_IMAGE, Path(entry.path))
            if image is None or not all(diff_id in self._layers for diff_id in image.diff_ids):
                log.info("images.image_discarded", image=entry.name)
                os.unlink(entry.path)
            else:
                yield replace(image, used_ns=entry.stat().st_mtime_ns)

    def _load_names(self) -> Iterator[Name]:
        for entry in os.scandir(self._root / "names"):
            name = _load(_NAME, Path(entry.path))
            if name is None or name.image not in self._images:
                os.unlink(entry.path)
            else:
                yield name

    # --- layers

    def directory(self, diff_id: str) -> Path:
        """The root of an unpacked layer."""
        return self._layer(diff_id) / "fs"

    def _layer(self, diff_id: str) -> Path:
        return self._root / "layers" / _hex(diff_id)

    def directories(self, diff_ids: Iterable[str]) -> tuple[Path, ...]:
        """What overlayfs is to be given for layers, lowest first: each once, and nothing that is hidden as a whole.

        It refuses a lower directory that is there twice (ELOOP); what a layer shows or hides, it does again higher up.
        """
        seen: dict[str, Path] = {}
        for diff_id in reversed(list(diff_ids)):
            seen.setdefault(diff_id, self.directory(diff_id))
            if self._layers[diff_id].hides_lower:
                break
        return tuple(reversed(seen.values()))

    def has_layer(self, diff_id: str) -> bool:
        """Whether a layer is there, complete."""
        return diff_id in self._layers

    def layer_bytes(self, diff_ids: Iterable[str]) -> int:
        """Disk space of the layers among these that are there."""
        return sum(self._layers[diff_id].bytes for diff_id in set(diff_ids) if diff_id in self._layers)

    def layer_entries(self, diff_ids: Iterable[str]) -> int:
        """Files and directories in the layers among these that are there."""
        return sum(self._layers[diff_id].entries for diff_id in set(diff_ids) if diff_id in self._layers)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory of one's own, thrown away at the end unless a commit has taken it."""
        place = self._root / "staging" / secrets.token_hex(16)
        place.mkdir(mode=0o700)
        try:
            yield place
        finally:
            self._throw_away(place)

    def commit_layer(self, staged: Path, layer: Layer) -> None:
        """Take in a layer, unpacked at `fs` in staged. One that is there already stays."""
        if layer.diff_id in self._layers:
            return
        _write(staged / "layer.json", _LAYER.dump_json(layer))
        os.rename(staged, self._layer(layer.diff_id))
        self._layers[layer.diff_id] = layer

    def written_out(self, diff_ids: Iterable[str]) -> None:
        """Note that these layers are on the disk, and not in its cache alone."""
        for diff_id in diff_ids:
            layer = self._layers.get(diff_id)
            if layer is not None and not layer.synced:
                self._layers[diff_id] = replace(layer, synced=True)
                _write(self._layer(diff_id) / "layer.json", _LAYER.dump_json(self._layers[diff_id]))

    def not_written_out(self) -> list[str]:
        """Layers that another boot would find worthless."""
        return [layer.diff_id for layer in self._layers.values() if not layer.synced]

    @contextmanager
    def pinned(self, diff_ids: Iterable[str]) -> Iterator[None]:
        """Keep layers, there or to come, from being removed meanwhile."""
        wanted = list(diff_ids)
        self._pins.update(wanted)
        try:
            yield
        finally:
            self._pins.subtract(wanted)
            self._pins += Counter()  # forget the zeros

    # --- images

    def save_image(self, image: Image, name: Name | None) -> Image:
        """Keep an image whose layers are there, and what led to it."""
        image = replace(image, used_ns=time.time_ns())
        path = self._root / "images" / f"{_hex(image.id)}.json"
        _write(path, _IMAGE.dump_json(image))
        os.utime(path, ns=(image.used_ns, image.used_ns))
        self._images[image.id] = image
        if name is not None:
            _write(self._name_file(name.text), _NAME.dump_json(name))
            self._names[name.text] = name
        return image

    def _name_file(self, text: str) -> Path:
        return self._root / "names" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def find_name(self, text: str) -> Name | None:
        """What a reference led to."""
        return self._names.get(text)

    def image(self, image_id: str) -> Image:
        """An image by its id.

        Raises:
            ImageUnknown.
        """
        if image_id not in self._images:
            raise ImageUnknown(image_id)
        return self._images[image_id]

    def look_up(self, text: str) -> Image:
        """An image by a reference it was fetched by, its id, or the beginning of that (12 digits at least).

        Raises:
            ImageUnknown.
        """
        if (name := self._names.get(text)) is not None:
            return self._images[name.image]
        wanted = text.removeprefix("store:").removeprefix("sha256:")
        found = [each for each in self._images.values() if _hex(each.id).startswith(wanted)]
        if len(found) != 1 or len(wanted) < 12:
            raise ImageUnknown(text)
        return found[0]

    def list_images(self) -> list[ImageInfo]:
        """All images, the latest used first."""
        return sorted(map(self.describe, self._images.values()), key=lambda each: -each.used_ns)

    def describe(self, image: Image) -> ImageInfo:
        """An image for callers."""
        facts = {name: getattr(image, name) for name in ("id", "config", "architecture", "os", "created")}
        return ImageInfo(
            **facts,
            names=tuple(sorted(name.text for name in self._names.values() if name.image == image.id)),
            layers=tuple(LayerInfo(each, self._layers[each].bytes) for each in image.diff_ids),
            pulled_ns=image.pulled_ns,
            used_ns=image.used_ns,
            in_use=self._uses(image.id),
            manifest_digest=image.manifest_digest,
        )

    def fingerprint(self, auth: RegistryAuth | None) -> str:
        """Tells one user and password from another; useless to whoever has not this store's key. Empty for none."""
        if auth is None:
            return ""
        text = json.dumps([auth.username, auth.password]).encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()

    # --- use

    def use(self, image: Image, name: str) -> UsedImage:
        """Note that a container is made of an image."""
        now = time.time_ns()
        self._images[image.id] = replace(image, used_ns=now)
        try:
            os.utime(self._root / "images" / f"{_hex(image.id)}.json", ns=(now, now))
        except OSError as error:  # it only orders what is removed first
            log.warning("images.use_not_noted", image=image.id, error=str(error))
        return UsedImage(image.id, name, image.diff_ids, image.config, self.layer_bytes(image.diff_ids))

    def hold(self, owner: str, directory: Path, used: UsedImage) -> None:
        """Keep an image's layers for a container or sidecar until `let_go`; noted in its directory for a restart."""
        _write(directory / USE_FILE, _USED.dump_json(used))
        self._users[owner] = used

    def hold_again(self, owner: str, directory: Path) -> None:
        """As `hold`, for what an earlier server has made. No note: it was made of a directory."""
        path = directory / USE_FILE
        if not path.exists():
            return
        used = _load(_USED, path)
        if used is None:
            log.error("images.use_unreadable", owner=owner)
            return
        self._users[owner] = used

    def held_by(self, owner: str) -> UsedImage | None:
        """What a container or sidecar was started from; None: from a directory."""
        return self._users.get(owner)

    def holders(self) -> Iterator[tuple[str, UsedImage]]:
        """All containers and sidecars that were not started from a directory, and from what."""
        return iter(self._users.items())

    def let_go(self, owner: str) -> None:
        """The owner is gone, with whatever is inside of it; twice is fine."""
        for name in [name for name in self._users if name == owner or name.startswith(f"{owner}/")]:
            del self._users[name]

    def _uses(self, image_id: str) -> int:
        return sum(used.id == image_id for used in self._users.values())

    def _is_needed(self, image: Image) -> bool:
        """Something is made of it, or is about to be."""
        return bool(self._uses(image.id)) or any(diff_id in self._pins for diff_id in image.diff_ids)

    # --- removal

    def forget(self, text: str) -> Image:
        """Remove a name, and its image if that was the last one; an id removes the image with all its names.

        Raises:
            ImageUnknown, ImageInUse.
        """
        image = self.look_up(text)
        names = [name for name in self._names.values() if name.image == image.id]
        if text in self._names and len(names) > 1:
            self._forget_name(text)
            return image
        if self._is_needed(image):
            raise ImageInUse(text, max(1, self._uses(image.id)))
        self._remove(image)
        return image

    def _forget_name(self, text: str) -> None:
        self._name_file(text).unlink(missing_ok=True)
        del self._names[text]

    def _remove(self, image: Image) -> None:
        for name in [name for name in self._names.values() if name.image == image.id]:
            self._forget_name(name.text)
        (self._root / "images" / f"{_hex(image.id)}.json").unlink(missing_ok=True)
        del self._images[image.id]

    def prune(self, *, named: bool, above_bytes: int = 0, keep: str = "") -> tuple[list[Image], int]:
        """Remove images that nobody uses, those unused for longest first, and layers that no image has.

        Args:
            named: also those that have a name.
            above_bytes: only until the layers take no more than this.
            keep: id of one that stays.

        Returns:
            The images removed, and the bytes of the layers removed.
        """
        freed, gone = self.sweep(), []
        held = {name.image for name in self._names.values()}
        for image in sorted(self._images.values(), key=lambda each: each.used_ns):
            if above_bytes and self.total_bytes() <= above_bytes:
                break
            if image.id == keep or self._is_needed(image) or (image.id in held and not named):
                continue
            self._remove(image)
            gone.append(image)
            freed += self.sweep()
        return gone, freed

    def total_bytes(self) -> int:
        """Disk space of all layers."""
        return sum(layer.bytes for layer in self._layers.values())

    def sweep(self) -> int:
        """Throw away layers that no image, user or pin needs; their bytes."""
        needed = {*self._pins}
        needed.update(*(image.diff_ids for image in self._images.values()))
        needed.update(*(used.diff_ids for used in self._users.values()))
        freed = 0
        for layer in [layer for layer in self._layers.values() if layer.diff_id not in needed]:
            # Without it, what a crash leaves of the deletion is no layer.
            (self._layer(layer.diff_id) / "layer.json").unlink(missing_ok=True)
            self._throw_away(self._layer(layer.diff_id))
            del self._layers[layer.diff_id]
            freed += layer.bytes
        return freed


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _load(kind: TypeAdapter[Any], path: Path) -> Any:
    """A file of the store; None if it is not there, or is not what it should be."""
    try:
        return kind.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        log.warning("images.file_unreadable", path=str(path), error=str(error))
        return None


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole, or as it was before."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
