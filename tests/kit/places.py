"""Directories that containers of any user ids can enter."""

from __future__ import annotations

from pathlib import Path


def open_to_all(place: Path) -> None:
    """Let everybody enter and list a directory; what is above it, too, where nobody may so far."""
    for directory in (place, *place.parents):
        mode = directory.stat().st_mode & 0o7777
        if mode & 0o005 != 0o005:
            directory.chmod(mode | 0o055)
