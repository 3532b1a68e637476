"""What the user looks at, and what a key makes of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from garden_py.cli.top import keys
from garden_py.cli.top.samples import Row


class Sort(Enum):
    """By what rows are sorted; the value is the key that is pressed for it."""

    CPU = "c"
    MEMORY = "m"
    NETWORK = "n"
    DISK = "d"
    PIDS = "p"
    AGE = "a"
    HANDLE = "h"


_VALUES: dict[Sort, Callable[[Row], Any]] = {
    Sort.CPU: lambda row: row.cpu_percent or 0.0,
    Sort.MEMORY: lambda row: row.memory_bytes,
    Sort.NETWORK: lambda row: row.network_bytes_per_s,
    Sort.DISK: lambda row: row.disk_bytes,
    Sort.PIDS: lambda row: row.pids,
    Sort.AGE: lambda row: row.age_s,
}


class Mode(Enum):
    """What keys mean now."""

    TABLE = "table"
    FILTER = "filter"
    CONFIRM = "confirm"
    PROCESSES = "processes"


class Verb(Enum):
    """What the program has to do."""

    QUIT = "quit"
    STOP = "stop"
    DESTROY = "destroy"


@dataclass(frozen=True, slots=True)
class Command:
    """Something to be done, to a container unless it is QUIT."""

    verb: Verb
    handle: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the user has chosen.

    Attributes:
        reverse: against the sort's own direction, which is the largest first, and names from a.
        pattern: rows whose name contains it are shown.
        selected: name of the row that keys are about; it may have gone.
        looked_into: the container whose processes are shown; empty: the table is.
        asked: what CONFIRM asks for.
    """

    sort: Sort = Sort.CPU
    reverse: bool = False
    pattern: str = ""
    selected: str = ""
    mode: Mode = Mode.TABLE
    looked_into: str = ""
    asked: Command | None = None

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are shown, in their order; equal ones by name, so that they do not dance."""
        shown = sorted((row for row in rows if self.pattern in row.name), key=lambda row: row.name)
        if self.sort is not Sort.HANDLE:
            shown.sort(key=_VALUES[self.sort], reverse=True)
        return shown[::-1] if self.reverse else shown


def place_of(view: View, shown: Sequence[Row]) -> int:
    """Where the selected row is; 0 if it has gone or there was none."""
    return next((place for place, row in enumerate(shown) if row.name == view.selected), 0)


def press(view: View, key: str, shown: Sequence[Row], page: int) -> tuple[View, Command | None]:
    """What becomes of the view, and what is to be done.

    Args:
        view: as it is.
        key: of keys.py.
        shown: the arranged rows.
        page: how many of them fit.
    """
    if key == keys.INTERRUPT:
        return view, Command(Verb.QUIT)
    match view.mode:
        case Mode.FILTER:
            return _edit_pattern(view, key), None
        case Mode.CONFIRM:
            back = replace(view, mode=Mode.PROCESSES if view.looked_into else Mode.TABLE, asked=None)
            return back, view.asked if key in ("y", "Y") else None
        case Mode.PROCESSES:
            return _press_in_processes(view, key)
        case Mode.TABLE:
            return _press_in_table(view, key, shown, page)


def _edit_pattern(view: View, key: str) -> View:
    match key:
        case keys.ENTER:
            return replace(view, mode=Mode.TABLE)
        case keys.ESCAPE:
            return replace(view, mode=Mode.TABLE, pattern="")
        case keys.BACKSPACE:
            return replace(view, pattern=view.pattern[:-1])
    return replace(view, pattern=view.pattern + key) if len(key) == 1 else view


def _press_in_processes(view: View, key: str) -> tuple[View, Command | None]:
    match key:
        case "q":
            return view, Command(Verb.QUIT)
        case keys.ESCAPE | keys.ENTER | keys.BACKSPACE:
            return replace(view, mode=Mode.TABLE, looked_into=""), None
        case "s" | "x":
            return _ask(view, key, view.looked_into), None
    return view, None


def _press_in_table(view: View, key: str, shown: Sequence[Row], page: int) -> tuple[View, Command | None]:
    here = place_of(view, shown)
    name = shown[here].name if shown else ""
    steps = {
        keys.UP: -1, "k": -1, keys.DOWN: 1, "j": 1, keys.PAGE_UP: -page, keys.PAGE_DOWN: page,
        keys.HOME: -len(shown), keys.END: len(shown),
    }  # fmt: skip
    if key in steps:
        there = max(0, min(len(shown) - 1, here + steps[key]))
        return replace(view, selected=shown[there].name if shown else ""), None
    if key in {sort.value for sort in Sort}:
        chosen = Sort(key)
        return replace(view, sort=chosen, reverse=chosen is view.sort and not view.reverse), None
    match key:
        case "q":
            return view, Command(Verb.QUIT)
        case "/":
            return replace(view, mode=Mode.FILTER), None
        case keys.ESCAPE:
            return replace(view, pattern=""), None
        case keys.ENTER if name:
            return replace(view, mode=Mode.PROCESSES, looked_into=name, selected=name), None
        case "s" | "x" if name:
            return _ask(replace(view, selected=name), key, name), None
    return view, None


def _ask(view: View, key: str, handle: str) -> View:
    return replace(view, mode=Mode.CONFIRM, asked=Command(Verb.STOP if key == "s" else Verb.DESTROY, handle))
