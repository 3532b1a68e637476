"""Numbers and records in tar headers, from bytes that nobody vouches for. Pure.

Sources: pax(1p) "pax Extended Header", "ustar Interchange Format"; GNU tar manual, "Basic Tar Format", "Storing
Sparse Files".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from garden_py.backend.images.layer_failures import InvalidLayer

_NS: Final = 1_000_000_000
_TIME_MAX_S: Final = 1 << 40  # 36,000 years; beyond that file systems and Python do not follow
SEGMENTS_MAX: Final = 1 << 16


def header_number(field: bytes, what: str) -> int:
    """A number field: octal digits, or with the top bit set a binary number (GNU).

    Raises:
        InvalidLayer: it is neither.
    """
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if field[0] & 0x40 else value
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        return 0
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise InvalidLayer(f"a tar header's {what} is not a number: {field!r}")


def has_checksum(header: bytes) -> bool:
    """Whether a header of 512 bytes is one: its sum, with blanks for the sum itself, is what it says."""
    try:
        wanted = header_number(header[148:156], "checksum")
    except InvalidLayer:
        return False
    rest = header[:148] + b"        " + header[156:]
    # Some old writers summed signed bytes.
    return sum(rest) == wanted or sum(byte - (byte >> 7 << 8) for byte in rest) == wanted


def decimal(text: bytes, what: str) -> int:
    """A number of a pax record, never negative.

    Raises:
        InvalidLayer: it is none.
    """
    if text.isdigit() and len(text) < 20:
        return int(text)
    raise InvalidLayer(f"a pax header's {what} is not a number: {text[:40]!r}")


def time_ns(text: bytes) -> int:
    """A time of a pax record, seconds with a fraction, as nanoseconds; both may be negative.

    Raises:
        InvalidLayer: it is none.
    """
    sign, digits = (-1, text[1:]) if text.startswith(b"-") else (1, text)
    whole, _, fraction = digits.partition(b".")
    if not whole.isdigit() or len(whole) > 20 or (fraction and not fraction.isdigit()):
        raise InvalidLayer(f"a pax header's mtime is not a time: {text[:40]!r}")
    return sign * (int(whole) * _NS + int(fraction[:9].ljust(9, b"0")))


def checked_time_ns(ns: int) -> int:
    """The same time.

    Raises:
        InvalidLayer: no file system has it.
    """
    if abs(ns) > _TIME_MAX_S * _NS:
        raise InvalidLayer(f"a tar header's mtime is out of range: {ns // _NS} seconds")
    return ns


def pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keywords and values in the order of the header.

    Raises:
        InvalidLayer: it is not made of `LENGTH KEYWORD=VALUE<newline>`.
    """
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            # Some writers pad with zeros.
            if not data[at:].strip(b"\0"):
                return
            raise InvalidLayer("a pax header is malformed: a record has no length")
        end = at + int(digits)
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 1 or data[end - 1 : end] != b"\n" or not equals or not keyword:
            raise InvalidLayer("a pax header is malformed: a record does not end where it should")
        yield keyword, value
        at = end


def checked_segments(flat: list[int], stored_size: int, real_size: int) -> list[tuple[int, int]]:
    """The map of a sparse file as (offset, length) pairs, without empty ones.

    Args:
        flat: offset, length, offset, length, ...
        stored_size: bytes in the archive.
        real_size: of the file.

    Raises:
        InvalidLayer: they do not ascend, lie beyond the file's end, or are not what is stored.
    """
    if len(flat) % 2 or len(flat) > 2 * SEGMENTS_MAX:
        raise InvalidLayer("a sparse file's map is malformed")
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    end = 0
    for offset, length in pairs:
        if offset < end or length < 0:
            raise InvalidLayer("a sparse file's map is not in order")
        end = offset + length
    if end > real_size or sum(length for _, length in pairs) != stored_size:
        raise InvalidLayer("a sparse file's map does not fit its content")
    return [(offset, length) for offset, length in pairs if length]
