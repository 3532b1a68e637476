"""A tar archive as a stream of entries: ustar, pax and GNU, from bytes that nobody vouches for.

The standard library's tarfile is not used: it holds a pax header of any size in memory, keeps every entry, asks for
names as text, and costs three times as much for each entry.

Sources: pax(1p); GNU tar manual, "Basic Tar Format"; OCI image-spec 1.1 layer.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from garden_py.backend.images.layer_failures import InvalidLayer, LayerTooLarge, shown
from garden_py.backend.images.tar_numbers import (
    SEGMENTS_MAX,
    checked_segments,
    checked_time_ns,
    decimal,
    has_checksum,
    header_number,
    pax_records,
    time_ns,
)

BLOCK: Final = 512
EXTENSION_MAX_BYTES: Final = 1 << 20  # of a pax header or a long name
_EXTENSIONS_MAX: Final = 16  # before one entry
_SIZE_MAX: Final = (1 << 63) - 1
_ID_MAX: Final = (1 << 32) - 2  # 2^32 - 1 means "no change" to chown(2)
_ZEROS: Final = bytes(BLOCK)
_XATTR: Final = b"SCHILY.xattr."  # as GNU tar, star and Go write extended attributes


class Kind(Enum):
    """What an entry is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARD_LINK = "hard link"
    FIFO = "fifo"
    DEVICE = "device"


_KINDS: Final = {
    b"\0": Kind.FILE, b"0": Kind.FILE, b"7": Kind.FILE, b"S": Kind.FILE, b"1": Kind.HARD_LINK, b"2": Kind.SYMLINK,
    b"3": Kind.DEVICE, b"4": Kind.DEVICE, b"5": Kind.DIRECTORY, b"6": Kind.FIFO,
}  # fmt: skip


@dataclass(slots=True)
class Entry:
    """One entry; names are bytes as the archive has them.

    Attributes:
        mode: permission bits with setuid, setgid and sticky.
        mtime_ns: since the epoch.
        size: of the file in bytes, holes included; 0 for what is no file.
        stored_size: of its content in the archive.
        target: of a symbolic or hard link.
        segments: of a sparse file, (offset, length) of what is stored, ascending; None: it has no holes.
        xattrs: extended attributes by name.
    """

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    stored_size: int
    target: bytes
    segments: list[tuple[int, int]] | None = None
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class PlainStream:
    """Pieces of any size as a stream of which a known number of bytes is taken."""

    def __init__(self, pieces: Iterator[bytes], *, max_bytes: int) -> None:
        """Take from pieces.

        Args:
            pieces: not empty, each; raising what they like.
            max_bytes: LayerTooLarge when more than that have come.
        """
        self._pieces = pieces
        self._piece = b""
        self._at = 0
        self._come = 0
        self._max_bytes = max_bytes

    def _next(self) -> bool:
        self._piece, self._at = next(self._pieces, b""), 0
        self._come += len(self._piece)
        if self._come > self._max_bytes:
            raise LayerTooLarge("bytes", self._max_bytes)
        return bool(self._piece)

    def block(self) -> bytes:
        """The next 512 bytes; fewer only at the end, none after it."""
        at = self._at
        block = self._piece[at : at + BLOCK]
        self._at = at + len(block)
        while len(block) < BLOCK and self._next():
            more = self._piece[: BLOCK - len(block)]
            self._at = len(more)
            block += more
        return block

    def take(self, count: int) -> Iterator[memoryview]:
        """The next count bytes in pieces.

        Raises:
            InvalidLayer: there are fewer.
        """
        while count:
            if self._at >= len(self._piece) and not self._next():
                raise InvalidLayer("the layer's tar archive is truncated: it ends within an entry")
            piece = memoryview(self._piece)[self._at : self._at + count]
            self._at += len(piece)
            count -= len(piece)
            yield piece

    def drain(self) -> None:
        """Take what is left."""
        while self._next():
            pass


@dataclass(slots=True)
class _Extensions:
    """What precedes an entry and overrides its header."""

    count: int = 0
    name: bytes | None = None
    target: bytes | None = None
    pax: dict[bytes, bytes] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: list[int] = field(default_factory=list)  # offsets and lengths of the pax form 0.0


