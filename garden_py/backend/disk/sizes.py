"""How much disk space an image takes that is a plain directory: looked at once, and again when that changes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

_KEPT_MAX = 256
_known: dict[tuple[str, int, int], asyncio.Future[int]] = {}


async def directory_bytes(directory: Path) -> int:
    """Disk space of all below a directory on its file system, hard links counted once.

    What is known is used again while the directory itself has not changed; changes deep inside are not noticed.
    """
    found = os.stat(directory)
    key = (str(directory), found.st_ino, found.st_mtime_ns)
    if key not in _known:
        while len(_known) >= _KEPT_MAX:
            _known.pop(next(iter(_known)))
        walk = asyncio.ensure_future(asyncio.to_thread(_walk, str(directory), found.st_dev))
        _known[key] = walk  # one walk, however many ask at the same time
        walk.add_done_callback(lambda done: _forget_failure(key, done))
    known = _known[key]
    return known.result() if known.done() else await asyncio.shield(known)


def _forget_failure(key: tuple[str, int, int], done: asyncio.Future[int]) -> None:
    if done.cancelled() or done.exception() is not None:
        _known.pop(key, None)


def _walk(top: str, device: int) -> int:
    total, seen, todo = 0, set[int](), [top]
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except OSError:
            continue  # gone, or not to be read: then it is not shared either
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if found.st_dev != device or (found.st_nlink > 1 and found.st_ino in seen):
                continue
            if entry.is_dir(follow_symlinks=False):
                todo.append(entry.path)
            elif found.st_nlink > 1:
                seen.add(found.st_ino)
            total += found.st_blocks * 512
    return total
