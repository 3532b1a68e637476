"""Reading the files in which the kernel tells what there is: /proc, /sys, cgroups.

Some name what strangers have named: tasks, links, mount points. Such names are bytes of their choice, which need not be
UTF-8, and may hold all that Python takes for the end of a line but the newline itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOST_BYTES = 1 << 16
_ESCAPE = re.compile(r"\\([0-7]{3})")


def read_small(path: str | Path) -> str:
    """The text of a file that the kernel writes in one go; a tenth of what Path.read_text costs.

    Raises:
        OSError: as open(2) and read(2) have it, e.g. ENODEV of a cgroup that is being removed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MOST_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def read_mountinfo() -> str:
    """The mounts that this process sees, proc_pid_mountinfo(5); however many they are."""
    return Path("/proc/self/mountinfo").read_text(errors="surrogateescape")


def unescape(field: str) -> str:
    """A path of proc_pid_mountinfo(5), which has space, tab, newline and backslash as octal escapes."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def lines_of(text: str) -> list[str]:
    """What stands in each line; str.splitlines knows ten more ends of lines than the kernel."""
    return text.removesuffix("\n").split("\n") if text else []
