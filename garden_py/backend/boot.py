"""Which boot of the machine the state directory is of.

After another boot nothing of what the journal knows still runs, and pids in it may be anybody's. A file, not a row:
it must be readable when a power cut has torn the journal.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_FILE = "boot_id"


@cache
def read_boot_id() -> str:
    """The running kernel's id, made anew at each boot. Source: random(4), /proc/sys/kernel/random/boot_id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def was_rebooted(state_dir: Path) -> bool:
    """Whether the state directory was last used in another boot; False for a new one."""
    try:
        return (state_dir / _FILE).read_text().strip() != read_boot_id()
    except FileNotFoundError:
        return False


def remember_boot(state_dir: Path) -> None:
    """Write the running boot down. To be called once nothing of an earlier one is taken for alive any more.

    Raises:
        OSError: it cannot be written. Then no container may be made: the next server would take it for one of before.
    """
    path = state_dir / _FILE
    if path.exists() and path.read_text().strip() == read_boot_id():
        return
    try:
        _replace(path)
    except OSError:
        if not path.exists():
            raise
        # On a full disk there is no room for another file, but this one has its block, and ids have one length.
        _overwrite(path)


def _replace(path: Path) -> None:
    new = path.with_suffix(".new")
    try:
        with new.open("w") as file:
            file.write(f"{read_boot_id()}\n")
            file.flush()
            # Lost in a power cut, it would be missed at the very start that it is for.
            os.fsync(file.fileno())
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _overwrite(path: Path) -> None:
    with path.open("r+") as file:
        file.write(f"{read_boot_id()}\n")
        file.flush()
        os.fsync(file.fileno())
