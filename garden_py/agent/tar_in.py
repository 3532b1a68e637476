"""Unpack a tar stream from stdin beneath a directory.

Archive names are not trusted: what an entry may touch lies beneath the destination, checked by the kernel
(openat2) at the moment of use, so that neither the archive nor a process racing it can lead out by links.
"""

from __future__ import annotations

import errno
import posix
import tarfile

from garden_py.agent import syscalls
from garden_py.agent.tar_shared import CHUNK_BYTES, DIRECTORY, TEXT, TransferError, has_xattrs, set_xattrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 512

# linux/openat2.h, openat2(2)
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10


class _Input:
    """stdin as tarfile reads it, remembering the last block, which tells a whole archive from a cut one."""

    def __init__(self) -> None:
        self._last = b""

    def read(self, size: int) -> bytes:
        data = posix.read(0, min(size, CHUNK_BYTES))
        self._last = (self._last + data)[-_BLOCK:] if len(data) < _BLOCK else data[-_BLOCK:]
        return data

    def finish(self) -> None:
        """Read to the end, so that the sender is not killed by SIGPIPE over padding.

        Raises:
            TransferError: the archive does not end with the zero block tar(5) demands.
        """
        while self.read(CHUNK_BYTES):
            pass
        if len(self._last) < _BLOCK or any(self._last):
            raise TransferError("broken_archive", "unexpected end of data")


