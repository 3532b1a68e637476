"""Protobuf's wire form of bytes, for messages that are too large to be copied into an object first.

Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

_LENGTH_DELIMITED = 2


def bytes_head(field: int, length: int) -> bytes:
    """What stands before the bytes of a field.

    Args:
        field: its number, 1 to 15.
        length: of the bytes.
    """
    head = bytearray((field << 3 | _LENGTH_DELIMITED,))
    while length > 0x7F:  # base 128, lowest digit first; all digits but the last have the top bit set
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)
