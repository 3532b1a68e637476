"""Changes of limits that the kernel takes in part."""

from __future__ import annotations

import pytest
from kit.cgroups import cgroups_of, matching

from garden_py.client import ContainerSpec, FailedPrecondition, GardenClient, Limits

pytestmark = pytest.mark.root
MIB = 1 << 20
# More than the kernel's bandwidth arithmetic takes: MAX_BW in kernel/sched/sched.h is 2^44 µs.
QUOTA_TOO_LARGE_US = 9_000_000_000_000_000


def test_refused_change_of_several_limits_changes_none(garden: GardenClient) -> None:
    """Memory is written before CPU time; a caller that is told "refused" must find what was in force before."""
    before = Limits(memory_bytes=300 * MIB, cpu_quota_us=50_000, cpu_weight=33)
    with garden.create(ContainerSpec(limits=before)) as box:
        in_force = box.limits()
        with pytest.raises(FailedPrecondition) as refused:
            box.update_limits(
                Limits(
                    memory_bytes=100 * MIB,
                    cpu_weight=500,
                    cpu_quota_us=QUOTA_TOO_LARGE_US,
                    cpu_period_us=1000,
                )
            )
        assert refused.value.metadata["field"] == "limits.cpu_quota_us"
        assert box.limits() == in_force


def test_process_whose_limits_are_refused_leaves_no_group(garden: GardenClient) -> None:
    """The group is made before its limits are written; ids that are refused would pile up until the destroy."""
    with garden.create() as box:
        with pytest.raises(FailedPrecondition):
            box.start(["true"], id="p", limits=Limits(cpu_quota_us=QUOTA_TOO_LARGE_US))
        assert not [group for top in cgroups_of(box.handle) for group in matching(top, "**/p-*")]
        assert box.run(["true"], id="p").output().exit.code == 0
