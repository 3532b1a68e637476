"""Turning compressed pieces into plain ones, never more than about a megabyte at a time.

Sources: RFC 1952 (gzip), RFC 8878 (Zstandard), OCI image-spec 1.1 layer.md "+gzip Media Types", "+zstd Media Types".
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, Protocol

import zstandard

from garden_py.backend.images.layer_failures import InvalidLayer

PLAIN_CHUNK_BYTES: Final = 256 << 10
DETECT_BYTES: Final = 4

_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31  # zlib.h: 16 for the gzip format + 15 for its window
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE_TAIL: Final = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f, RFC 8878 section 3.1.2
_ZSTD_WINDOW_MAX_BYTES: Final = 128 << 20  # what zstd(1) decodes without --long
_ZSTD_BLOCK_MAX_BYTES: Final = 128 << 10  # RFC 8878 section 3.1.1.2.4
_ZSTD_BLOCKS_AT_ONCE: Final = 8
_RAW_BLOCK, _RLE_BLOCK, _COMPRESSED_BLOCK = 0, 1, 2


class Decompressor(Protocol):
    """A stream's decompression."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes that follow from the next compressed ones, in bounded pieces."""

    def finish(self) -> None:
        """There are no more compressed bytes.

        Raises:
            InvalidLayer: but there should be.
        """


def decompressor_for(head: bytes) -> Decompressor:
    """By the stream's first DETECT_BYTES bytes (fewer if there are no more)."""
    if head.startswith(_GZIP_MAGIC):
        return _Gzip()
    if head == _ZSTD_MAGIC or _is_skippable(head):
        return _Zstd()
    return Plain()


def _is_skippable(head: bytes) -> bool:
    return head[1:4] == _ZSTD_SKIPPABLE_TAIL and head[0] & 0xF0 == 0x50


class Plain:
    """Nothing to do."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The same."""
        yield data

    def finish(self) -> None:
        """Any end is one."""


class _Gzip:
    """Members one after the other; zeros behind the last are padding, as for gzip(1)."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP_WBITS)
        self._is_between = False
        self._is_padding = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._is_between:
                self._is_padding = self._is_padding or data[0] == 0
                if self._is_padding:
                    if data.strip(b"\0"):
                        raise InvalidLayer("the layer's gzip stream has something else behind its end")
                    return
                self._member, self._is_between = zlib.decompressobj(_GZIP_WBITS), False
            try:
                yield from self._inflate(data)
            except zlib.error as error:
                raise InvalidLayer(f"the layer's gzip stream is damaged: {error}") from error
            data = self._member.unused_data

    def _inflate(self, data: bytes) -> Iterator[bytes]:
        while True:
            plain = self._member.decompress(data, PLAIN_CHUNK_BYTES)
            if plain:
                yield plain
            if self._member.eof:
                self._is_between = True
                return
            data = self._member.unconsumed_tail
            # All input may be taken while output is left: then the piece was as long as it could be.
            if not data and len(plain) < PLAIN_CHUNK_BYTES:
                return

    def finish(self) -> None:
        if not self._is_between:
            raise InvalidLayer("the layer's gzip stream is truncated")


class _Zstd:
    """Frames one after the other, skippable ones included.

    The library decodes whatever it is given at once, and 64 KiB may stand for 2 GiB. So it is given a few blocks at a
    time, each of which stands for 128 KiB at most. Knowing where frames end also tells a whole stream from a cut one.
    """

    def __init__(self) -> None:
        self._library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._carry = b""  # the beginning of a header
        self._left = 0  # bytes of a header, block or checksum whose size is known
        self._has_checksum = False
        self._is_last_block = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        data = self._carry + data
        start = at = blocks = 0
        while True:
            step = min(self._left, len(data) - at)
            at += step
            self._left -= step
            if self._frame is None:
                start = at
            if self._left:
                break
            if self._is_last_block and not self._has_checksum:
                yield self._decode(data[start:at])
                self._end_frame()
                start, blocks = at, 0
                continue
            if blocks == _ZSTD_BLOCKS_AT_ONCE:
                yield self._decode(data[start:at])
                start, blocks = at, 0
            if not self._announce(data[at : at + 18]):
                break
            blocks += 1
        if start < at:
            yield self._decode(data[start:at])
        self._carry = data[at:]

    def _announce(self, head: bytes) -> bool:
        """Learn what comes next from its first bytes; False: there are too few of them."""
        if self._frame is None:
            return self._announce_frame(head)
        if self._is_last_block:
            self._left, self._has_checksum = 4, False
            return True
        if len(head) < 3:
            return False
        header = int.from_bytes(head[:3], "little")
        kind, size = header >> 1 & 3, header >> 3
        if size > _ZSTD_BLOCK_MAX_BYTES or kind not in (_RAW_BLOCK, _RLE_BLOCK, _COMPRESSED_BLOCK):
            raise InvalidLayer("the layer's zstd stream is damaged: a block cannot be")
        self._is_last_block = bool(header & 1)
        self._left = 3 + (1 if kind == _RLE_BLOCK else size)
        return True

    def _announce_frame(self, head: bytes) -> bool:
        if len(head) < 8:
            # The smallest frame has 4 bytes of magic, 2 of header and a block of 3.
            return False
        if _is_skippable(head):
            self._left = 8 + int.from_bytes(head[4:8], "little")
            return True
        if not head.startswith(_ZSTD_MAGIC):
            raise InvalidLayer("the layer's zstd stream has something else behind a frame")
        descriptor = head[4]
        is_single_segment = bool(descriptor >> 5 & 1)
        content_size_bytes = (1 if is_single_segment else 0, 2, 4, 8)[descriptor >> 6]
        dictionary_bytes = (0, 1, 2, 4)[descriptor & 3]
        self._has_checksum, self._is_last_block = bool(descriptor >> 2 & 1), False
        self._left = 5 + (not is_single_segment) + dictionary_bytes + content_size_bytes
        self._frame = self._library.decompressobj()
        return True

    def _decode(self, data: bytes) -> bytes:
        assert self._frame is not None
        try:
            return self._frame.decompress(data)
        except zstandard.ZstdError as error:
            raise InvalidLayer(f"the layer's zstd stream is damaged: {error}") from error

    def _end_frame(self) -> None:
        if self._frame is None or not self._frame.eof:
            raise InvalidLayer("the layer's zstd stream is damaged: a frame does not end where it should")
        self._frame, self._is_last_block = None, False

    def finish(self) -> None:
        if self._frame is not None or self._left or self._carry:
            raise InvalidLayer("the layer's zstd stream is truncated")
