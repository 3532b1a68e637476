"""The environment of a process and where its executable may lie. Pure."""

from __future__ import annotations

_ROOT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_USER_PATH = b"/usr/local/bin:/usr/bin:/bin"


def build_environment(assignments: list[bytes], *, uid: int, user: str, home: bytes) -> dict[bytes, bytes]:
    """The final environment, in order.

    Args:
        assignments: `NAME=value` in the caller's order; of a repeated name the later value wins and the first
            position stays.
        uid: decides the default PATH.
        user: the user string of the spec; verbatim the default USER, `root` if empty.
        home: the default HOME.

    Returns:
        The assignments, then those of PATH, USER and HOME that were missing; nothing else.
    """
    environment = {}
    for assignment in assignments:
        name, _, value = assignment.partition(b"=")
        environment[name] = value
    environment.setdefault(b"PATH", _ROOT_PATH if uid == 0 else _USER_PATH)
    environment.setdefault(b"USER", user.encode("utf-8") or b"root")
    environment.setdefault(b"HOME", home)
    return environment


def executable_candidates(name: bytes, path: bytes) -> list[bytes]:
    """The paths to try, in order: the name itself if it has a slash, else one for every element of PATH.

    An empty element means the working directory, execvp(3).
    """
    if b"/" in name:
        return [name]
    return [(directory or b".") + b"/" + name for directory in path.split(b":")]
