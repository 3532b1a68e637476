"""Packs local files into tar streams: links stay links, holes stay holes, attributes of users go along."""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from garden_py.client.address import CHUNK_BYTES

_BLOCK_BYTES: Final = tarfile.BLOCKSIZE
# End of an archive: two blocks of zeros. Source: POSIX.1-2017 pax, ustar Interchange Format.
_END_OF_ARCHIVE: Final = bytes(2 * _BLOCK_BYTES)
_HOLES_MIN_BYTES: Final = 1 << 20  # fewer are sent as zeros, which every tar understands
_SEGMENTS_MAX: Final = 4096
XATTR_PREFIX: Final = "SCHILY.xattr."  # pax keyword of extended attributes, as GNU tar and star write them

_Segments = list[tuple[int, int]]


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


def count_bytes(source: Path) -> int:
    """How much `pack` will send of file contents, holes left out and hard links counted once or more often.

    Raises:
        OSError: something cannot be looked at.
    """
    status = source.stat()
    if not stat.S_ISDIR(status.st_mode):
        return min(status.st_size, status.st_blocks * 512)
    total = 0
    for directory, _, files in os.walk(source, onerror=_raise):
        for file in files:
            status = os.lstat(os.path.join(directory, file))
            if stat.S_ISREG(status.st_mode):
                total += min(status.st_size, status.st_blocks * 512)
    return total


def _raise(error: OSError) -> None:
    raise error


def _pack_tree(catalogue: tarfile.TarFile, path: Path, name: str) -> Iterator[bytes]:
    if stat.S_ISSOCK(os.lstat(path).st_mode):
        return  # tar has no form for a socket, and no program would find its listener in the copy
    member = catalogue.gettarinfo(path, arcname=name)
    member.uid = member.gid = 0  # the receiver owns the copy, as its user in the container
    member.uname = member.gname = ""
    if member.isreg():
        yield from _pack_file(path, member)
        return
    if member.isdir():
        member.pax_headers = _read_xattrs(path)
    yield _header(member)
    if member.isdir():
        for entry in sorted(os.listdir(path)):
            yield from _pack_tree(catalogue, path / entry, f"{name}/{entry}")


def _pack_file(path: Path, member: tarfile.TarInfo) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        member.pax_headers = _read_xattrs(file.fileno())
        segments = find_segments(file.fileno())
        if segments is None:
            yield _header(member)
            yield from _contents(path, file, 0, member.size)
        else:
            head = _sparse_head(member, segments)
            yield _header(member)
            yield head
            for offset, size in segments:
                yield from _contents(path, file, offset, size)
        yield _padding(member.size)


def _header(member: tarfile.TarInfo) -> bytes:
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK_BYTES)


def _contents(path: Path, file: io.FileIO, offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    left = size
    while left:
        data = file.read(min(left, CHUNK_BYTES))
        if not data:
            raise OSError(f"{path} became shorter while it was copied")
        left -= len(data)
        yield data


def _read_xattrs(file: Path | int) -> dict[str, str]:
    """Those that mean something elsewhere: the users', and file capabilities. A file system may have none."""
    found = {}
    try:
        for name in os.listxattr(file):
            if name.startswith("user.") or name == "security.capability":
                found[XATTR_PREFIX + name] = os.getxattr(file, name).decode("utf-8", "surrogateescape")
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENODATA):
            raise
    return found


def find_segments(fd: int) -> _Segments | None:
    """(offset, size) of what an open file holds; None if its holes are not worth the trouble.

    Source: SEEK_DATA and SEEK_HOLE, lseek(2).
    """
    status = os.fstat(fd)
    if status.st_size - status.st_blocks * 512 < _HOLES_MIN_BYTES:
        return None
    segments: _Segments = []
    end = 0
    while end < status.st_size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), status.st_size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            return None
        segments.append((start, end - start))
        if len(segments) > _SEGMENTS_MAX:
            return None
    return segments


def _sparse_head(member: tarfile.TarInfo, segments: _Segments) -> bytes:
    """The map that precedes the content, and the member's header for it ("PAX Format, Version 1.0", GNU tar manual)."""
    # An empty segment at the end says how long the file is, should a reader trust the map alone.
    pairs = [*segments, (member.size, 0)]
    numbers = [len(pairs), *(number for pair in pairs for number in pair)]
    head = "".join(f"{number}\n" for number in numbers).encode()
    head += _padding(len(head))
    member.pax_headers = {
        **member.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": member.name,
        "GNU.sparse.realsize": str(member.size),
    }
    # Short and plain, so that no `path` follows in the header and overrides the name above.
    member.name = "GNUSparseFile.0/sparse"
    member.size = len(head) + sum(size for _, size in segments)
    return head