class TarReader:
    """Entries of an archive, one after the other; an entry's content is taken before the next entry or skipped.

    Raises, from `__next__` and `content`:
        InvalidLayer: it is no tar archive, is damaged, or ends early. As for GNU tar a single block of zeros ends an
            archive, so does the end of the stream where a header would begin, and what comes behind does not matter.
    """

    def __init__(self, stream: PlainStream) -> None:
        self._stream = stream
        self._content_bytes = 0  # not taken yet, of the current entry
        self._padding_bytes = 0
        self._is_first = True

    def __iter__(self) -> Iterator[Entry]:
        return self

    def __next__(self) -> Entry:
        extensions = _Extensions()
        while True:
            self._skip_rest()
            header = self._header()
            kind = header[156:157]
            if kind in (b"x", b"L", b"K", b"g"):
                self._extend(extensions, kind, header)
            elif kind != b"V":  # a volume's label is not part of the tree
                return self._entry(header, extensions)

    def content(self) -> Iterator[memoryview]:
        """What is stored of the current entry, in pieces."""
        count, self._content_bytes = self._content_bytes, 0
        return self._stream.take(count)

    def _skip_rest(self) -> None:
        rest, self._content_bytes, self._padding_bytes = self._content_bytes + self._padding_bytes, 0, 0
        for _ in self._stream.take(rest):
            pass

    def _header(self) -> bytes:
        header = self._stream.block()
        if header == _ZEROS[: len(header)]:
            if self._is_first and not header:
                raise InvalidLayer("the layer is empty, not a tar archive")
            self._stream.drain()
            raise StopIteration
        if len(header) < BLOCK:
            raise InvalidLayer("the layer's tar archive is truncated: it ends within a header")
        if not has_checksum(header):
            place = "is not a tar archive" if self._is_first else "has a damaged tar header"
            raise InvalidLayer(f"the layer {place}: a header's checksum is wrong")
        self._is_first = False
        return header

    def _announce(self, size: int) -> None:
        self._content_bytes, self._padding_bytes = size, -size % BLOCK

    def _extend(self, extensions: _Extensions, kind: bytes, header: bytes) -> None:
        size = header_number(header[124:136], "size")
        if not 0 <= size <= EXTENSION_MAX_BYTES:
            raise InvalidLayer(f"a tar extension header has {size} bytes; {EXTENSION_MAX_BYTES} are allowed")
        extensions.count += 1
        if extensions.count > _EXTENSIONS_MAX:
            raise InvalidLayer(f"more than {_EXTENSIONS_MAX} extension headers precede an entry")
        self._announce(size)
        if kind == b"g":
            return  # holds for no single entry; what writes it into layers says nothing of use there
        data = b"".join(self.content())
        if kind == b"L":
            extensions.name = data.split(b"\0", 1)[0]
        elif kind == b"K":
            extensions.target = data.split(b"\0", 1)[0]
        else:
            _read_pax(extensions, data)

    def _entry(self, header: bytes, extensions: _Extensions) -> Entry:
        pax, form = extensions.pax, header[156:157]
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or extensions.name or _header_name(header)
        kind = _KINDS.get(form)
        if kind is None:
            raise InvalidLayer(f"{shown(name)}: tar entries of the type {form!r} are not supported")
        if kind is Kind.FILE and form != b"S" and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # as before POSIX
        size = _pax_number(pax, b"size", header[124:136])
        if not 0 <= size <= _SIZE_MAX:
            raise InvalidLayer(f"{shown(name)}: a size of {size} bytes cannot be")
        # Links and directories may state a size, but never have content (pax(1p), typeflag).
        self._announce(size if kind is Kind.FILE else 0)
        target = pax.get(b"linkpath") or extensions.target or header[157:257].split(b"\0", 1)[0]
        if b"\0" in name or b"\0" in target:
            raise InvalidLayer(f"{shown(name)}: a name holds a zero byte")
        entry = Entry(
            name,
            kind,
            header_number(header[100:108], "mode") & 0o7777,
            _id(_pax_number(pax, b"uid", header[108:116]), name),
            _id(_pax_number(pax, b"gid", header[116:124]), name),
            checked_time_ns(
                time_ns(pax[b"mtime"])
                if b"mtime" in pax
                else header_number(header[136:148], "mtime") * 1_000_000_000
            ),
            self._content_bytes,
            self._content_bytes,
            target,
            xattrs=extensions.xattrs,
        )
        if kind is Kind.FILE:
            self._find_holes(entry, header, extensions)
        return entry

    # --- sparse files: four forms, GNU tar manual "Storing Sparse Files"

    def _find_holes(self, entry: Entry, header: bytes, extensions: _Extensions) -> None:
        pax = extensions.pax
        if header[156:157] == b"S":
            flat = self._old_gnu_map(header)
            entry.size = header_number(header[483:495], "real size")
        elif b"GNU.sparse.major" in pax:
            if (pax[b"GNU.sparse.major"], pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise InvalidLayer(f"{shown(entry.name)}: this form of sparse files is not known")
            flat = self._map_before_content()
            entry.stored_size = self._content_bytes
            entry.size = decimal(pax.get(b"GNU.sparse.realsize", b""), "GNU.sparse.realsize")
        elif b"GNU.sparse.size" in pax:
            numbers = pax.get(b"GNU.sparse.map", b"")
            flat = [decimal(text, "GNU.sparse.map") for text in numbers.split(b",")] if numbers else []
            flat = flat or extensions.sparse
            entry.size = decimal(pax[b"GNU.sparse.size"], "GNU.sparse.size")
        else:
            return
        if not 0 <= entry.size <= _SIZE_MAX:
            raise InvalidLayer(f"{shown(entry.name)}: a size of {entry.size} bytes cannot be")
        entry.segments = checked_segments(flat, entry.stored_size, entry.size)

    def _old_gnu_map(self, header: bytes) -> list[int]:
        flat: list[int] = []
        block, at, count, more_at = header, 386, 4, 482
        while True:
            for start in range(at, at + 24 * count, 24):
                if not block[start : start + 24].strip(b"\0 "):
                    break
                flat.append(header_number(block[start : start + 12], "sparse offset"))
                flat.append(header_number(block[start + 12 : start + 24], "sparse length"))
            if not block[more_at]:
                return flat
            if len(flat) > 2 * SEGMENTS_MAX:
                raise InvalidLayer("a sparse file's map is too long")
            block, at, count, more_at = self._stream.block(), 0, 21, 504
            if len(block) < BLOCK:
                raise InvalidLayer("the layer's tar archive is truncated: it ends within a sparse file's map")

    def _map_before_content(self) -> list[int]:
        """The map that the content begins with: a count and pairs, one number a line, padded to blocks."""
        numbers: list[int] = []
        rest, wanted = b"", 1
        while len(numbers) < wanted:
            if self._content_bytes < BLOCK:
                raise InvalidLayer("a sparse file's map is cut")
            self._content_bytes -= BLOCK
            rest += b"".join(self._stream.take(BLOCK))
            *lines, rest = rest.split(b"\n")
            if not lines:
                raise InvalidLayer("a sparse file's map is not made of lines")
            numbers += [decimal(line, "sparse map") for line in lines[: wanted - len(numbers)]]
            if len(numbers) == 1 == wanted:
                wanted += 2 * min(numbers[0], SEGMENTS_MAX + 1)
                numbers += [decimal(line, "sparse map") for line in lines[1:wanted]]
        return numbers[1:]


def _read_pax(extensions: _Extensions, data: bytes) -> None:
    for keyword, value in pax_records(data):
        if keyword.startswith(_XATTR):
            extensions.xattrs[keyword[len(_XATTR) :]] = value
        elif keyword in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            extensions.sparse.append(decimal(value, keyword.decode()))
        else:
            extensions.pax[keyword] = value


def _pax_number(pax: dict[bytes, bytes], keyword: bytes, header_field: bytes) -> int:
    if (text := pax.get(keyword)) is not None:
        return decimal(text, keyword.decode())
    return header_number(header_field, keyword.decode())


def _id(value: int, name: bytes) -> int:
    if not 0 <= value <= _ID_MAX:
        raise InvalidLayer(f"{shown(name)}: {value} is not a user or group id")
    return value


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name
