"""CPU shares as a measure: the quota they stand for, the time they entitle to, who has had more than that. Pure.

Source: Garden behaviour, statements CP4, CP5, CT1, CT2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .limits import (
    CPU_PERIOD_DEFAULT_US,
    CPU_QUOTA_FLOOR_US,
    CPU_SHARES_RANGE,
    CPU_WEIGHT_RANGE,
    Limits,
    shares_from_weight,
)


def stated_shares(limits: Limits) -> int:
    """The shares that limits state, a weight turned into them; 0 if they state neither."""
    if limits.cpu_shares is not None:
        return limits.cpu_shares
    return 0 if limits.cpu_weight is None else shares_from_weight(limits.cpu_weight)


# --- quota


def cpu_quota_us(shares: int, us_per_share: int) -> int:
    """The quota that shares stand for (statement CP4).

    Args:
        shares: 2 to 262144.
        us_per_share: µs of CPU time per share in each period.

    Returns:
        µs per period of 100000 µs, at least 1000, the kernel's floor.
    """
    return max(CPU_QUOTA_FLOOR_US, shares * us_per_share)


def with_quota(limits: Limits, us_per_share: int, before: Limits | None = None) -> Limits:
    """Limits with the quota that their shares stand for, if nobody has stated another one.

    Args:
        limits: to be put in force.
        us_per_share: see cpu_quota_us; 0: shares stand for none.
        before: those in force now; a quota among them that follows from the shares will follow from the new ones.
    """
    shares = stated_shares(limits)
    if not us_per_share or not shares or limits.cpu_quota_us is not None:
        return limits
    if before is not None and before.cpu_quota_us:
        old = stated_shares(before)
        if not old or before.cpu_quota_us != cpu_quota_us(old, us_per_share):
            return limits
    quota = cpu_quota_us(shares, us_per_share)
    return replace(limits, cpu_quota_us=quota, cpu_period_us=CPU_PERIOD_DEFAULT_US)


# --- entitlement


@dataclass(frozen=True, slots=True)
class Entitlement:
    """What a share is worth here.

    Attributes:
        percent_per_share: of one core.
        default_percent_per_share: what it would be if all of the host's memory, in MiB, were given out as shares.
        total_shares: these, one for each MiB of the host.
    """

    percent_per_share: float
    default_percent_per_share: float
    total_shares: int

    @classmethod
    def of_host(cls, percent_per_share: float, *, cpus: int, memory_bytes: int) -> Entitlement:
        """On a host with so many cores and so much memory; 0 percent: the default."""
        total = max(1, memory_bytes >> 20)
        default = cpus * 100 / total
        return cls(percent_per_share or default, default, total)

    def entitled_ns(self, shares: int, age_ns: int) -> int:
        """CPU time that shares stand for since a container was made (statement CP5); 0 without shares."""
        return round(shares * self.percent_per_share / 100 * age_ns)

    def balance(self, bad_shares: int) -> Balance:
        """How the processors are divided between containers that had more than their due, and all others (CT2).

        Args:
            bad_shares: of all containers that had more, together.
        """
        worth = self.percent_per_share / self.default_percent_per_share
        floor = CPU_SHARES_RANGE[0]
        bad = min(max(floor, round(bad_shares * worth)), max(floor, self.total_shares - floor))
        return Balance(good=max(floor, self.total_shares - bad), bad=bad)


@dataclass(frozen=True, slots=True)
class Balance:
    """Shares of the two kinds of containers, each kind together."""

    good: int
    bad: int

    def within_range(self) -> Balance:
        """The same ratio in numbers that cpu.shares takes."""
        low, high = CPU_SHARES_RANGE
        factor = min(1.0, high / max(self.good, self.bad))
        return Balance(max(low, round(self.good * factor)), max(low, round(self.bad * factor)))


@dataclass(frozen=True, slots=True)
class Standing:
    """How a container stands to its entitlement.

    Attributes:
        shares: as stated; 0: it has stated none, and so has no entitlement to exceed.
        used_ns: CPU time since it was made.
        entitled_ns: what its shares stand for in that time.
    """

    shares: int
    used_ns: int
    entitled_ns: int

    @property
    def is_over(self) -> bool:
        """Whether it had more than its due (statement CT1)."""
        return self.shares > 0 and self.used_ns > self.entitled_ns


def scaled_weights(good: Mapping[str, int], bad: Mapping[str, int], balance: Balance) -> dict[str, int]:
    """Weights of bad containers that stand, all together, to the good ones' as the balance says; never above their own.

    Args:
        good: cpu.weight of each container that had no more than its due.
        bad: cpu.weight, unscaled, of each that had.
        balance: between the two kinds.

    Returns:
        A weight for each bad container, in the ratio that they have among each other, at least 1.
    """
    if not good or not bad:
        return dict(bad)
    together = sum(good.values()) * balance.bad / balance.good
    factor = min(1.0, together / sum(bad.values()))
    return {name: max(CPU_WEIGHT_RANGE[0], round(weight * factor)) for name, weight in bad.items()}
