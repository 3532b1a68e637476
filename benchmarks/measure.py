"""Samples, and the order in which they are taken. Pure but for the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Subject = Callable[[], float]
"""Does something once and returns its figure: milliseconds, MB/s, ..."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The figures of one subject in the order they were taken; never empty."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a subject without a single sample says nothing")

    @property
    def p50(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)


def alternate(subjects: Mapping[str, Subject], *, rounds: int, warm_up: int = 2) -> dict[str, Samples]:
    """Take samples in turns, A B A B, so that whatever else the machine does meets all subjects alike.

    Args:
        subjects: by name, in the order of each round.
        rounds: samples of each, at least 1.
        warm_up: rounds before those, whose figures are thrown away.
    """
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(warm_up + rounds):
        for name, subject in subjects.items():
            figure = subject()
            if number >= warm_up:
                taken[name].append(figure)
    return {name: Samples(tuple(values)) for name, values in taken.items()}


def timed_ms(act: Callable[[], object]) -> float:
    """How long act takes, in milliseconds of the monotonic clock."""
    begin = time.perf_counter()
    act()
    return (time.perf_counter() - begin) * 1e3


def timing(act: Callable[[], object]) -> Subject:
    """A subject whose figure is the milliseconds that act takes."""
    return lambda: timed_ms(act)


def in_a_row(act: Subject) -> Subject:
    """The second of two: else each subject would meet the state that the one before it has left."""

    def second() -> float:
        act()
        return act()

    return second


def in_a_streak(act: Subject) -> Subject:
    """The median of twenty in a row: what a client meets that runs one process after the other."""

    def median_of_many() -> float:
        act()
        return statistics.median(act() for _ in range(20))

    return median_of_many
