"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

_SIZE: Final = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes: `64M`, `1GiB`, `1.5g`, `65536`. Units are powers of 1024, with or without "i" and "B".

    Raises:
        ValueError: says what would be right.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or e.g. 64M, 1GiB")
    number = Fraction(match[1])  # a float has 53 bits
    size = int(number * _UNITS[match[2].lower()])
    if number and not size:  # 0 means unlimited in most places
        raise ValueError(f"{text!r} is less than a byte")
    return size
