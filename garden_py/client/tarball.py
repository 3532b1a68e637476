"""Packs local files into tar streams and unpacks tar streams from containers without trusting them.

Unpacking walks from the target directory by file descriptors and follows no symbolic link, so a hostile
archive (an absolute name, "..", a link followed by a file "behind" it) cannot write outside. That is checked
here because `tarfile`'s own data filter is missing from the Python 3.11.2 of Debian 12.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final, cast

from garden_py.client.address import CHUNK_BYTES
from garden_py.client.errors import UnsafeArchive

_BLOCK_BYTES: Final = tarfile.BLOCKSIZE
# End of an archive: two blocks of zeros. Source: POSIX.1-2017 pax, ustar Interchange Format.
_END_OF_ARCHIVE: Final = bytes(2 * _BLOCK_BYTES)

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


def pack(source: Path, name: str = "") -> Iterator[bytes]:
    """A tar stream of a file or directory, read as it is sent.

    Args:
        source: what to pack. Symbolic links below it stay links; a link given as the source itself is
        followed.
        name: top-level name in the archive; empty: the source's own; ".": a directory's contents.

    Raises:
        OSError: a file cannot be read, or changed its size while it was read.
    """
    top = source.resolve(strict=True)
    # gettarinfo knows hard links by what this archive has seen before; nothing is ever written to it.
    with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT) as catalogue:
        yield from _pack_tree(catalogue, top, name or source.absolute().name or ".")
    yield _END_OF_ARCHIVE


def pack_bytes(name: str, data: bytes, mode: int) -> Iterator[bytes]:
    """A tar stream of one regular file."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    yield _header(member)
    yield data
    yield _padding(len(data)) + _END_OF_ARCHIVE


def _pack_tree(catalogue: tarfile.TarFile, path: Path, name: str) -> Iterator[bytes]:
    if stat.S_ISSOCK(os.lstat(path).st_mode):
        return  # tar has no form for a socket, and no program would find its listener in the copy
    member = catalogue.gettarinfo(path, arcname=name)
    member.uid = member.gid = 0  # the receiver owns the copy, as its user in the container
    member.uname = member.gname = ""
    yield _header(member)
    if member.isreg():
        yield from _contents(path, member.size)
    elif member.isdir():
        for entry in sorted(os.listdir(path)):
            yield from _pack_tree(catalogue, path / entry, f"{name}/{entry}")


def _header(member: tarfile.TarInfo) -> bytes:
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK_BYTES)


def _contents(path: Path, size: int) -> Iterator[bytes]:
    left = size
    with open(path, "rb", buffering=0) as file:
        while left:
            data = file.read(min(left, CHUNK_BYTES))
            if not data:
                raise OSError(f"{path} became shorter while it was copied")
            left -= len(data)
            yield data
    yield _padding(size)


class _ChunkReader:
    """As much of a readable file as tarfile's streaming mode uses, over an iterable of chunks."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Exactly size bytes, or fewer at the end of the stream."""
        parts: list[memoryview] = []
        while size > 0:
            if len(self._rest) == 0:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._rest = memoryview(chunk)
            parts.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        return b"".join(parts)

    def drain(self) -> None:
        """Read what is left: the sender may pad the archive, and ends its call only when all was taken."""
        for _ in self._chunks:
            pass


@contextmanager
def _open_stream(chunks: Iterable[bytes]) -> Iterator[tarfile.TarFile]:
    reader = _ChunkReader(chunks)
    # The overload for streaming modes asks for a full IO[bytes]; tarfile documents that read(size) is enough.
    with tarfile.open(fileobj=cast(IO[bytes], reader), mode="r|", bufsize=CHUNK_BYTES) as archive:
        yield archive
    reader.drain()


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
        with _open_stream(chunks) as archive:
            for member in archive:
                parts = _rename(_safe_parts(member.name), name)
                if member.isdir():
                    os.close(_open_directory(root_fd, parts))
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
    with _open_stream(chunks) as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isreg() else None
            if source is None:
                raise IsADirectoryError(f"{member.name} is not a regular file")
            while data := source.read(CHUNK_BYTES):
                into.write(data)


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
    archive: tarfile.TarFile, member: tarfile.TarInfo, root_fd: int, parts: list[str], top: str
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


def _write_file(archive: tarfile.TarFile, member: tarfile.TarInfo, directory_fd: int, name: str) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise AssertionError("a regular member has contents")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=directory_fd), "wb", buffering=0) as file:
        while data := source.read(CHUNK_BYTES):
            _write_all(file, data)
        os.fchmod(file.fileno(), member.mode & 0o777)
        os.utime(file.fileno(), (member.mtime, member.mtime))


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


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
