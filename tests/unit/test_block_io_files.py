"""From limits on block I/O to cgroup files and back, and which device they are on."""

from __future__ import annotations

from pathlib import Path

import pytest

from garden_py.backend.cgroup.io import (
    parse_io_max,
    parse_v1_rate,
    parse_weight,
    plan_io_writes,
    read_io_limits,
)
from garden_py.backend.host.block_device import device_below, whole_device
from garden_py.model.limits import IO_OPS_MAX, IO_RATES, Limits, limit_violations

ASKED = Limits(io_weight=50, io_read_bytes_per_s=1 << 20, io_write_bytes_per_s=0, io_write_ops_per_s=9)


def test_v1_writes_a_file_for_each_limit() -> None:
    """0 lifts, as the kernel has it; what is not stated is not touched."""
    writes = plan_io_writes(ASKED, 1, "254:0", "blkio.bfq.weight")
    assert [(write.file, write.value) for write in writes] == [
        ("blkio.throttle.read_bps_device", "254:0 1048576"),
        ("blkio.throttle.write_bps_device", "254:0 0"),
        ("blkio.throttle.write_iops_device", "254:0 9"),
        ("blkio.bfq.weight", "50"),
    ]


def test_v2_writes_keys_of_one_file() -> None:
    """And "max" where nothing limits."""
    writes = plan_io_writes(ASKED, 2, "254:0", "io.weight")
    assert [(write.file, write.value, write.field) for write in writes] == [
        ("io.max", "254:0 rbps=1048576", "io_read_bytes_per_s"),
        ("io.max", "254:0 wbps=max", "io_write_bytes_per_s"),
        ("io.max", "254:0 wiops=9", "io_write_ops_per_s"),
        ("io.weight", "default 50", "io_weight"),
    ]


def test_parsers_take_the_asked_device_only() -> None:
    """Others' lines, and none at all, are no limit."""
    assert parse_v1_rate("8:0 5\n254:0 1048576\n", "254:0") == 1 << 20
    assert parse_v1_rate("", "254:0") == 0
    text = "8:0 rbps=1 wbps=1 riops=1 wiops=1\n254:0 rbps=7 wbps=max riops=max wiops=9\n"
    assert parse_io_max(text, "254:0") == dict(zip(IO_RATES, (7, 0, 0, 9), strict=True))
    assert parse_io_max("", "254:0") == dict.fromkeys(IO_RATES, 0)
    assert (parse_weight("default 50\n8:0 70\n"), parse_weight("100\n")) == (50, 100)


def test_reading_v2(tmp_path: Path) -> None:
    """No weight where no file carries one."""
    (tmp_path / "io.max").write_text("254:0 rbps=7 wbps=max riops=max wiops=max\n")
    found = read_io_limits(tmp_path, 2, "254:0", "")
    assert found == Limits(
        io_read_bytes_per_s=7, io_write_bytes_per_s=0, io_read_ops_per_s=0, io_write_ops_per_s=0
    )


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(io_weight=10_001), "io_weight"),
        (Limits(io_read_bytes_per_s=4095), "io_read_bytes_per_s"),
        (Limits(io_write_ops_per_s=IO_OPS_MAX + 1), "io_write_ops_per_s"),
    ],
)
def test_out_of_range(limits: Limits, field: str) -> None:
    """Each field is named."""
    assert [found.field for found in limit_violations(limits, "limits")] == [f"limits.{field}"]
    assert not limit_violations(Limits(io_read_bytes_per_s=0, io_write_ops_per_s=1), "limits")


def test_memory_is_no_block_device() -> None:
    """Nor is what the kernel does not know."""
    assert device_below(Path("/proc")) is None
    assert whole_device("0:0") is None
