"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"  # something asked for will be refused, slower or less safe
    FAIL = "FAIL"  # `garden server` cannot work


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: what was looked at.
        level: how bad it is.
        found: what was seen.
        cost: what cannot be done, or is less safe, because of it; empty if all is well.
        remedy: how to get it; empty if all is well or nothing can be done.
    """

    check: str
    level: Level
    found: str
    cost: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Doubt:
    """What is said if a check does not succeed: how bad, at what cost, and what to do."""

    level: Level
    cost: str
    remedy: str


def judge(check: str, failure: str, good: str, doubt: Doubt) -> Finding:
    """A Finding for a trial: `good` if failure is empty, else the failure with its consequences."""
    if not failure:
        return Finding(check, Level.OK, good)
    return Finding(check, doubt.level, failure, doubt.cost, doubt.remedy)
