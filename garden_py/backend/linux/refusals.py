"""What the kernel's refusals mean, where its own words do not say it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from garden_py.backend.cgroup.layout import WORK, ContainerCgroup
from garden_py.backend.cgroup.stats import read_usage
from garden_py.model.errors import LimitRefused

MEMORY_FIELD = "limits.memory_bytes"


@contextmanager
def telling_memory_in_use(cgroup: ContainerCgroup, leaf: tuple[str, ...] = (WORK,)) -> Iterator[None]:
    """Say how much is in use where a limit on memory is refused as busy: cgroup v1, when no more can be reclaimed.

    Args:
        cgroup: of the container.
        leaf: the group of it whose limit is changed.

    Source: kernel docs, cgroup-v1/memory.rst §4.
    """
    try:
        yield
    except LimitRefused as refused:
        cause = refused.__cause__
        if refused.field != MEMORY_FIELD or not isinstance(cause, OSError) or cause.errno != errno.EBUSY:
            raise
        in_use = read_usage(cgroup, leaf).memory_bytes
        raise LimitRefused(MEMORY_FIELD, f"is below the {in_use} bytes in use") from refused
