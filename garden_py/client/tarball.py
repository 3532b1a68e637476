"""Unpacks tar streams from containers without trusting them.

Unpacking walks from the target directory by file descriptors and follows no symbolic link, so a hostile
archive (an absolute name, "..", a link followed by a file "behind" it) cannot write outside. That is checked
here because `tarfile`'s own data filter is missing from the Python 3.11.2 of Debian 12.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, cast

from garden_py.client.errors import UnsafeArchive
from garden_py.client.tar_pack import XATTR_PREFIX

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def split_container_path(path: str) -> tuple[str, str]:
    """Directory and name of a file in a container.

    Raises:
        ValueError: the path names no file.
    """
    directory, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        raise ValueError(f"{path!r} does not name a file")
    return (directory or ("/" if path.startswith("/") else ".")), name


class _ChunkReader:
    """A stream of chunks as tarfile reads it: never ahead of what is asked for."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")
        self._at = 0

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._at

    def seek(self, position: int) -> None:
        """Go forward."""
        for _ in self.pieces(position - self._at):
            pass

    def read(self, size: int) -> bytes:
        """Exactly size bytes, or fewer at the end of the stream."""
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The same without a copy, in pieces."""
        while size > 0:
            if len(self._rest) == 0:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._rest = memoryview(chunk)
            piece = self._rest[:size]
            self._rest = self._rest[size:]
            size -= len(piece)
            self._at += len(piece)
            yield piece

    def drain(self) -> None:
        """Read what is left: the sender may pad the archive, and ends its call only when all was taken."""
        for _ in self._chunks:
            pass


class _Archive:
    """A tar stream whose members' contents are taken as they come."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._reader = _ChunkReader(chunks)

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        # The overload asks for a full IO[bytes]; to read on, tarfile uses tell, seek and read alone.
        with tarfile.open(fileobj=cast(IO[bytes], self._reader), mode="r:") as archive:
            for member in archive:
                self._stored = archive.offset - self._reader.tell()
                yield member
                # Kept for random access; a stream never goes back.
                archive.members = []  # type: ignore[attr-defined]  # typeshed leaves it out
        self._reader.drain()

    def write_content(self, member: tarfile.TarInfo, into: IO[bytes]) -> None:
        """Write the content of the regular member that came last; `into` can be sought if it may have holes.

        Raises:
            UnsafeArchive: its map of holes is not of its content.
            tarfile.ReadError: the stream ends before.
        """
        if member.sparse is None:
            self._move(member.size, into)
            return
        held = cast(list[tuple[int, int]], member.sparse)  # typeshed takes it for bytes
        segments = [(offset, size) for offset, size in held if size]
        if sum(size for _, size in segments) > self._stored:
            raise UnsafeArchive(f"{member.name!r} has a map of holes that does not fit")
        end = 0
        for offset, size in segments:
            if offset < end or offset + size > member.size:
                raise UnsafeArchive(f"{member.name!r} has a map of holes that does not fit")
            into.seek(offset - end, os.SEEK_CUR)
            self._move(size, into)
            end = offset + size
        if end < member.size:
            # A byte, for not everything that can be written can be made longer otherwise (io.BytesIO.truncate).
            into.seek(member.size - end - 1, os.SEEK_CUR)
            into.write(b"\0")

    def _move(self, size: int, into: IO[bytes]) -> None:
        left = size
        for piece in self._reader.pieces(size):
            left -= len(piece)
            _write_all(into, piece)
        if left:
            raise tarfile.ReadError("unexpected end of data")


def unpack(chunks: Iterable[bytes], target_dir: Path, name: str = "") -> None:
    """Unpack a tar stream into a local directory, made if missing; existing files are replaced.

    Files belong to the caller and lose setuid, setgid and sticky bits. Symbolic links are made as they are,
    even if they point elsewhere, but never followed. The stream is read to its end.

    Args:
        chunks: the tar stream.
        target_dir: where to.
        name: takes the place of the first component of every member's path; empty: names stay.

    Raises:
        UnsafeArchive: a member would leave target_dir, or is a device or a FIFO. What came before it stays.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    root_fd = os.open(target_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        modes: list[tuple[list[str], int]] = []
        archive = _Archive(chunks)
        for member in archive:
            parts = _rename(_safe_parts(member.name), name)
            if member.isdir():
                directory_fd = _open_directory(root_fd, parts)
                _set_xattrs(directory_fd, member)
                os.close(directory_fd)
                modes.append((parts, member.mode & 0o777))
            elif parts:
                _unpack_leaf(archive, member, root_fd, parts, name)
        # Last and deepest first: a directory without write permission must not stop its own contents.
        for parts, mode in reversed(modes):
            if parts:
                _set_directory_mode(root_fd, parts, mode)
    finally:
        os.close(root_fd)


def unpack_single(chunks: Iterable[bytes], into: IO[bytes]) -> None:
    """Write the contents of the stream's only member, a regular file, to `into`.

    Raises:
        IsADirectoryError: it is something else.
    """
    archive = _Archive(chunks)
    for member in archive:
        if not member.isreg():
            raise IsADirectoryError(f"{member.name} is not a regular file")
        archive.write_content(member, into)


def _safe_parts(name: str) -> list[str]:
    """The components of a member's name below the target; empty for the target itself."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UnsafeArchive(f"the archive names {name!r}, which is not below the target directory")
    return parts


def _rename(parts: list[str], top: str) -> list[str]:
    return [top, *parts[1:]] if top and parts else parts


def _open_directory(root_fd: int, parts: list[str]) -> int:
    """A descriptor of the directory, made with its parents if missing; refuses symbolic links on the way."""
    current = os.dup(root_fd)
    for part in parts:
        try:
            with suppress(FileExistsError):  # then it must be a directory, as the open checks
                os.mkdir(part, 0o755, dir_fd=current)
            deeper = os.open(part, _DIRECTORY_FLAGS, dir_fd=current)
        except OSError as error:
            # ELOOP or ENOTDIR: a link or a file stands where the archive claims a directory. open(2),
            # O_NOFOLLOW.
            raise UnsafeArchive(f"{'/'.join(parts)}: {part} is not a directory: {error.strerror}") from error
        finally:
            os.close(current)
        current = deeper
    return current


def _unpack_leaf(
    archive: _Archive, member: tarfile.TarInfo, root_fd: int, parts: list[str], top: str
) -> None:
    directory_fd = _open_directory(root_fd, parts[:-1])
    name = parts[-1]
    try:
        if member.isreg():
            _replace(directory_fd, name)
            _write_file(archive, member, directory_fd, name)
        elif member.issym():
            _replace(directory_fd, name)
            os.symlink(member.linkname, name, dir_fd=directory_fd)
        elif member.islnk():
            _link(root_fd, _rename(_safe_parts(member.linkname), top), directory_fd, name)
        else:
            raise UnsafeArchive(f"the archive holds {member.name!r}, which is no file, directory or link")
    finally:
        os.close(directory_fd)


def _replace(directory_fd: int, name: str) -> None:
    """Make room for a new file; a directory in its place is an error (rmdir is the caller's decision)."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def _write_file(archive: _Archive, member: tarfile.TarInfo, directory_fd: int, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=directory_fd), "wb", buffering=0) as file:
        archive.write_content(member, file)
        _set_xattrs(file.fileno(), member)
        os.fchmod(file.fileno(), member.mode & 0o777)
        os.utime(file.fileno(), (member.mtime, member.mtime))


def _write_all(file: IO[bytes], data: memoryview) -> None:
    while data:
        data = data[file.write(data) or 0 :]


def _set_xattrs(fd: int, member: tarfile.TarInfo) -> None:
    """The users' attributes. A file capability of a container must not become one of the host, like a setuid bit."""
    for key, value in member.pax_headers.items():
        name = key.removeprefix(XATTR_PREFIX)
        if name != key and name.startswith("user."):
            try:
                os.setxattr(fd, name, value.encode("utf-8", "surrogateescape"))
            except OSError as error:
                if error.errno not in (
                    errno.ENOTSUP,
                    errno.EPERM,
                ):  # no place for them: the content matters more
                    raise


def _link(root_fd: int, source: list[str], directory_fd: int, name: str) -> None:
    source_fd = _open_directory(root_fd, source[:-1])
    try:
        status = os.stat(source[-1], dir_fd=source_fd, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeArchive(f"hard link {name!r} to {'/'.join(source)!r}, which is no regular file")
        _replace(directory_fd, name)
        os.link(source[-1], name, src_dir_fd=source_fd, dst_dir_fd=directory_fd, follow_symlinks=False)
    finally:
        os.close(source_fd)


def _set_directory_mode(root_fd: int, parts: list[str], mode: int) -> None:
    descriptor = _open_directory(root_fd, parts)
    try:
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
