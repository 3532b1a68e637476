"""`garden top` without a terminal: rates, keys, what they do, and pictures of any size."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from kit.fake_server import serve_fake

from garden_py.cli.main import run_command
from garden_py.cli.top import keys
from garden_py.cli.top.draw import Picture, draw
from garden_py.cli.top.keys import KeyDecoder
from garden_py.cli.top.samples import Row, Samples, sparkline
from garden_py.cli.top.view import Command, Mode, Sort, Verb, View, press
from garden_py.client import ContainerMetrics, ExitStatus, ProcessInfo, ProcessSpec

NOTHING: dict[str, Any] = {field.name: 0 for field in fields(ContainerMetrics)}


def usage(handle: str, age_s: float = 10, **values: Any) -> ContainerMetrics:
    given = {
        "handle": handle,
        "process_id": "",
        "error": "",
        "memory_stat": {},
        "age": timedelta(seconds=age_s),
    }
    return ContainerMetrics(**{**NOTHING, **given, **values})


# --- samples


def test_rates_are_those_between_two_looks() -> None:
    samples = Samples()
    (first,) = samples.take([usage("web", cpu_usage_ns=10**9, network_rx_bytes=100)], 5.0)
    assert (first.cpu_percent, first.rx_bytes_per_s) == (None, None)
    (second,) = samples.take(
        [usage("web", 12, cpu_usage_ns=4 * 10**9, network_rx_bytes=2100, memory_bytes=7)], 7.0
    )
    assert (second.cpu_percent, second.rx_bytes_per_s, second.tx_bytes_per_s) == (150.0, 1000.0, 0.0)
    assert (second.cpu_graph, second.memory_graph, second.network_graph) == ((150.0,), (0.0, 7.0), (1000.0,))


def test_another_container_of_the_same_name_begins_anew() -> None:
    samples = Samples()
    samples.take([usage("web", 100, cpu_usage_ns=9 * 10**9)], 0.0)
    (young,) = samples.take([usage("web", 1, cpu_usage_ns=10**8)], 1.0)
    assert young.cpu_percent is None
    assert young.cpu_graph == ()


def test_those_that_are_gone_are_forgotten_and_errors_are_rows() -> None:
    samples = Samples()
    samples.take([usage("web")], 0.0)
    assert [row.error for row in samples.take([usage("web", error="broken")], 1.0)] == ["broken"]
    (again,) = samples.take([usage("web", cpu_usage_ns=10**9)], 2.0)
    assert again.cpu_percent is None


@pytest.mark.parametrize(
    ("values", "width", "full", "drawn"),
    [
        ((), 3, 100.0, "   "),
        ((0.0, 50.0, 100.0), 3, 100.0, "▁▅█"),
        ((0.0, 100.0, 200.0), 2, 100.0, "▅█"),
        ((5.0,), 3, 0.0, "  █"),
        ((0.0,), 2, 0.0, " ▁"),
        ((1.0,), 0, 1.0, ""),
    ],
)
def test_graphs(values: tuple[float, ...], width: int, full: float, drawn: str) -> None:
    assert sparkline(values, width, full) == drawn


# --- keys


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (b"q", ["q"]),
        (b"\r\x7f\x03", [keys.ENTER, keys.BACKSPACE, keys.INTERRUPT]),
        (b"\x1b[A\x1b[B\x1bOA", [keys.UP, keys.DOWN, keys.UP]),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[4~", [keys.PAGE_UP, keys.PAGE_DOWN, keys.HOME, keys.END]),
        (b"\x1b[1;5Cq", ["q"]),
        (b"\x1bq", [keys.ESCAPE, "q"]),
        ("ü€".encode(), ["ü", "€"]),
        (b"\x00\x01\xff", []),
    ],
)
def test_keys_in_one_piece_and_byte_by_byte(typed: bytes, found: list[str]) -> None:
    assert KeyDecoder().feed(typed) == found
    decoder = KeyDecoder()
    assert [key for byte in typed for key in decoder.feed(bytes([byte]))] == found


def test_an_escape_alone_is_a_key_when_nothing_follows() -> None:
    decoder = KeyDecoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.is_waiting
    assert decoder.flush() == [keys.ESCAPE]
    assert not decoder.is_waiting
    assert decoder.flush() == []


# --- view

ROWS = [
    Row("db", cpu_percent=5.0, memory_bytes=300, pids=3, age_s=1),
    Row("web-1", cpu_percent=50.0, memory_bytes=100, pids=2, age_s=3),
    Row("web-2", cpu_percent=5.0, memory_bytes=200, pids=1, age_s=2),
]


def typed(view: View, *names: str, rows: list[Row] = ROWS) -> tuple[View, list[Command]]:
    done = []
    for name in names:
        view, command = press(view, name, view.arrange(rows), page=10)
        done += [command] if command else []
    return view, done


@pytest.mark.parametrize(
    ("pressed", "order"),
    [
        ((), ["web-1", "db", "web-2"]),
        (("c",), ["web-2", "db", "web-1"]),
        (("c", "c"), ["web-1", "db", "web-2"]),
        (("m",), ["db", "web-2", "web-1"]),
        (("m", "p"), ["db", "web-1", "web-2"]),
        (("a",), ["web-1", "web-2", "db"]),
        (("h",), ["db", "web-1", "web-2"]),
        (("h", "h"), ["web-2", "web-1", "db"]),
    ],
)
def test_sorting(pressed: tuple[str, ...], order: list[str]) -> None:
    view, _ = typed(View(), *pressed)
    assert [row.name for row in view.arrange(ROWS)] == order


def test_the_selection_stays_with_its_container() -> None:
    view, _ = typed(View(), keys.DOWN, "h")
    assert view.selected == "db"
    view, _ = typed(view, keys.END)
    assert view.selected == "web-2"
    view, _ = typed(view, keys.DOWN, keys.UP, keys.UP, keys.UP, keys.UP)
    assert view.selected == "db"


def test_a_filter_is_typed_kept_and_taken_away() -> None:
    view, done = typed(View(), "/", "w", "q", keys.BACKSPACE, "e")
    assert (view.mode, view.pattern, done) == (Mode.FILTER, "we", [])
    view, _ = typed(view, keys.ENTER)
    assert [row.name for row in view.arrange(ROWS)] == ["web-1", "web-2"]
    view, _ = typed(view, keys.ESCAPE)
    assert view.pattern == ""


@pytest.mark.parametrize(("key", "verb"), [("s", Verb.STOP), ("x", Verb.DESTROY)])
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_is_stopped_or_destroyed_without_a_yes(key: str, verb: Verb, *, inside: bool) -> None:
    view, _ = typed(View(), *([keys.ENTER] if inside else []), key)
    assert (view.mode, view.asked) == (Mode.CONFIRM, Command(verb, "web-1"))
    for answer in ("n", keys.ENTER, keys.ESCAPE, "q", " "):
        refused, done = typed(view, answer)
        assert done == []
        assert refused.mode is (Mode.PROCESSES if inside else Mode.TABLE)
    assert typed(view, "y")[1] == [Command(verb, "web-1")]


def test_looking_into_one_and_back() -> None:
    view, _ = typed(View(), keys.DOWN, keys.ENTER)
    assert (view.mode, view.looked_into) == (Mode.PROCESSES, "db")
    view, done = typed(view, keys.ESCAPE)
    assert (view.mode, view.looked_into, view.selected, done) == (Mode.TABLE, "", "db", [])


def test_no_key_does_anything_to_nobody() -> None:
    view, done = typed(View(), keys.ENTER, "s", "x", keys.DOWN, keys.END, rows=[])
    assert (view.mode, done) == (Mode.TABLE, [])
    assert typed(View(), "q")[1] == typed(View(), keys.INTERRUPT)[1] == [Command(Verb.QUIT)]


# --- draw


def process(number: int, status: ExitStatus | None = None) -> ProcessInfo:
    spec = ProcessSpec("sleep", ["\x1b[31mred"])
    return ProcessInfo(f"p{number}", "web-1", spec, None, status, number, 0, 0, False, False)


@pytest.mark.parametrize("width", [1, 5, 20, 40, 79, 80, 120, 300])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 10, 50])
def test_every_size_is_filled_exactly(width: int, height: int) -> None:
    rows = [replace(row, name=f"{row.name}-{number}") for number in range(10) for row in ROWS]
    picture = Picture(rows, [process(number) for number in range(30)])
    views = [
        View(),
        View(selected="db-9"),
        View(pattern="nothing"),
        View(mode=Mode.FILTER),
        View(mode=Mode.CONFIRM, asked=Command(Verb.STOP, "web-1-0")),
        View(mode=Mode.PROCESSES, looked_into="web-1-0"),
        View(mode=Mode.PROCESSES, looked_into="gone"),
    ]
    for view in views:
        lines = draw(view, picture, width, height)
        assert [len(text) for text, _ in lines] == [width] * height
    assert [len(text) for text, _ in draw(View(), Picture(), width, height)] == [width] * height


def test_the_selected_row_is_in_sight_and_marked() -> None:
    rows = [Row(f"c{number:03}") for number in range(100)]
    for number in (0, 1, 50, 98, 99):
        lines = draw(View(sort=Sort.HANDLE, selected=f"c{number:03}"), Picture(rows), 80, 10)
        marked = [text for text, style in lines[2:-1] if style == "reverse"]
        assert [text.split()[0] for text in marked] == [f"c{number:03}"]


def test_narrow_screens_keep_what_is_worth_most() -> None:
    def headings(width: int) -> list[str]:
        return draw(View(), Picture(ROWS), width, 10)[1][0].split()

    assert headings(160) == ["HANDLE", "CPU%▾", "MEMORY", "RX", "TX", "DISK", "PIDS", "AGE"]
    assert headings(49) == ["HANDLE", "CPU%▾", "MEMORY", "PIDS"]
    assert headings(16) == ["HANDLE", "CPU%▾"]


def test_processes_are_shown_without_what_a_terminal_obeys() -> None:
    ended = process(2, ExitStatus(signal=9))
    picture = Picture(
        ROWS, [ended, process(1)], {"p1": Row("web-1/p1", cpu_percent=12.5, memory_bytes=1 << 20)}
    )
    lines = draw(View(mode=Mode.PROCESSES, looked_into="web-1"), picture, 100, 10)
    text = [line.rstrip() for line, _ in lines]
    assert "web-1  cpu 50.0%" in text[0]
    assert text[2].split()[:5] == ["p1", "1", "running", "12.5", "1.0M"]
    assert text[3].split()[:4] == ["p2", "2", "signal", "9"]
    assert "\x1b" not in "".join(text)
    assert "red" in text[2]


# --- the command, where stdout is no terminal


def test_once_is_a_plain_table_of_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_fake(tmp_path) as running:
        monkeypatch.setenv("GARDEN_ADDRESS", running.address)
        assert run_command(["create", "--handle", "web"]) == 0
        capfd.readouterr()
        assert run_command(["top", "--once", "--interval", "100ms"]) == 0
        sys.stdout.flush()
        heading, row = capfd.readouterr().out.splitlines()
        assert heading.split() == ["HANDLE", "CPU%", "MEMORY", "RX", "TX", "DISK", "PIDS", "AGE"]
        assert row.split()[:3] == ["web", "0.0", "5.0M"]
        assert run_command(["top", "--sort", "colour"]) == 2
        assert run_command(["top", "--interval", "1ms"]) == 2
    assert "there are cpu, memory" in capfd.readouterr().err


def test_top_costs_other_commands_no_rich() -> None:
    program = "import sys, garden_py.cli.main; print('rich' in sys.modules, 'grpc' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False False\n"
