"""Limits on transfers with a block device: from Limits to cgroup files and back. `plan_` and `parse_` are pure.

They are on the container itself, so what the agent copies in and out counts too.

Source: cgroup-v2.rst, io.max and io.weight; cgroup-v1/blkio-controller.rst; block/bfq-cgroup.c for its weights.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from garden_py.model.errors import HostFault, LimitRefused
from garden_py.model.limits import IO_RATES, Limits

BFQ_WEIGHT_MAX = 1_000
_V2_KEYS: Final = dict(zip(IO_RATES, ("rbps", "wbps", "riops", "wiops"), strict=True))
_V1_FILES: Final = dict(
    zip(
        IO_RATES,
        (
            "blkio.throttle.read_bps_device",
            "blkio.throttle.write_bps_device",
            "blkio.throttle.read_iops_device",
            "blkio.throttle.write_iops_device",
        ),
        strict=True,
    )
)
V1_PROBE: Final = _V1_FILES[IO_RATES[0]]


@dataclass(frozen=True, slots=True)
class IoWrite:
    """One value for one file; field: the limit that it comes from."""

    file: str
    value: str
    field: str


def plan_io_writes(limits: Limits, version: int, device: str, weight_file: str) -> list[IoWrite]:
    """The writes that put limits in force; fields without a statement cause none.

    Args:
        limits: as asked for; 0 means unlimited.
        version: 1 or 2.
        device: `MAJOR:MINOR` of a whole device.
        weight_file: that carries the weight here; only needed if one is stated.
    """
    stated = {name: value for name in IO_RATES if (value := getattr(limits, name)) is not None}
    if version == 1:
        writes = [IoWrite(_V1_FILES[name], f"{device} {value}", name) for name, value in stated.items()]
    else:
        writes = [
            IoWrite("io.max", f"{device} {_V2_KEYS[name]}={value or 'max'}", name)
            for name, value in stated.items()
        ]
    if limits.io_weight is not None:
        default = "default " if weight_file == "io.weight" else ""
        writes.append(IoWrite(weight_file, f"{default}{limits.io_weight}", "io_weight"))
    return writes


def parse_v1_rate(text: str, device: str) -> int:
    """The value of a device in a file of lines `MAJOR:MINOR value`; 0 if it has none."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == device:
            return int(value)
    return 0


def parse_io_max(text: str, device: str) -> dict[str, int]:
    """The rates of a device in io.max, by field of Limits; 0 where there is no limit."""
    for line in text.splitlines():
        name, *pairs = line.split()
        if name == device:
            values = dict(pair.split("=", 1) for pair in pairs)
            return {
                field: 0 if values.get(key, "max") == "max" else int(values[key])
                for field, key in _V2_KEYS.items()
            }
    return dict.fromkeys(IO_RATES, 0)


def parse_weight(text: str) -> int:
    """The default weight in a file that may also have weights of single devices."""
    first = text.splitlines()[0].split()
    return int(first[-1])


def write_io_limits(directory: Path, writes: list[IoWrite]) -> None:
    """Put limits in force.

    Raises:
        LimitRefused: the kernel refuses a value.
        HostFault: a file cannot be written for another reason.
    """
    for write in writes:
        path = directory / write.file
        try:
            path.write_text(write.value)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ERANGE):
                problem = f"the kernel refuses {write.value!r} for {write.file}: {error.strerror}"
                raise LimitRefused(f"limits.{write.field}", problem) from error
            raise HostFault("write limits", f"{path}: {error.strerror}") from error


def read_io_limits(directory: Path, version: int, device: str, weight_file: str) -> Limits:
    """The limits in force of one device; 0 where there is none, and no weight without a file for it."""
    if version == 1:
        rates = {
            name: parse_v1_rate((directory / file).read_text(), device) for name, file in _V1_FILES.items()
        }
    else:
        rates = parse_io_max((directory / "io.max").read_text(), device)
    weight = parse_weight((directory / weight_file).read_text()) if weight_file else None
    read_bytes, write_bytes, read_ops, write_ops = (rates[name] for name in IO_RATES)
    return Limits(
        io_weight=weight,
        io_read_bytes_per_s=read_bytes,
        io_write_bytes_per_s=write_bytes,
        io_read_ops_per_s=read_ops,
        io_write_ops_per_s=write_ops,
    )
