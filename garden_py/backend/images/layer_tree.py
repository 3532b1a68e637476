"""Entries of a layer as files in a directory, in the form that overlayfs wants of a layer.

Sources: OCI image-spec 1.1 layer.md "Applying Changesets", "Whiteouts"; kernel docs, filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from garden_py.backend.images.layer_failures import (
    InvalidLayer,
    LayerTooLarge,
    NoSpace,
    UnpackFault,
    failure_of,
    shown,
)
from garden_py.backend.images.layer_paths import (
    OPAQUE_MARKER,
    WHITEOUT_PREFIX,
    Directories,
    is_metadata,
    is_whiteout,
    split_name,
)
from garden_py.backend.images.tar_reader import Entry, Kind

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_SPECIAL_BITS: Final = 0o7000
ROOT_ATTRIBUTES: Final = (
    0,
    0,
    0o755,
)  # owner, group, mode of a root directory that the archive does not name
_FAST_LINK_BYTES: Final = 60  # shorter symbolic links lie in the inode on ext4, xfs and btrfs alike


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may cost; reaching more is LayerTooLarge.

    Attributes:
        max_bytes: of files with their holes, and of the disk.
        max_entries: entries of the archive, and directories that they imply.
    """

    max_bytes: int
    max_entries: int


class LayerTree:
    """A tree being made below `root`, which is empty at first and to which nobody else writes.

    Args:
        root: "" for /.
        limits: what it may cost.
        attributes: owner, group and mode of the root, until an entry has others.

    Attributes:
        logical_bytes: of files, holes included.
        disk_bytes: of files and links; with directories after `finish`.
        is_root_opaque: the layer hides all lower ones (overlayfs does not look at the mark on a layer's root).
    """

    def __init__(
        self, root: bytes, limits: Limits, attributes: tuple[int, int, int] = ROOT_ATTRIBUTES
    ) -> None:
        uid, gid, mode = attributes
        self._root = root
        self._limits = limits
        self._directories = Directories(root)
        self._last_head: bytes | None = None
        self._last_parent = b""
        # A setgid directory gives its group to what is made in it, so then every owner is set.
        self._sets_owners = bool(mode & stat.S_ISGID)
        self._placed = 0
        self.logical_bytes = 0
        self.disk_bytes = 0
        self.is_root_opaque = False
        if os.listdir(root or b"/"):
            raise UnpackFault("the target of a layer is not empty")
        os.chown(root or b"/", uid, gid)
        os.chmod(root or b"/", mode)

    @property
    def entries(self) -> int:
        """Placed so far, with the directories that they imply."""
        return self._placed + self._directories.implied

    def place(self, entry: Entry, content: Callable[[], Iterator[memoryview]]) -> None:
        """Make one entry.

        Raises:
            LayerError: it cannot or must not be; the tree is as far as it got.
        """
        self._placed += 1
        try:
            self._place(entry, content)
        except OSError as error:
            raise failure_of(error, entry.name) from error
        if self.entries > self._limits.max_entries:
            raise LayerTooLarge("entries", self._limits.max_entries)

    def finish(self) -> None:
        """Times of the directories, which nothing changes any more."""
        for path, mtime_ns in self._directories.mtimes.items():
            try:
                if mtime_ns is not None:
                    os.utime(self._root + path or b"/", ns=(mtime_ns, mtime_ns))
                self.disk_bytes += os.lstat(self._root + path or b"/").st_blocks * 512
            except OSError as error:
                raise failure_of(error, path) from error
        self._check_disk()

    def _place(self, entry: Entry, content: Callable[[], Iterator[memoryview]]) -> None:
        head, _, tail = entry.name.rpartition(b"/")
        # Entries of one directory mostly follow each other.
        if head != self._last_head or tail in (b"", b".", b"..") or tail.startswith(WHITEOUT_PREFIX):
            parts = split_name(entry.name)
            if not parts:
                self._place_root(entry)
                return
            if is_metadata(parts):
                return
            tail = parts[-1]
            self._last_head = None
            self._last_parent = self._directories.resolve(parts[:-1], make=True)
            if tail.startswith(WHITEOUT_PREFIX):
                self._hide(self._last_parent, tail, entry)
                return
            if entry.name.endswith(b"/" + tail):
                self._last_head = head
        path = self._last_parent + b"/" + tail
        match entry.kind:
            case Kind.FILE:
                self._make_file(path, entry, content)
            case Kind.DIRECTORY:
                self._make_directory(path, entry)
            case Kind.SYMLINK:
                self._make(path, lambda: os.symlink(entry.target, self._root + path))
                self._finish_node(path, entry)
            case Kind.HARD_LINK:
                self._make_hard_link(path, entry)
            case Kind.FIFO:
                self._make(path, lambda: os.mkfifo(self._root + path, entry.mode & 0o777))
                self._finish_node(path, entry)
            case Kind.DEVICE:
                pass

    def _place_root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise InvalidLayer(f"{shown(entry.name)}: the root of the tree is no directory")
        self._finish_directory(b"", entry, sets_all=True)

    # --- files

    def _make_file(self, path: bytes, entry: Entry, content: Callable[[], Iterator[memoryview]]) -> None:
        self.logical_bytes += entry.size
        if self.logical_bytes > self._limits.max_bytes:
            raise LayerTooLarge("bytes", self._limits.max_bytes)
        full = self._root + path
        try:
            fd = os.open(full, _CREATE, entry.mode & 0o777)
        except FileExistsError:
            self._remove(path)
            fd = os.open(full, _CREATE, entry.mode & 0o777)
        try:
            if entry.segments is not None:
                self._write_segments(fd, entry, entry.segments, content())
            elif entry.size:
                for piece in content():
                    _write(fd, piece)
            # Owner before mode, for chown(2) clears setuid; both before capabilities, which chown(2) removes.
            if entry.uid or entry.gid or self._sets_owners:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.mode & _SPECIAL_BITS:
                os.fchmod(fd, entry.mode)
            if entry.xattrs:
                self._set_xattrs(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
            if entry.size:
                self.disk_bytes += os.fstat(fd).st_blocks * 512
        finally:
            os.close(fd)
        self._check_disk()

    def _write_segments(
        self, fd: int, entry: Entry, segments: list[tuple[int, int]], content: Iterator[memoryview]
    ) -> None:
        os.ftruncate(fd, entry.size)
        piece = memoryview(b"")
        for offset, length in segments:
            os.lseek(fd, offset, os.SEEK_SET)
            while length:
                if not piece:
                    piece = next(content)
                _write(fd, piece[:length])
                written = min(length, len(piece))
                piece, length = piece[written:], length - written

    def _check_disk(self) -> None:
        if self.disk_bytes > self._limits.max_bytes:
            raise LayerTooLarge("disk_bytes", self._limits.max_bytes)

    # --- what is no file

    def _make_directory(self, path: bytes, entry: Entry) -> None:
        is_known = path in self._directories
        if not is_known:
            was_hidden = False
            try:
                self._directories.make(path, entry.mode & 0o777)
            except FileExistsError:
                was_hidden = is_whiteout(os.lstat(self._root + path))
                self._remove(path)
                self._directories.make(path, entry.mode & 0o777)
            if was_hidden:
                self._directories.hide_lower(path)
        self._finish_directory(path, entry, sets_all=is_known)

    def _finish_directory(self, path: bytes, entry: Entry, *, sets_all: bool) -> None:
        full = self._root + path or b"/"
        if sets_all or entry.uid or entry.gid or self._sets_owners:
            os.chown(full, entry.uid, entry.gid)
        if sets_all or entry.mode & _SPECIAL_BITS or self._sets_owners:
            os.chmod(full, entry.mode)
        if entry.xattrs:
            self._set_xattrs(full, entry)
        self._sets_owners = self._sets_owners or bool(entry.mode & stat.S_ISGID)
        self._directories.mtimes[path] = entry.mtime_ns

    def _finish_node(self, path: bytes, entry: Entry) -> None:
        full = self._root + path
        if entry.uid or entry.gid or self._sets_owners:
            os.chown(full, entry.uid, entry.gid, follow_symlinks=False)
        if entry.kind is Kind.FIFO and entry.mode & _SPECIAL_BITS:
            os.chmod(full, entry.mode)
        os.utime(full, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        if len(entry.target) >= _FAST_LINK_BYTES:
            self.disk_bytes += os.lstat(full).st_blocks * 512

    def _make_hard_link(self, path: bytes, entry: Entry) -> None:
        parts = split_name(entry.target)
        if not parts or any(part.startswith(WHITEOUT_PREFIX) for part in parts):
            raise InvalidLayer(f"{shown(entry.name)}: a hard link to {shown(entry.target)} cannot be")
        target = self._directories.resolve(parts[:-1], make=False) + b"/" + parts[-1]
        try:
            status = os.lstat(self._root + target)
        except FileNotFoundError:
            status = None
        if status is None or is_whiteout(status):
            raise InvalidLayer(
                f"{shown(entry.name)}: a hard link to {shown(entry.target)}, not in this layer"
            )
        if stat.S_ISDIR(status.st_mode):
            raise InvalidLayer(f"{shown(entry.name)}: a hard link to the directory {shown(entry.target)}")
        if target != path:
            self._make(path, lambda: os.link(self._root + target, self._root + path, follow_symlinks=False))

    def _set_xattrs(self, file: int | bytes, entry: Entry) -> None:
        for name, value in entry.xattrs.items():
            # user.overlay.* means something to overlayfs where it is mounted with userxattr.
            is_user = name.startswith(b"user.") and not name.startswith(b"user.overlay.")
            if not (is_user or name == b"security.capability"):
                continue
            try:
                os.setxattr(file, name, value)
            except ValueError as error:
                raise InvalidLayer(
                    f"{shown(entry.name)}: the name of an attribute holds a zero byte"
                ) from error
            except OSError as error:
                # ext4 says that there is no space when the inode has none for it (xattr(7)).
                if isinstance(failure_of(error, name), NoSpace) and os.statvfs(self._root or b"/").f_bavail:
                    raise InvalidLayer(f"{shown(entry.name)}: its attributes are too large") from error
                raise

    # --- whiteouts

    def _hide(self, parent: bytes, marker: bytes, entry: Entry) -> None:
        if marker == OPAQUE_MARKER:
            self.is_root_opaque = self.is_root_opaque or not parent
            self._directories.hide_lower(parent)
            return
        name = marker[len(WHITEOUT_PREFIX) :]
        if name in (b"", b".", b".."):
            raise InvalidLayer(f"{shown(entry.name)}: a whiteout of {shown(name)} cannot be")
        path = parent + b"/" + name
        try:
            # Needs no capability since Linux 5.8, unlike other devices.
            os.mknod(self._root + path, stat.S_IFCHR, os.makedev(0, 0))
        except FileExistsError:
            # It hides lower layers only; a directory of this layer stays, without what lower ones have in it.
            if path in self._directories:
                self._directories.hide_lower(path)

    # --- replacing

    def _make(self, path: bytes, make: Callable[[], None]) -> None:
        try:
            make()
        except FileExistsError:
            self._remove(path)
            make()

    def _remove(self, path: bytes) -> None:
        """Make room for another entry of the same name."""
        self._last_head = None  # it may lead through what goes
        if path not in self._directories:
            self._unlink(path)
            return
        todo, found = [path], []
        while todo:
            found.append(todo.pop())
            with os.scandir(self._root + found[-1]) as content:
                for each in content:
                    below = found[-1] + b"/" + each.name
                    if each.is_dir(follow_symlinks=False):
                        todo.append(below)
                    else:
                        self._unlink(below)
        for directory in reversed(found):
            os.rmdir(self._root + directory)
            del self._directories.mtimes[directory]

    def _unlink(self, path: bytes) -> None:
        status = os.lstat(self._root + path)
        os.unlink(self._root + path)
        if status.st_nlink == 1 and status.st_size:
            self.disk_bytes -= status.st_blocks * 512


def _write(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]
