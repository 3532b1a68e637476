"""What a file system has to offer to be counted and limited by directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """Limits of one volume; 0: none.

    Attributes:
        bytes: of disk space.
        inodes: files, directories and whatever else has an inode.
    """

    bytes: int = 0
    inodes: int = 0


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What one volume takes; inodes is 0 where they are not counted."""

    bytes: int
    inodes: int = 0


class Driver(Protocol):
    """One way to count and limit directories. Paths are those of volumes.

    Everything raises OSError as the kernel gives it.
    """

    @property
    def name(self) -> str:
        """For people."""

    @property
    def counts_inodes(self) -> bool:
        """Whether inodes can be limited."""

    def make(self, volume: Path) -> None:
        """Make an empty volume, not limited."""

    def limit(self, volume: Path, limits: DiskLimits) -> None:
        """Replace its limits, also below what it takes already: then only more is refused."""

    def limits(self, volume: Path) -> DiskLimits:
        """Those in force."""

    def use(self, volume: Path) -> DiskUse:
        """What it takes now, what has not been written out yet included."""

    def remove(self, volume: Path) -> bool:
        """Remove it with all that is in it; False: its limits are gone, and the directory is still to be deleted."""


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of a directory, which is no link."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
