"""Which directory of the tree an entry's name means, decided here and not by the kernel.

Nobody else writes to the tree while it is made, so what was found to be a directory stays one until it is replaced by
an entry. Links are followed inside the tree only; system calls are given names without links in them.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from garden_py.backend.images.layer_failures import InvalidLayer, LayerTooLarge, shown

PATH_DEPTH_MAX: Final = (
    256  # deeper trees break whatever walks them by recursion or with a descriptor a level
)
_STEPS_MAX: Final = 1024  # of one name, links expanded
_LINKS_MAX: Final = 40  # MAXSYMLINKS, path_resolution(7)

WHITEOUT_PREFIX: Final = b".wh."
METADATA_PREFIX: Final = b".wh..wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"


def split_name(name: bytes) -> list[bytes]:
    """Components of a name of the archive, from the root of the tree; none for the root itself.

    Raises:
        InvalidLayer: it leads upwards.
        LayerTooLarge: it is too deep.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidLayer(f"{shown(name)}: a name must not contain '..'")
    if len(parts) > PATH_DEPTH_MAX:
        raise LayerTooLarge("path_depth", PATH_DEPTH_MAX)
    return parts


def is_metadata(parts: list[bytes]) -> bool:
    """Whether it lies in the bookkeeping of a file system of old, aufs, which is no part of the tree.

    Raises:
        InvalidLayer: a directory on the way has the name of a whiteout.
    """
    if parts[-1].startswith(METADATA_PREFIX) and parts[-1] != OPAQUE_MARKER:
        return True
    for part in parts[:-1]:
        if part.startswith(METADATA_PREFIX):
            return True
        if part.startswith(WHITEOUT_PREFIX):
            raise InvalidLayer(f"{shown(b'/'.join(parts))}: lies below the name of a whiteout")
    return False


class Directories:
    """The real directories of the tree, by their names without links; "" is the root.

    Attributes:
        mtimes: nanoseconds, None for a directory that no entry named.
        implied: how many were made because an entry lies in them.
    """

    def __init__(self, root: bytes) -> None:
        self._root = root
        self.mtimes: dict[bytes, int | None] = {b"": None}
        self.implied = 0

    def __contains__(self, path: bytes) -> bool:
        return path in self.mtimes

    def resolve(self, parts: list[bytes], *, make: bool) -> bytes:
        """The directory that these components name.

        Args:
            parts: from split_name.
            make: what is missing is made, 0755 root:root.

        Raises:
            InvalidLayer: it is no directory, there are too many links, or (without `make`) it is missing.
            LayerTooLarge: links make it too deep.
        """
        full = b"/" + b"/".join(parts) if parts else b""
        if full in self.mtimes:
            return full
        path, todo, steps, links = b"", parts[::-1], 0, 0
        while todo:
            steps += 1
            if steps > _STEPS_MAX:
                raise InvalidLayer(f"{shown(full)}: too many levels of symbolic links")
            part = todo.pop()
            if part == b"..":  # of a link; at the root it stays there, as in a container
                path = path.rpartition(b"/")[0]
                continue
            below = path + b"/" + part
            if below not in self.mtimes:
                target = self._enter(below, full, make=make)
                if target is not None:
                    links += 1
                    if links > _LINKS_MAX:
                        raise InvalidLayer(f"{shown(full)}: too many levels of symbolic links")
                    path = b"" if target.startswith(b"/") else path
                    todo += [p for p in target.split(b"/") if p not in (b"", b".")][::-1]
                    continue
            path = below
        return path

    def _enter(self, path: bytes, wanted: bytes, *, make: bool) -> bytes | None:
        """Make it a known directory; if it is a link, its target."""
        try:
            status = os.lstat(self._root + path)
        except FileNotFoundError:
            if not make:
                raise InvalidLayer(f"{shown(wanted)}: is not in this layer") from None
            self._imply(path)
            return None
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(self._root + path)
        if make and is_whiteout(status):
            os.unlink(self._root + path)
            self._imply(path)
            self.hide_lower(path)
            return None
        raise InvalidLayer(f"{shown(wanted)}: lies below something that is no directory")

    def _imply(self, path: bytes) -> None:
        self.make(path, 0o755)
        # A setgid directory gives its group and the bit to what is made in it.
        os.chown(self._root + path, 0, 0)
        os.chmod(self._root + path, 0o755)  # noqa: S103 - as every directory of a system on the way
        self.implied += 1

    def make(self, path: bytes, mode: int) -> None:
        """Make a directory whose parent is known."""
        if path.count(b"/") > PATH_DEPTH_MAX:
            raise LayerTooLarge("path_depth", PATH_DEPTH_MAX)
        os.mkdir(self._root + path, mode)
        self.mtimes[path] = None

    def hide_lower(self, path: bytes) -> None:
        """Hide what lower layers have in a directory. overlayfs.rst, "whiteouts and opaque directories"."""
        os.setxattr(self._root + path or b"/", "trusted.overlay.opaque", b"y", follow_symlinks=False)


def is_whiteout(status: os.stat_result) -> bool:
    """Whether overlayfs takes it for the absence of a file; the only device that unpacking makes."""
    return stat.S_ISCHR(status.st_mode)
