"""Words of tests about disk limits."""

from __future__ import annotations

from garden_py.client import Container, ContainerSpec, DiskScope, GardenClient, Limits

MIB = 1 << 20


def limited(
    garden: GardenClient,
    mib: int,
    *,
    inodes: int | None = None,
    scope: DiskScope | None = None,
    **spec: object,
) -> Container:
    """A container that may take so many MiB and inodes."""
    limits = Limits(disk_bytes=mib * MIB, disk_inodes=inodes, disk_scope=scope)
    return garden.create(ContainerSpec(limits=limits, **spec))  # type: ignore[arg-type]


def write(container: Container, name: str, mib: int, user: str = "") -> bool:
    """Whether a file of that size could be written, to the disk."""
    script = f"dd if=/dev/urandom of={name} bs=1M count={mib} conv=fsync 2>&1"
    return container.run(["sh", "-c", script], user=user).output().exit.code == 0
