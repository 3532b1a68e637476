"""The weight of a container on cgroup v2, while a smaller one is in force.

A container that is over its entitlement gets a part of its weight (docs/decisions/0021-cpu-throttling.md). Its own is
kept beside it as an extended attribute of its cgroup, so it lives exactly as long as what it describes, over restarts
of the server, and nothing in the container can read or write it: names that begin with `trusted.` are the host's
root's (xattr(7)).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from garden_py.backend.cgroup.layout import ContainerCgroup

_OWN_WEIGHT = "trusted.garden.weight"


def read_weight(directory: Path) -> int:
    """The weight of a group, of which perhaps only a part is in force.

    Raises:
        FileNotFoundError: the group is gone.
    """
    own = _own_weight(directory)
    return int((directory / "cpu.weight").read_text()) if own is None else own


def is_scaled(cgroup: ContainerCgroup) -> bool:
    """Whether only a part of a container's weight is in force; always False on v1."""
    return cgroup.hierarchies.version == 2 and _own_weight(cgroup.directory("cpu")) is not None


def scale(cgroup: ContainerCgroup, weight: int) -> None:
    """Put a part of a container's weight in force."""
    directory = cgroup.directory("cpu")
    rescale(cgroup, read_weight(directory))
    (directory / "cpu.weight").write_text(str(weight))


def rescale(cgroup: ContainerCgroup, own_weight: int) -> None:
    """Change the weight that a part is in force of; the part follows when it is next set."""
    os.setxattr(cgroup.directory("cpu"), _OWN_WEIGHT, str(own_weight).encode())


def unscale(cgroup: ContainerCgroup) -> None:
    """Put all of a container's weight in force again; twice is fine."""
    directory = cgroup.directory("cpu")
    own = _own_weight(directory)
    if own is not None:
        (directory / "cpu.weight").write_text(str(own))
        os.removexattr(directory, _OWN_WEIGHT)


def _own_weight(directory: Path) -> int | None:
    try:
        return int(os.getxattr(directory, _OWN_WEIGHT))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise
