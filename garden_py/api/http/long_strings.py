"""JSON strings as they come: what a client sends to stdin in one message may be of any size. RFC 8259 §7."""

from __future__ import annotations

import codecs
import json
import re
from typing import Final

_BACKSLASH: Final = ord("\\")
_REST_OF_STRING: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_ESCAPE_BYTES: Final = 6  # \uXXXX
_PAIR_BYTES: Final = 12  # two halves of a character beyond the first 65,536
_NEAR_BYTES: Final = 64  # where a row of backslashes mostly begins
_HIGH_HALF: Final = re.compile(rb"\\u[dD][89abAB]")


class StringPieces:
    """The inside of one string, from behind its first quote."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, buffer: bytearray) -> tuple[str, bool]:
        """Move what has come of the string out of the buffer, its last quote included.

        Returns:
            The text, and whether that was its end. Up to 11 bytes stay that may be a part of something.

        Raises:
            ValueError: it is no JSON string.
        """
        behind = find_end_of_string(buffer, 0)
        end = behind - 1 if behind else _find_whole(buffer)
        text: str = json.loads(f'"{self._decoder.decode(buffer[:end], final=bool(behind))}"')
        del buffer[: behind or end]
        return text, bool(behind)


def find_end_of_string(buffer: bytearray, at: int) -> int:
    """The offset behind the quote that ends a string, from anywhere in it; 0 if that is not there yet."""
    while (quote := buffer.find(b'"', at)) >= 0:
        if not _is_escaped(buffer, quote):
            return quote + 1
        # Where there is one of these there are more, and the next search would soon end again.
        rest = _REST_OF_STRING.match(buffer, quote + 1)
        at = quote + 1 if rest is None else rest.end()
    return 0


def _find_whole(buffer: bytearray) -> int:
    """The offset behind the last escape that is there as a whole, both halves of a pair counting as one."""
    size = len(buffer)
    for at in range(max(0, size - _PAIR_BYTES + 1), size):
        if buffer[at] != _BACKSLASH or _is_escaped(buffer, at):
            continue
        if at + _length_of_escape(buffer, at) > size:
            return at
    return size


def _length_of_escape(buffer: bytearray, at: int) -> int:
    """How long an escape may be, by what is there of it."""
    if _HIGH_HALF.match(buffer, at):
        return _PAIR_BYTES
    return _ESCAPE_BYTES if buffer.startswith(b"u", at + 1) else 2


def _is_escaped(buffer: bytearray, at: int) -> bool:
    """Whether an odd number of backslashes is before the offset."""
    before = buffer[max(0, at - _NEAR_BYTES) : at]
    if not before.rstrip(b"\\"):
        before = buffer[:at]
    return bool((len(before) - len(before.rstrip(b"\\"))) % 2)
