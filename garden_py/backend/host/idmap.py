"""How the ids of a user namespace stand for the host's. Pure. Source: user_namespaces(7), uid_map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

IdRange: TypeAlias = tuple[int, int, int]
"""First id inside, first id on the host, how many."""


@dataclass(frozen=True, slots=True)
class IdMap:
    """A mapping of user and group ids alike; hashable."""

    ranges: tuple[IdRange, ...]

    @property
    def size(self) -> int:
        """How many ids are mapped."""
        return sum(count for _, _, count in self.ranges)

    def host_id(self, inside: int) -> int:
        """The host's id for one of the namespace; root's for those that are not mapped."""
        for first, host, count in self.ranges:
            if first <= inside < first + count:
                return host + inside - first
        return self.host_id(0)

    def text(self) -> str:
        """As /proc/PID/uid_map takes it."""
        return "".join(f"{first} {host} {count}\n" for first, host, count in self.ranges)


def range_of(base: int, count: int) -> IdMap:
    """Ids 0…count-1 to base…."""
    return IdMap(((0, base, count),))


def map_root_apart(highest: int) -> IdMap:
    """Root to the highest id, every other id to itself (Garden statement NS2): all containers share their ids."""
    return IdMap(((0, highest, 1), (1, 1, highest - 1)))


def parse_highest(uid_map: str) -> int:
    """The highest id of a namespace, from its /proc/PID/uid_map."""
    return max(int(first) + int(count) - 1 for first, _, count in map(str.split, uid_map.splitlines()))
