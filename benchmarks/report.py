"""Rows, the marks they should reach, and how they are shown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from measure import Samples

Subject = Literal["value", "ratio"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A bound on a row's median, or on its ratio to the peer.

    Attributes:
        of: what is bounded.
        bound: inclusive; an upper one, or with `least` a lower one.
        later: a target of the design that is not due yet.
    """

    of: Subject
    bound: float
    least: bool = False
    later: bool = False

    def text(self, unit: str) -> str:
        """For the table: "≤ 4 ms", "≥ 0.7 x"."""
        sign = "≥" if self.least else "≤"
        return (
            f"{sign} {self.bound:g} {'x' if self.of == 'ratio' else unit}{' (later)' if self.later else ''}"
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        unit: of all samples.
        ours: the server's samples.
        peer: what it is compared with; empty: nothing.
        theirs: the peer's samples, taken in turns with ours; None without a peer.
        marks: all must hold.
    """

    what: str
    unit: str
    ours: Samples
    peer: str = ""
    theirs: Samples | None = None
    marks: tuple[Mark, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Our median over the peer's; None without a peer."""
        return None if self.theirs is None else self.ours.p50 / self.theirs.p50

    @property
    def reached(self) -> bool | None:
        """Whether every mark holds; None if there is none."""
        if not self.marks:
            return None
        return all(self._holds(mark) for mark in self.marks)

    def _holds(self, mark: Mark) -> bool:
        figure = self.ours.p50 if mark.of == "value" else self.ratio
        if figure is None:
            raise ValueError(f"{self.what}: a mark on a ratio needs a peer")
        return figure >= mark.bound if mark.least else figure <= mark.bound


def at_most(bound: float, *, later: bool = False) -> Mark:
    """Our median is at most bound, in the row's unit."""
    return Mark("value", bound, later=later)


def ratio_at_most(bound: float, *, later: bool = False) -> Mark:
    """Our median is at most bound times the peer's."""
    return Mark("ratio", bound, later=later)


def ratio_at_least(bound: float, *, later: bool = False) -> Mark:
    """Our median is at least bound times the peer's."""
    return Mark("ratio", bound, least=True, later=later)


_HEAD = ("what", "ours p50 (min–max)", "peer p50", "peer", "ratio", "mark to reach", "reached")


def format_table(rows: Sequence[Row]) -> str:
    """A table in Markdown that is also aligned for a terminal."""
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    shown = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    shown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(shown)


def _cells(row: Row) -> tuple[str, ...]:
    ours = f"{_figure(row.ours.p50)} {row.unit} ({_figure(row.ours.low)}–{_figure(row.ours.high)})"
    theirs = f"{_figure(row.theirs.p50)} {row.unit}" if row.theirs else ""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    marks = ", ".join(mark.text(row.unit) for mark in row.marks)
    return row.what, ours, theirs, row.peer, ratio, marks, {None: "", True: "yes", False: "no"}[row.reached]


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def row_to_json(row: Row) -> dict[str, Any]:
    """A row with all its samples, for programs."""
    return {
        "what": row.what,
        "unit": row.unit,
        "ours": _samples_to_json(row.ours),
        "peer": row.peer,
        "theirs": _samples_to_json(row.theirs) if row.theirs else None,
        "ratio": row.ratio,
        "marks": [mark.text(row.unit) for mark in row.marks],
        "reached": row.reached,
    }


def _samples_to_json(samples: Samples) -> dict[str, Any]:
    values = [round(value, 4) for value in samples.values]
    return {
        "p50": round(samples.p50, 4),
        "min": round(samples.low, 4),
        "max": round(samples.high, 4),
        "samples": values,
    }
