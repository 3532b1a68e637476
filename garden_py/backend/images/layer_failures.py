"""Why a layer could not be unpacked, in a form that crosses a process boundary."""

from __future__ import annotations

import errno
from typing import ClassVar

_SHOWN_MAX = 120  # characters of a name in a message
_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT))
# What the kernel says to a tree that cannot be, rather than to a host that is ill.
_OF_THE_LAYER = frozenset(
    (
        errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.EMLINK,
        errno.EPERM, errno.EEXIST, errno.E2BIG, errno.ERANGE, errno.EFBIG,
    )
)  # fmt: skip


class LayerError(Exception):
    """A layer was not unpacked; what lies in the target is part of a tree at most.

    Attributes:
        code: stable; what went wrong.
        facts: numbers and texts for programs.
    """

    code: ClassVar[str] = "host_fault"

    def __init__(self, message: str, **facts: str | int) -> None:
        super().__init__(message)
        self.facts = facts


class InvalidLayer(LayerError):
    """The bytes are not what they should be, or describe a tree that cannot be or must not be."""

    code = "image_invalid"


class LayerTooLarge(LayerError):
    """A limit was reached.

    Attributes:
        facts: `limit` names it (bytes, disk_bytes, entries, path_depth, memory), `value` is its value.
    """

    code = "image_too_large"

    def __init__(self, limit: str, value: int) -> None:
        super().__init__(
            f"the layer exceeds the limit of {value} {limit.replace('_', ' ')}", limit=limit, value=value
        )


class NoSpace(LayerError):
    """The store's file system is full, or a quota on it is used up."""

    code = "no_space"


class UnpackFault(LayerError):
    """The host refused something that it should not have refused."""

    code = "host_fault"


def shown(name: bytes) -> str:
    """A name of a layer as a message may carry it: printable, quoted, and cut."""
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…")


def failure_of(error: OSError, name: bytes) -> LayerError:
    """What a system call's failure while placing an entry means."""
    problem = f"{shown(name)}: {error.strerror}"
    if error.errno in _NO_SPACE:
        return NoSpace(problem)
    if error.errno in _OF_THE_LAYER:
        return InvalidLayer(problem)
    return UnpackFault(problem)
