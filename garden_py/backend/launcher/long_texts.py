"""Texts that are too long for a frame, as rules of many lines are: they travel beside it, each in a file in memory."""

from __future__ import annotations

import os
from typing import Any

_LONG_CHARACTERS = 64 << 10  # several of these fit a frame (wire.MAX_PAYLOAD), also if each takes four bytes
_MARK = "@text"
_READ_BYTES = 1 << 20


def put_out(value: Any, fds: list[int]) -> Any:
    """A value whose long texts are in files.

    Args:
        value: of dicts, lists and what is in them.
        fds: the files' descriptors are appended; the caller's to close.

    Source: memfd_create(2).
    """
    match value:
        case str() if len(value) > _LONG_CHARACTERS:
            fd = os.memfd_create("long-text", os.MFD_CLOEXEC)
            fds.append(fd)
            with open(fd, "wb", closefd=False) as file:
                file.write(value.encode())
            return {_MARK: len(fds) - 1}
        case dict():
            return {key: put_out(each, fds) for key, each in value.items()}
        case list():
            return [put_out(each, fds) for each in value]
        case _:
            return value


def take_in(value: Any, fds: list[int]) -> Any:
    """The inverse, with the descriptors as they have come; those of texts are taken out of the list, and closed."""
    places: set[int] = set()
    found = _take_in(value, fds, places)
    for place in sorted(places, reverse=True):
        os.close(fds.pop(place))
    return found


def _take_in(value: Any, fds: list[int], places: set[int]) -> Any:
    match value:
        case dict() if _MARK in value:
            places.add(value[_MARK])
            return _read(fds[value[_MARK]])
        case dict():
            return {key: _take_in(each, fds, places) for key, each in value.items()}
        case list():
            return [_take_in(each, fds, places) for each in value]
        case _:
            return value


def _read(fd: int) -> str:
    parts, offset = [], 0
    while data := os.pread(fd, _READ_BYTES, offset):
        parts.append(data)
        offset += len(data)
    return b"".join(parts).decode()
