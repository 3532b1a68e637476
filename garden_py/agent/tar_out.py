"""Pack a file or a directory as a tar stream to stdout."""

from __future__ import annotations

import errno
import posix
import stat
import tarfile

from garden_py.agent.tar_shared import CHUNK_BYTES, DIRECTORY, TEXT, get_xattrs

_BLOCK = 512
_SEND_BYTES = 1 << 30
_HOLES_MIN_BYTES = 1 << 20  # fewer are sent as zeros, which every tar understands
_SEGMENTS_MAX = 4096


def pack(source: bytes) -> None:
    """Write the source as a tar archive to stdout.

    `/a/b` becomes `b` or `b/...`; `/a/b/` becomes `./` and `./...`. Sockets and device nodes are left out.
    """
    packer = _Packer()
    if source.endswith(b"/"):
        packer.add_root(posix.open(source, DIRECTORY), b".")
    else:
        parent_path, _, name = source.rpartition(b"/")
        parent = posix.open(parent_path or b"/", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        if name in (b".", b".."):
            packer.add_root(posix.open(name, DIRECTORY, dir_fd=parent), b".")
        else:
            packer.add(parent, name, name)
    _write(bytes(2 * _BLOCK))


def _write(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[posix.write(1, rest) :]


class _Packer:
    def __init__(self) -> None:
        self._first_names: dict[tuple[int, int], str] = {}

    def add_root(self, directory: int, name: bytes) -> None:
        status = posix.fstat(directory)
        member = self._member(name, status)
        get_xattrs(directory, member)
        _write_header(member)
        self._add_content(directory, name)

    def add(self, parent: int, entry: bytes, name: bytes) -> None:
        """Add one entry of the directory `parent` under the archive name, with all that is in it."""
        try:
            status = posix.stat(entry, dir_fd=parent, follow_symlinks=False)
            member = self._member(name, status)
            if stat.S_ISREG(status.st_mode):
                self._add_file(parent, entry, member, status)
            elif stat.S_ISDIR(status.st_mode):
                directory = posix.open(entry, DIRECTORY | posix.O_NOFOLLOW, dir_fd=parent)
                try:
                    get_xattrs(directory, member)
                    _write_header(member)
                    self._add_content(directory, name)
                finally:
                    posix.close(directory)
            elif stat.S_ISLNK(status.st_mode):
                member.type = tarfile.SYMTYPE
                member.linkname = posix.readlink(entry, dir_fd=parent).decode(*TEXT)
                _write_header(member)
            elif stat.S_ISFIFO(status.st_mode):
                member.type = tarfile.FIFOTYPE
                _write_header(member)
        except OSError as error:
            if error.filename is None or error.filename == entry:
                error.filename = name
            raise

    def _add_content(self, directory: int, name: bytes) -> None:
        for entry in sorted(posix.listdir(directory)):
            raw = entry.encode(*TEXT)
            self.add(directory, raw, name + b"/" + raw)

    def _member(self, name: bytes, status: posix.stat_result) -> tarfile.TarInfo:
        # Made by hand: `gettarinfo` asks NSS for names, that is, for code of the container.
        member = tarfile.TarInfo(name.decode(*TEXT))
        member.mode = stat.S_IMODE(status.st_mode)
        member.uid, member.gid = status.st_uid, status.st_gid
        member.mtime = status.st_mtime_ns // 1_000_000_000
        if stat.S_ISDIR(status.st_mode):
            member.type = tarfile.DIRTYPE
        return member

    def _add_file(
        self, parent: int, entry: bytes, member: tarfile.TarInfo, status: posix.stat_result
    ) -> None:
        identity = (status.st_dev, status.st_ino)
        first_name = self._first_names.get(identity)
        if first_name is not None:
            member.type = tarfile.LNKTYPE
            member.linkname = first_name
            _write_header(member)
            return
        own_name = member.name
        # O_NONBLOCK: should a FIFO have taken the name since the stat, opening it must not wait for a writer.
        flags = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC
        fd = posix.open(entry, flags, dir_fd=parent)
        try:
            opened = posix.fstat(fd)
            if not stat.S_ISREG(opened.st_mode):
                return  # something else has taken the name
            get_xattrs(fd, member)
            segments = _find_segments(fd, opened)
            if segments is None:
                member.size = opened.st_size
                _write_header(member)
                _send(fd, 0, member.size)
                _write(bytes(-member.size % _BLOCK))
            else:
                _write_sparse(fd, member, segments, opened.st_size)
        finally:
            posix.close(fd)
        if status.st_nlink > 1:
            self._first_names[identity] = own_name


def _write_header(member: tarfile.TarInfo) -> None:
    _write(member.tobuf(tarfile.PAX_FORMAT, *TEXT))


def _send(fd: int, offset: int, size: int) -> None:
    """A part of a file as its header announced it: cut if the file grew meanwhile, zeros if it shrank."""
    end = offset + size
    while offset < end:
        sent = posix.sendfile(1, fd, offset, min(end - offset, _SEND_BYTES))
        if not sent:
            zeros = min(end - offset, CHUNK_BYTES)
            _write(bytes(zeros))
            sent = zeros
        offset += sent


def _find_segments(fd: int, status: posix.stat_result) -> list[tuple[int, int]] | None:
    """(offset, size) of what a file holds; None if it is sent whole, since it has no holes worth the trouble.

    Source: SEEK_DATA and SEEK_HOLE, lseek(2).
    """
    if status.st_size - status.st_blocks * 512 < _HOLES_MIN_BYTES:
        return None
    segments: list[tuple[int, int]] = []
    end = 0
    while end < status.st_size and len(segments) < _SEGMENTS_MAX:
        try:
            start = posix.lseek(fd, end, posix.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            if error.errno == errno.EINVAL:  # a file system that does not tell
                return None
            raise
        end = min(posix.lseek(fd, start, posix.SEEK_HOLE), status.st_size)
        if start < end:
            segments.append((start, end - start))
    else:
        if end < status.st_size:  # too many: the rest is sent whole
            segments[-1] = (segments[-1][0], status.st_size - segments[-1][0])
    return segments


def _write_sparse(fd: int, member: tarfile.TarInfo, segments: list[tuple[int, int]], size: int) -> None:
    """In the form that GNU tar, bsdtar, Go and Python read ("PAX Format, Version 1.0", GNU tar manual)."""
    # An empty segment at the end says how long the file is, should a reader trust the map alone.
    pairs = [*segments, (size, 0)]
    numbers = [len(pairs), *(number for pair in pairs for number in pair)]
    held = "".join(f"{number}\n" for number in numbers).encode()
    held += bytes(-len(held) % _BLOCK)
    member.pax_headers = {
        **member.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": member.name,
        "GNU.sparse.realsize": str(size),
    }
    # Short and plain, so that no `path` follows in the header and overrides the name above.
    member.name = "GNUSparseFile.0/sparse"
    member.size = len(held) + sum(length for _, length in segments)
    _write_header(member)
    _write(held)
    for offset, length in segments:
        _send(fd, offset, length)
    _write(bytes(-member.size % _BLOCK))