def unpack(destination: bytes) -> None:
    """Unpack the archive on stdin into an existing directory.

    Entries belong to the calling user, modes are masked by the umask, device nodes are skipped, an existing
    directory keeps its mode, anything else existing is replaced.
    """
    root = posix.open(destination, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    source = _Input()
    unpacker = _Unpacker(root, is_whole_tree=destination.strip(b"/") == b"")
    with tarfile.open(  # type: ignore[call-overload]  # a stream is only read
        fileobj=source,
        mode="r|",
        bufsize=CHUNK_BYTES,
        encoding=TEXT[0],
        errors=TEXT[1],
    ) as archive:
        for member in archive:
            unpacker.place(archive, member)
            # tarfile keeps every member for random access; a stream never goes back.
            archive.members = []
    unpacker.finish()
    source.finish()


class _Unpacker:
    def __init__(self, root: int, *, is_whole_tree: bool) -> None:
        self._root = root
        # Beneath "/" nothing leads out, so an image's own absolute links (/var/run -> /run) may be followed;
        # beneath any other destination a link that leads out makes its entry fail.
        scope = _RESOLVE_IN_ROOT if is_whole_tree else _RESOLVE_BENEATH
        self._resolve = scope | _RESOLVE_NO_MAGICLINKS
        self._umask = posix.umask(0)
        posix.umask(self._umask)
        self._made_directories: list[tuple[list[bytes], int, int]] = []

    def place(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _split(member.name)
        if member.isdir():
            self._place_directory(parts, member)
            return
        if not parts:
            raise TransferError("broken_archive", "an entry that is no directory has the name of the root")
        place = self._placer(archive, member)
        if place is None:
            return
        parent = self._open_parent(parts)
        try:
            _remove_existing(parts[-1], parent)
            place(parts[-1], parent)
        except OSError as error:
            raise _named(error, member) from error
        finally:
            posix.close(parent)

    def _placer(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo
    ) -> Callable[[bytes, int], None] | None:
        """What makes the entry under a name in a directory; None for what is skipped."""
        if member.issym():
            target = member.linkname.encode(*TEXT)
            return lambda name, parent: posix.symlink(target, name, dir_fd=parent)
        if member.islnk():
            return lambda name, parent: self._link(_split(member.linkname), name, parent)
        if member.isfifo():
            return lambda name, parent: posix.mkfifo(name, self._mode(member), dir_fd=parent)
        if member.ischr() or member.isblk():
            return None
        return lambda name, parent: self._write_file(archive, member, name, parent)

    def _mode(self, member: tarfile.TarInfo) -> int:
        return member.mode & 0o777 & ~self._umask

    def _place_directory(self, parts: list[bytes], member: tarfile.TarInfo) -> None:
        if not parts:
            return
        parent = self._open_parent(parts)
        try:
            # Writable until its content is there; `finish` sets the wanted mode and time.
            posix.mkdir(parts[-1], 0o700 | self._mode(member), dir_fd=parent)
        except FileExistsError:
            posix.close(self._open(parts, posix.O_PATH | posix.O_DIRECTORY))
            return
        except OSError as error:
            raise _named(error, member) from error
        finally:
            posix.close(parent)
        self._made_directories.append((parts, self._mode(member), _mtime_ns(member)))
        self._set_xattrs_of(parts, member)

    def _write_file(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: bytes, parent: int
    ) -> None:
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
        fd = posix.open(name, flags, 0o600 | self._mode(member), dir_fd=parent)
        try:
            content = archive.extractfile(member)
            left = member.size if content is not None else 0
            while content is not None and left > 0:
                data = content.read(min(left, CHUNK_BYTES))
                if not data:
                    raise TransferError("broken_archive", "unexpected end of data")
                left -= len(data)
                rest = memoryview(data)
                while rest:
                    rest = rest[posix.write(fd, rest) :]
            posix.fchmod(fd, self._mode(member))
            set_xattrs(fd, member)
            posix.utime(fd, ns=(_mtime_ns(member), _mtime_ns(member)))
        finally:
            posix.close(fd)

    def _link(self, target: list[bytes], name: bytes, parent: int) -> None:
        if not target:
            raise TransferError("broken_archive", "a hard link to the root")
        target_parent = self._open_parent(target)
        try:
            posix.link(target[-1], name, src_dir_fd=target_parent, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            posix.close(target_parent)

    def _set_xattrs_of(self, parts: list[bytes], member: tarfile.TarInfo) -> None:
        if has_xattrs(member):
            fd = self._open(parts, DIRECTORY)
            try:
                set_xattrs(fd, member)
            finally:
                posix.close(fd)

    def finish(self) -> None:
        """Modes and times of the directories made, the deepest first: a parent may become unwritable."""
        for parts, mode, mtime_ns in reversed(self._made_directories):
            fd = self._open(parts, DIRECTORY | posix.O_NOFOLLOW)
            try:
                posix.utime(fd, ns=(mtime_ns, mtime_ns))
                posix.fchmod(fd, mode)
            finally:
                posix.close(fd)

    def _open_parent(self, parts: list[bytes]) -> int:
        """The directory an entry lies in, made with its parents if the archive did not name it before."""
        if len(parts) == 1:
            return posix.dup(self._root)
        try:
            return self._open(parts[:-1], posix.O_PATH | posix.O_DIRECTORY)
        except FileNotFoundError:
            grandparent = self._open_parent(parts[:-1])
        try:
            posix.mkdir(parts[-2], 0o777, dir_fd=grandparent)
        finally:
            posix.close(grandparent)
        return self._open(parts[:-1], posix.O_PATH | posix.O_DIRECTORY)

    def _open(self, parts: list[bytes], flags: int) -> int:
        path = b"/".join(parts)
        try:
            return syscalls.open_beneath(self._root, path, flags, self._resolve)
        except OSError as error:
            if error.errno == errno.EXDEV:
                shown = path.decode(*TEXT)
                raise TransferError("broken_archive", f"{shown}: leads out of the destination") from error
            error.filename = path
            raise


def _split(name: str) -> list[bytes]:
    """Components of an archive name, relative to the destination whatever the archive says."""
    parts = [part for part in name.encode(*TEXT).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise TransferError("broken_archive", f"{name}: leads out of the destination")
    return parts


def _remove_existing(name: bytes, parent: int) -> None:
    try:
        posix.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    # EISDIR for a directory: it is not replaced by a file, as with tar(1).


def _named(error: OSError, member: tarfile.TarInfo) -> OSError:
    return OSError(error.errno, error.strerror, member.name.encode(*TEXT))


def _mtime_ns(member: tarfile.TarInfo) -> int:
    return int(member.mtime * 1_000_000_000)
