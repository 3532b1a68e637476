"""What is on the screen: lines of styled text, each cut to its width. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from garden_py.cli import parse
from garden_py.cli.printable import plain
from garden_py.cli.top.samples import Row, sparkline
from garden_py.cli.top.view import Mode, Sort, View, place_of

if TYPE_CHECKING:
    from garden_py.client import ProcessInfo

_GRAPH_WIDTH = 8
_NAME_MIN, _NAME_MAX = 8, 32
_KEYS = "q quit  enter look into  / filter  s stop  x destroy  sort: c m n d p a h"
_KEYS_OF_PROCESSES = "esc back  s stop  x destroy  q quit"
Line = tuple[str, str]
"""Text and its style in rich's words."""


@dataclass(frozen=True, slots=True)
class Picture:
    """All that can be shown.

    Attributes:
        rows: of all containers.
        processes: of the container that is looked into; None: not known yet.
        counted: usage of those processes that are counted by themselves, by id.
        message: the latest news, e.g. an error; empty: none.
        clock: time of the last look.
    """

    rows: Sequence[Row] = ()
    processes: Sequence[ProcessInfo] | None = None
    counted: dict[str, Row] = field(default_factory=dict)
    message: str = ""
    clock: str = ""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table; `worth`: the lower, the later it goes when there is no room."""

    heading: str
    width: int
    worth: int
    text: Callable[[Row], str]
    sort: Sort | None = None


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{parse.format_size(int(value))}/s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _memory(row: Row) -> str:
    used = parse.format_size(row.memory_bytes)
    return f"{used}/{parse.format_size(row.memory_limit_bytes)}" if row.memory_limit_bytes else used


def _pids(row: Row) -> str:
    return f"{row.pids}/{row.pids_limit}" if row.pids_limit else str(row.pids)


_COLUMNS = (
    _Column("CPU%", 6, 0, lambda row: _percent(row.cpu_percent), Sort.CPU),
    _Column("", _GRAPH_WIDTH, 5, lambda row: sparkline(row.cpu_graph, _GRAPH_WIDTH, 100.0)),
    _Column("MEMORY", 15, 1, _memory, Sort.MEMORY),
    _Column(
        "",
        _GRAPH_WIDTH,
        7,
        lambda row: sparkline(row.memory_graph, _GRAPH_WIDTH, float(row.memory_limit_bytes)),
    ),
    _Column("RX", 9, 3, lambda row: _rate(row.rx_bytes_per_s), Sort.NETWORK),
    _Column("TX", 9, 3, lambda row: _rate(row.tx_bytes_per_s), Sort.NETWORK),
    _Column("", _GRAPH_WIDTH, 8, lambda row: sparkline(row.network_graph, _GRAPH_WIDTH, 1.0)),
    _Column("DISK", 7, 4, lambda row: parse.format_size(row.disk_bytes), Sort.DISK),
    _Column("PIDS", 11, 2, _pids, Sort.PIDS),
    _Column("AGE", 7, 6, lambda row: _age(row.age_s), Sort.AGE),
)


def _age(age_s: float) -> str:
    for unit, length_s in (("d", 86_400), ("h", 3600), ("m", 60)):
        if age_s >= length_s:
            return f"{int(age_s // length_s)}{unit}"
    return f"{int(age_s)}s"


def body_height(height: int) -> int:
    """How many rows fit a screen of so many lines."""
    return max(1, height - 3)


def draw(view: View, picture: Picture, width: int, height: int) -> list[Line]:
    """`height` lines of `width` columns: the whole screen."""
    inside = bool(view.looked_into)
    lines = _processes(view, picture, width, height) if inside else _table(view, picture, width, height)
    footer = _footer(view, picture)
    body = lines[2:] if height <= 2 else lines  # the rows are worth most
    if view.mode is Mode.TABLE and height == 1:
        return _cut([*body, footer][:1], width)
    body = body[: height - 1]
    return _cut([*body, *[("", "")] * (height - 1 - len(body)), footer], width)


def _cut(lines: list[Line], width: int) -> list[Line]:
    return [(plain(text)[:width].ljust(width), style) for text, style in lines]


def _table(view: View, picture: Picture, width: int, height: int) -> list[Line]:
    shown = view.arrange(picture.rows)
    here, body = place_of(view, shown), body_height(height)
    first = max(0, min(here - body // 2, len(shown) - body))
    names = [row.name for row in shown]
    name_width = max(_NAME_MIN, min(_NAME_MAX, max(map(len, names), default=0)))
    columns = _that_fit(width - name_width)
    return [
        (_summary(view, picture, len(shown)), "bold"),
        (_heading(view, columns, name_width), "reverse"),
        *[
            (_row(row, columns, name_width), _style(row, selected=place == here))
            for place, row in enumerate(shown[first : first + body], first)
        ],
    ]


def _that_fit(room: int) -> list[_Column]:
    """The columns that there is room for, those worth most first, in their order."""
    chosen: list[_Column] = []
    for column in sorted(_COLUMNS, key=lambda column: column.worth):
        if column.width + 1 <= room:
            room -= column.width + 1
            chosen.append(column)
    return [column for column in _COLUMNS if column in chosen]


def _heading(view: View, columns: Sequence[_Column], name_width: int) -> str:
    mark = "▴" if view.reverse != (view.sort is Sort.HANDLE) else "▾"
    name = f"HANDLE{mark}" if view.sort is Sort.HANDLE else "HANDLE"
    cells = [
        (f"{column.heading}{mark}" if column.sort is view.sort else column.heading).rjust(column.width)
        for column in columns
    ]
    return " ".join([name.ljust(name_width), *cells])


def _row(row: Row, columns: Sequence[_Column], name_width: int) -> str:
    name = row.name if len(row.name) <= name_width else f"{row.name[: name_width - 1]}…"
    if row.error:
        return f"{name.ljust(name_width)} {row.error}"
    return " ".join([name.ljust(name_width), *[column.text(row).rjust(column.width) for column in columns]])


def _style(row: Row, *, selected: bool) -> str:
    if selected:
        return "reverse"
    return "red" if row.error else ""


def _summary(view: View, picture: Picture, shown: int) -> str:
    rows = picture.rows
    count = str(len(rows)) if shown == len(rows) else f"{shown} of {len(rows)}"
    cpu = sum(row.cpu_percent or 0.0 for row in rows)
    memory = parse.format_size(sum(row.memory_bytes for row in rows))
    words = [
        f"{count} container{'' if len(rows) == 1 else 's'}",
        f"cpu {cpu:.0f}%",
        f"memory {memory}",
        picture.clock,
    ]
    if view.pattern:
        words.append(f"filter: {view.pattern}")
    return "  ".join(words)


def _processes(view: View, picture: Picture, width: int, height: int) -> list[Line]:
    handle = view.looked_into
    row = next((row for row in picture.rows if row.name == handle), None)
    about = "it is gone" if row is None else row.error or _about(row, width)
    lines = [(f"{handle}  {about}", "bold"), (_PROCESS_HEADING, "reverse")]
    if picture.processes is None:
        return [*lines, ("…", "dim")]
    running_first = sorted(picture.processes, key=lambda each: each.exit is not None)
    body = body_height(height)
    shown = running_first if len(running_first) <= body else running_first[: body - 1]
    lines += [
        (_process(each, picture.counted.get(each.id)), "dim" if each.exit is not None else "")
        for each in shown
    ]
    more = len(running_first) - len(shown)
    return [*lines, (f"… {more} more", "dim")] if more else lines


def _about(row: Row, width: int) -> str:
    graph = sparkline(row.cpu_graph, max(0, min(30, width - 70)), 100.0)
    return (
        f"cpu {_percent(row.cpu_percent)}% {graph}  memory {_memory(row)}  "
        f"rx {_rate(row.rx_bytes_per_s)} tx {_rate(row.tx_bytes_per_s)}  pids {_pids(row)}"
    )


_PROCESS_HEADING = f"{'PROCESS':<20} {'PID':>7} {'STATE':<10} {'CPU%':>6} {'MEMORY':>15} COMMAND"


def _process(process: ProcessInfo, row: Row | None) -> str:
    """Usage stands only beside those that are counted by themselves."""
    if process.exit is None:
        state = "running"
    elif process.exit.signal is None:
        state = f"exit {process.exit.code}"
    else:
        state = f"signal {process.exit.signal}"
    measured = row is not None and not row.error
    cpu = _percent(row.cpu_percent) if row is not None and measured else ""
    memory = _memory(row) if row is not None and measured else ""
    command = " ".join([process.spec.path, *process.spec.args])
    return f"{process.id[:20]:<20} {process.pid or '':>7} {state:<10} {cpu:>6} {memory:>15} {command}"


def _footer(view: View, picture: Picture) -> Line:
    match view.mode:
        case Mode.CONFIRM if view.asked is not None:
            verb = view.asked.verb.value.capitalize()
            return f"{verb} {view.asked.handle}? y: yes, any other key: no", "bold yellow"
        case Mode.FILTER:
            return f"filter: {view.pattern}█  enter: keep, esc: all", "bold"
    if picture.message:
        return picture.message, "yellow"
    return (_KEYS_OF_PROCESSES if view.looked_into else _KEYS), "dim"


HEADINGS = ("HANDLE", *(column.heading for column in _COLUMNS if column.heading))


def cells(row: Row) -> list[str]:
    """A row of a plain table under HEADINGS."""
    if row.error:
        return [row.name, *[""] * (len(HEADINGS) - 1)]
    return [row.name, *(column.text(row) for column in _COLUMNS if column.heading)]
