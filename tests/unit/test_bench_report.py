"""What the benchmarks say about figures: the arithmetic of samples, ratios and marks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from measure import Samples, alternate
from report import Mark, Row, at_most, format_table, ratio_at_least, ratio_at_most, row_to_json


def row(*marks: Mark, ours=(2.0, 3.0, 10.0), theirs=(6.0, 6.0, 6.0)):
    return Row("create", "ms", Samples(ours), "runc", Samples(theirs), marks)


def test_subjects_are_measured_in_turns_and_warm_up_is_thrown_away() -> None:
    """A B A B: noise must not fall on one of them alone."""
    calls: list[str] = []

    def subject(name: str):
        def measure() -> float:
            calls.append(name)
            return float(len(calls))

        return measure

    found = alternate({"a": subject("a"), "b": subject("b")}, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert found == {"a": Samples((3.0, 5.0)), "b": Samples((4.0, 6.0))}


def test_no_samples_are_refused() -> None:
    """A median of nothing would hide a measurement that never ran."""
    with pytest.raises(ValueError, match="without a single sample"):
        Samples(())


def test_ratio_compares_medians_not_means() -> None:
    """One outlier on a busy machine must not decide."""
    assert row().ratio == 0.5
    assert Row("x", "ms", Samples((1.0,))).ratio is None


@pytest.mark.parametrize(
    ("marks", "reached"),
    [
        ((), None),
        ((at_most(3),), True),
        ((at_most(2.9),), False),
        ((ratio_at_most(0.5),), True),
        ((ratio_at_most(0.49),), False),
        ((ratio_at_least(0.5),), True),
        ((ratio_at_least(0.51),), False),
        ((at_most(3), ratio_at_most(0.1)), False),
    ],
)
def test_every_mark_must_hold(marks, reached) -> None:
    """Bounds are inclusive, on the median, and all of them count."""
    assert row(*marks).reached is reached


def test_a_ratio_mark_without_a_peer_is_a_mistake() -> None:
    """It could otherwise be reported as reached."""
    with pytest.raises(ValueError, match="needs a peer"):
        _ = Row("x", "ms", Samples((1.0,)), marks=(ratio_at_most(1),)).reached


def test_the_table_shows_figures_range_ratio_and_verdict() -> None:
    """People read the table, so its cells are promised."""
    cells = [cell.strip() for cell in format_table([row(at_most(2))]).splitlines()[2].split("|")[1:-1]]
    assert cells == ["create", "3.00 ms (2.00–10.0)", "6.00 ms", "runc", "0.50", "≤ 2 ms", "no"]


def test_json_keeps_every_sample() -> None:
    """Whoever doubts a median can look."""
    found = row_to_json(row(ratio_at_most(0.5)))
    assert found["ours"]["samples"] == [2.0, 3.0, 10.0]
    assert (found["ratio"], found["reached"], found["marks"]) == (0.5, True, ["≤ 0.5 x"])
