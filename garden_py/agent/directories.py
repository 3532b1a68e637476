"""Directories made on behalf of a user, in the forked child while it is still root of the container."""

from __future__ import annotations

import posix

from garden_py.agent import syscalls

_MODE = 0o755


def make_directories(path: bytes, *, uid: int, gid: int) -> None:
    """Make the directory and all its missing parents, mode 0755, owned by uid and gid.

    Root's rights decide where, so it works below directories the user may not write; what exists keeps owner
    and mode. Afterwards the process creates files as uid and gid, so call it once, before the final switch.

    Args:
        path: absolute; symbolic links are followed and end inside the container's root in any case.
        uid: owner of what is made.
        gid: group of what is made.

    Raises:
        OSError: a component is no directory, or cannot be made.
    """
    if _is_directory(path):
        return
    syscalls.act_on_files_as(uid, gid)
    made = b""
    for component in path.split(b"/"):
        if not component:
            continue
        made += b"/" + component
        try:
            posix.mkdir(made, _MODE)
        except FileExistsError:
            continue
        except OSError:
            # A read-only or foreign file system refuses before it says that the directory exists.
            if not _is_directory(made):
                raise
    # Says ENOTDIR if the last component is a file.
    posix.close(posix.open(path, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC))


def _is_directory(path: bytes) -> bool:
    try:
        posix.close(posix.open(path, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC))
    except OSError:
        return False
    return True
