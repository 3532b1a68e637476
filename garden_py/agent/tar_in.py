"""Unpack a tar stream from stdin beneath a directory.

Archive names are not trusted: what an entry may touch lies beneath the destination, checked by the kernel
(openat2) at the moment of use, so that neither the archive nor a process racing it can lead out by links. Beneath it,
a process gains nothing by exchanging a directory for a link either: other users' links are not followed.
"""

from __future__ import annotations

import errno
import posix
import stat
import tarfile

from garden_py.agent import syscalls
from garden_py.agent.tar_shared import CHUNK_BYTES, DIRECTORY, TEXT, TransferError, has_xattrs, set_xattrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 512
_SPLICE_AT_BYTES = 64 << 10  # below, a copy costs less than the calls

# linux/openat2.h, openat2(2)
_RESOLVE = 0x04 | 0x08  # RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH
_LINKS_MAX = 40  # MAXSYMLINKS, path_resolution(7)


class _Input:
    """stdin as tarfile reads it: never ahead of what is asked for, so that content may go past it in the kernel.

    Remembers the last block, which tells a whole archive from a cut one.
    """

    def __init__(self) -> None:
        self._at = 0
        self._last = b""
        self._splices = True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        while self._at < position and self.read(min(position - self._at, CHUNK_BYTES)):
            pass

    def read(self, size: int) -> bytes:
        data = posix.read(0, size)
        while len(data) < size and (more := posix.read(0, size - len(data))):
            data += more
        self._at += len(data)
        self._last = (self._last + data)[-_BLOCK:] if len(data) < _BLOCK else data[-_BLOCK:]
        return data

    def move(self, fd: int, size: int) -> None:
        """The next size bytes into a file, without a copy in this process if stdin is a pipe (splice(2))."""
        while size:
            moved = self._move_some(fd, min(size, CHUNK_BYTES))
            if not moved:
                raise TransferError("broken_archive", "unexpected end of data")
            size -= moved

    def _move_some(self, fd: int, size: int) -> int:
        if self._splices and size > _SPLICE_AT_BYTES:
            try:
                moved = posix.splice(0, fd, size)
            except OSError as error:
                if error.errno != errno.EINVAL:  # no pipe, or a file system that cannot
                    raise
                self._splices = False
            else:
                self._at += moved
                self._last = b""
                return moved
        data = self.read(size)
        rest = memoryview(data)
        while rest:
            rest = rest[posix.write(fd, rest) :]
        return len(data)

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
    unpacker = _Unpacker(root, source, is_whole_tree=destination.strip(b"/") == b"")
    with tarfile.open(  # type: ignore[call-overload]  # a stream is only read
        fileobj=source,
        mode="r:",
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
    def __init__(self, root: int, source: _Input, *, is_whole_tree: bool) -> None:
        self._root = root
        self._source = source
        # Beneath "/" nothing leads out, so an image's own absolute links (/var/run -> /run) may be followed;
        # beneath any other destination a link that leads out makes its entry fail.
        self._is_whole_tree = is_whole_tree
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
            if member.sparse is None:
                self._source.move(fd, member.size)
            else:
                self._write_segments(fd, member, archive.offset)
            posix.fchmod(fd, self._mode(member))
            set_xattrs(fd, member)
            posix.utime(fd, ns=(_mtime_ns(member), _mtime_ns(member)))
        finally:
            posix.close(fd)

    def _write_segments(self, fd: int, member: tarfile.TarInfo, end: int) -> None:
        """What a sparse file holds, with holes where it held nothing; the archive has the pieces in a row.

        Args:
            fd: the file.
            member: its entry.
            end: where the next header is in the archive.
        """
        segments: list[tuple[int, int]] = member.sparse  # type: ignore[assignment]  # typeshed takes it for bytes
        if sum(size for _, size in segments) > end - self._source.tell():
            raise TransferError("broken_archive", f"{member.name}: its map of holes does not fit")
        posix.ftruncate(fd, member.size)
        for offset, size in segments:
            posix.lseek(fd, offset, 0)
            self._source.move(fd, size)

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
            fd = self._open_made(parts)
            try:
                set_xattrs(fd, member)
            finally:
                posix.close(fd)

    def finish(self) -> None:
        """Modes and times of the directories made, the deepest first: a parent may become unwritable."""
        for parts, mode, mtime_ns in reversed(self._made_directories):
            fd = self._open_made(parts)
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
            try:
                return self._open_plain(parts, flags)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
            return self._open_plain(self._resolve(parts), flags)
        except OSError as error:
            error.filename = path
            raise

    def _open_made(self, parts: list[bytes]) -> int:
        """A directory that was made here, and no link that has taken its place, whosever it is."""
        try:
            return self._open_plain(parts, DIRECTORY)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return self._open_plain([*self._resolve(parts[:-1]), parts[-1]], DIRECTORY)

    def _open_plain(self, parts: list[bytes], flags: int) -> int:
        """Open what lies beneath the root without a link on the way, also while somebody exchanges what lies there."""
        return syscalls.open_beneath(self._root, b"/".join(parts) or b".", flags, _RESOLVE)

    def _resolve(self, parts: list[bytes]) -> list[bytes]:
        """The same place without links.

        Whoever made a link chose where it leads. Those of root and our own are followed; another user's would have us
        write where he could not. (fs.protected_symlinks of the kernel protects sticky directories only.)

        Raises:
            TransferError: a link leads out of the destination, or is somebody else's.
        """
        shown = b"/".join(parts).decode(*TEXT)
        todo, plain, links = parts[::-1], list[bytes](), 0
        while todo:
            part = todo.pop()
            if part == b"..":
                if not plain and not self._is_whole_tree:
                    raise TransferError("broken_archive", f"{shown}: leads out of the destination")
                del plain[-1:]
                continue
            plain.append(part)
            target = self._read_link(plain, shown)
            if target is None:
                continue
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, posix.strerror(errno.ELOOP))
            plain.pop()
            if target.startswith(b"/"):
                if not self._is_whole_tree:
                    raise TransferError("broken_archive", f"{shown}: leads out of the destination")
                plain.clear()
            todo += [piece for piece in target.split(b"/") if piece not in (b"", b".")][::-1]
        return plain

    def _read_link(self, parts: list[bytes], shown: str) -> bytes | None:
        """Where a link leads; None if it is none."""
        fd = self._open_plain(parts, posix.O_PATH | posix.O_NOFOLLOW)
        try:
            status = posix.fstat(fd)
            if not stat.S_ISLNK(status.st_mode):
                return None
            if status.st_uid not in (0, posix.geteuid()):
                raise TransferError("permission_denied", f"{shown}: Permission denied: another user's link")
            return posix.readlink(b"", dir_fd=fd)
        finally:
            posix.close(fd)


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
