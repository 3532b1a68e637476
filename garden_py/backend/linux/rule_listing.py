"""What of the server's table is about one container. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection

_ELEMENTS = re.compile(r"elements = \{(.*?)\}", re.DOTALL)
_WORD = re.compile(r"[^\s\",:{}]+")


def pick_elements(listing: str, words: Collection[str]) -> str:
    """A listing of `nft list table` with, of the elements of its sets and maps, those alone that name one of words.

    What is left out is told by its number. Source: nft(8), sets and maps.
    """

    def pick(found: re.Match[str]) -> str:
        elements = [element.strip() for element in found[1].split(",")]
        own = [element for element in elements if set(_WORD.findall(element)) & set(words)]
        others = f"{len(elements) - len(own)} of others"
        return f"elements = {{ {', '.join(own)} }} # {others}"

    return _ELEMENTS.sub(pick, listing)
