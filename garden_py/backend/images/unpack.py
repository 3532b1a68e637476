"""Unpack one layer of an image into an empty directory, in a process of its own.

    server                                            python -m garden_py.backend.images.unpack
      │  stdin: {"target": …, "source_fd": 3, …}           │
      ├───────────────────────────────────────────────────▶│  confine(): the target becomes the root directory
      │  descriptor 3: the layer, compressed               │
      ├───────────────────────────────────────────────────▶│  thread: read, hash, decompress, hash
      │  stdout: {"progress": bytes}                       │  tar entries become files
      │◀───────────────────────────────────────────────────┤
      │  {"done": {…}}, or {"error": {…}} and exit 1       │
      │◀───────────────────────────────────────────────────┤

The request: `target` (absolute, empty), `source_fd`, `size` (compressed bytes, or null: to end of file), `digest` (of
the compressed bytes, or null), `diff_id` (of the tar, or null), `max_bytes`, `max_entries`; `root` may be there: owner,
group and mode of the target, unless the layer has others for it; `media_type` may be there and does not matter, for
the bytes tell how they are compressed. After a failure the target holds a part of the tree.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from garden_py.backend.images.confine import ADDRESS_SPACE_MAX_BYTES, confine
from garden_py.backend.images.layer_failures import InvalidLayer, LayerError, LayerTooLarge, UnpackFault
from garden_py.backend.images.layer_source import LayerSource
from garden_py.backend.images.layer_tree import ROOT_ATTRIBUTES, LayerTree, Limits
from garden_py.backend.images.tar_reader import PlainStream, TarReader

_REQUEST_MAX_BYTES: Final = 1 << 16
_PROGRESS_EVERY_S: Final = 0.1
# Headers, padding and what lies behind an archive's end, which are no file's bytes.
_OVERHEAD_BYTES: Final = 1 << 20
_OVERHEAD_ENTRY_BYTES: Final = 4 << 10


@dataclass(frozen=True, slots=True)
class Layer:
    """A stream that holds a layer, and what is known of it.

    Attributes:
        fd: a file or pipe at the layer's first byte.
        size: compressed bytes; None: to end of file.
        digest: `sha256:…` of the compressed bytes; None: anything.
        diff_id: `sha256:…` of the uncompressed tar; None: anything.
        root: owner, group and mode of its root directory, if it does not say so itself.
    """

    fd: int
    size: int | None = None
    digest: str | None = None
    diff_id: str | None = None
    root: tuple[int, int, int] = ROOT_ATTRIBUTES


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What a layer became.

    Attributes:
        digest: of the compressed bytes.
        diff_id: of the uncompressed ones.
        bytes: on disk, directories included.
        logical_bytes: of its files, holes included.
        entries: of the tree as the archive names them, and directories that they imply.
        opaque_root: the layer hides all lower ones, which must not be put beneath it: overlayfs ignores the mark there.
    """

    digest: str
    diff_id: str
    bytes: int
    logical_bytes: int
    entries: int
    opaque_root: bool


def unpack(
    layer: Layer, target: Path, limits: Limits, *, on_progress: Callable[[int], None] = lambda _: None
) -> Unpacked:
    """Unpack a layer into an empty directory that nobody else writes to; needs root's capabilities over files.

    Args:
        layer: is read up to its size, or to end of file.
        target: `/` in a confined process.
        limits: LayerTooLarge beyond them, before it costs memory.
        on_progress: told in another thread how many compressed bytes have been read.

    Raises:
        LayerError: of the class that says what is wrong. The target is then to be removed.
    """
    umask = os.umask(0)
    try:
        with LayerSource(layer.fd, layer.size, on_progress=on_progress) as source:
            stream_max = limits.max_bytes + limits.max_entries * _OVERHEAD_ENTRY_BYTES + _OVERHEAD_BYTES
            reader = TarReader(PlainStream(source, max_bytes=stream_max))
            tree = LayerTree(b"" if target == Path("/") else bytes(target), limits, layer.root)
            for entry in reader:
                tree.place(entry, reader.content)
            _check_digest("digest", layer.digest, source.digest)
            _check_digest("diff_id", layer.diff_id, source.diff_id)
            tree.finish()
            return Unpacked(
                source.digest,
                source.diff_id,
                tree.disk_bytes,
                tree.logical_bytes,
                tree.entries,
                tree.is_root_opaque,
            )
    except MemoryError as error:
        raise LayerTooLarge("memory", ADDRESS_SPACE_MAX_BYTES) from error
    finally:
        os.umask(umask)


def _check_digest(what: str, wanted: str | None, found: str) -> None:
    if wanted is not None and wanted != found:
        raise InvalidLayer(
            f"the layer's {what} is {found} instead of {wanted[:80]}", **{what: found, "wanted": wanted[:80]}
        )


class _Teller:
    """Writes progress, at most ten times a second, and the outcome."""

    def __init__(self) -> None:
        self._next = 0.0

    def progress(self, count: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY_S
            self.tell({"progress": count})

    def tell(self, message: dict[str, Any]) -> None:
        # One write a line: two threads write.
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            os._exit(1)  # whoever wanted the layer has gone


def main() -> int:
    """The process: request on stdin, outcome on stdout."""
    teller = _Teller()
    try:
        request = json.loads(sys.stdin.buffer.readline(_REQUEST_MAX_BYTES))
        uid, gid, mode = request.get("root", ROOT_ATTRIBUTES)
        layer = Layer(
            request["source_fd"], request["size"], request["digest"], request["diff_id"], (uid, gid, mode)
        )
        limits = Limits(request["max_bytes"], request["max_entries"])
        try:
            confine(Path(request["target"]), source_fd=layer.fd)
        except OSError as error:
            raise UnpackFault(f"cannot confine the unpacker: {error}") from error
        done = unpack(layer, Path("/"), limits, on_progress=teller.progress)
    except LayerError as error:
        teller.tell({"error": {"code": error.code, "message": str(error), "facts": error.facts}})
        return 1
    except Exception as error:  # noqa: BLE001 - a traceback would read the layer's files for its lines
        message = f"unpacking failed: {type(error).__name__}: {error}"
        teller.tell({"error": {"code": UnpackFault.code, "message": message[:500], "facts": {}}})
        return 1
    teller.tell({"done": asdict(done)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
