"""Moving containers between those within and those over their CPU entitlement, and dividing the processors.

v1: processes go to the container's twin in the cpu hierarchy, and nowhere else: memory and tasks stay counted and
limited where they were (Garden statements CT1, CT2). v2 has one hierarchy, so nothing moves; weights are scaled
(docs/decisions/0021-cpu-throttling.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from garden_py.backend.cgroup.layout import (
    BAD,
    GOOD,
    WORK,
    ContainerCgroup,
    Hierarchies,
    throttled_parent_of,
)
from garden_py.backend.cgroup.weight import is_scaled, read_weight, scale, unscale
from garden_py.model.cpu import Balance, scaled_weights

_PASSES = 20


def is_throttled(cgroup: ContainerCgroup) -> bool:
    """Whether a container is treated as one over its entitlement, as the kernel has it."""
    if cgroup.hierarchies.version == 2:
        return is_scaled(cgroup)
    return any(_pids(twin) for _, twin in _pairs(cgroup))


def can_throttle(cgroup: ContainerCgroup) -> bool:
    """Whether a container was made so that it can be throttled."""
    return cgroup.hierarchies.version == 2 or bool(cgroup.twin)


def move(cgroup: ContainerCgroup, *, throttled: bool) -> None:
    """v1: put all processes of a container's `work` where they belong; some just being forked may stay till next time.

    Raises:
        OSError: ENOENT or ENODEV: the container has gone.
    """
    for good, bad in _pairs(cgroup):
        source, target = (good, bad) if throttled else (bad, good)
        for _ in range(_PASSES):
            pids = _pids(source)
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError):  # it has ended
                    (target / "cgroup.procs").write_text(str(pid))


def release(cgroup: ContainerCgroup) -> None:
    """Treat a container as one within its entitlement, whatever it was before; twice is fine."""
    if cgroup.hierarchies.version == 2:
        unscale(cgroup)
    else:
        move(cgroup, throttled=False)


def divide_v1(hierarchies: Hierarchies, tag: str, balance: Balance) -> None:
    """v1: divide the processors between the good and the bad, each kind together."""
    parent, shares = hierarchies.mount_points["cpu"] / throttled_parent_of(tag), balance.within_range()
    (parent / GOOD / "cpu.shares").write_text(str(shares.good))
    (parent / BAD / "cpu.shares").write_text(str(shares.bad))


def divide_v2(good: dict[str, ContainerCgroup], bad: dict[str, ContainerCgroup], balance: Balance) -> None:
    """v2: the same by the weights of the bad, one by one.

    Raises:
        OSError: ENOENT or ENODEV: one of them has gone.
    """
    for cgroup in good.values():
        unscale(cgroup)
    weights = {name: read_weight(cgroup.directory("cpu")) for name, cgroup in [*good.items(), *bad.items()]}
    parts = scaled_weights(
        {name: weights[name] for name in good}, {name: weights[name] for name in bad}, balance
    )
    for name, cgroup in bad.items():
        scale(cgroup, parts[name])


def _pairs(cgroup: ContainerCgroup) -> Iterator[tuple[Path, Path]]:
    """Each group in the cpu hierarchy whose processes move, and its twin."""
    leaves: list[tuple[str, ...]] = [(WORK,)]
    leaves += [(WORK, name) for name in os.listdir(cgroup.directory("cpu", WORK)) if name.startswith("p-")]
    for leaf in leaves:
        twin = cgroup.twin_directory(leaf)
        if twin is not None and twin.is_dir():
            yield cgroup.directory("cpu", *leaf), twin


def _pids(directory: Path) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
    return []
