"""Text of callers and containers on its way to a terminal."""

from __future__ import annotations


def plain(text: str) -> str:
    """What a terminal would obey (console_codes(4)) is written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
