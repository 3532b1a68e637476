"""CPU shares as a measure: quotas, entitlement, and the balance between those over theirs and the others."""

from __future__ import annotations

import pytest

from garden_py.model.cpu import (
    Balance,
    Entitlement,
    Standing,
    cpu_quota_us,
    scaled_weights,
    stated_shares,
    with_quota,
)
from garden_py.model.limits import Limits


@pytest.mark.parametrize(
    ("limits", "shares"),
    [
        (Limits(), 0),
        (Limits(cpu_shares=280), 280),
        (Limits(cpu_weight=100), 1024),
        (Limits(cpu_weight=100, cpu_shares=280), 280),
    ],
)
def test_stated_shares(limits: Limits, shares: int) -> None:
    """A weight is as good as shares; the kernel's default is nobody's statement."""
    assert stated_shares(limits) == shares


def test_quota_has_the_kernels_floor() -> None:
    """CP4."""
    assert (cpu_quota_us(512, 100), cpu_quota_us(2, 100)) == (51_200, 1_000)


@pytest.mark.parametrize(
    ("limits", "per_share", "quota"),
    [
        (Limits(cpu_shares=512), 0, None),
        (Limits(), 100, None),
        (Limits(cpu_shares=512), 100, 51_200),
        (Limits(cpu_shares=512, cpu_quota_us=7_000), 100, 7_000),
        (Limits(cpu_shares=512, cpu_quota_us=0), 100, 0),
    ],
)
def test_quota_follows_shares_unless_stated(limits: Limits, per_share: int, quota: int | None) -> None:
    """Nobody's own quota is touched, not even "none"."""
    assert with_quota(limits, per_share).cpu_quota_us == quota


def test_changed_shares_change_only_a_quota_of_theirs() -> None:
    """One that was stated stays."""
    changed = Limits(cpu_weight=100)
    theirs = Limits(cpu_shares=512, cpu_quota_us=51_200, cpu_period_us=100_000)
    own = Limits(cpu_shares=512, cpu_quota_us=7_000)
    assert with_quota(changed, 100, theirs).cpu_quota_us == 102_400
    assert with_quota(changed, 100, own).cpu_quota_us is None
    assert with_quota(changed, 100, Limits(cpu_quota_us=7_000)).cpu_quota_us is None
    assert with_quota(Limits(pids=3), 100, theirs) == Limits(pids=3)


def test_entitlement_by_default_gives_out_all_cores() -> None:
    """CP5: shares for all memory are all cores; a share is worth what the operator says."""
    host = Entitlement.of_host(0, cpus=4, memory_bytes=8 << 30)
    assert host.entitled_ns(8192, 10**9) == 4 * 10**9
    assert host.entitled_ns(0, 10**9) == 0
    assert Entitlement.of_host(0.5, cpus=4, memory_bytes=8 << 30).entitled_ns(100, 10**9) == 5 * 10**8


def test_who_states_no_shares_cannot_exceed_them() -> None:
    """CT1, and a container that was never given anything to measure it by."""
    assert Standing(shares=100, used_ns=11, entitled_ns=10).is_over
    assert not Standing(shares=100, used_ns=10, entitled_ns=10).is_over
    assert not Standing(shares=0, used_ns=10, entitled_ns=0).is_over


@pytest.mark.parametrize(
    ("per_share", "bad_shares", "expected"),
    [
        (0.0, 0, Balance(good=8190, bad=2)),
        (0.0, 100, Balance(good=8092, bad=100)),
        (0.1, 100, Balance(good=7987, bad=205)),  # 0.1 % is 2.048 times the default
        (0.0, 10_000, Balance(good=2, bad=8190)),
    ],
)
def test_balance(per_share: float, bad_shares: int, expected: Balance) -> None:
    """CT2, and neither side below what the kernel takes."""
    assert Entitlement.of_host(per_share, cpus=4, memory_bytes=8 << 30).balance(bad_shares) == expected


def test_balance_of_a_huge_host_is_scaled() -> None:
    """cpu.shares ends at 262144."""
    assert Balance(524_288, 1_024).within_range() == Balance(262_144, 512)
    assert Balance(8092, 100).within_range() == Balance(8092, 100)


def test_scaled_weights() -> None:
    """Together they stand to the good ones as the balance says, among each other as before; never raised, never 0."""
    balance = Balance(good=9_000, bad=1_000)
    assert scaled_weights({"g": 900}, {"a": 100, "b": 300}, balance) == {"a": 25, "b": 75}
    assert scaled_weights({"g": 10}, {"a": 100}, balance) == {"a": 1}
    assert scaled_weights({"g": 9_000}, {"a": 100}, balance) == {"a": 100}
    assert scaled_weights({}, {"a": 100}, balance) == {"a": 100}
    assert scaled_weights({"g": 900}, {}, balance) == {}
