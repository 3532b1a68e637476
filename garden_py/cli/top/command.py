"""The command `garden top`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render
from garden_py.cli.failures import failure_text
from garden_py.cli.top.asking import Asker, Look
from garden_py.cli.top.draw import HEADINGS, Picture, body_height, cells, draw
from garden_py.cli.top.view import Sort, Verb, View, press

if TYPE_CHECKING:
    from garden_py.cli.top.screen import Screen
    from garden_py.client import GardenClient

_NEWS_S = 5.0


def top(
    context: typer.Context,
    interval: Annotated[
        str, typer.Option("--interval", "-i", metavar="DURATION", help="Time between two looks.")
    ] = "1s",
    sort: Annotated[
        str,
        typer.Option("--sort", metavar="COLUMN", help="cpu, memory, network, disk, pids, age or handle."),
    ] = "cpu",
    pattern: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only handles with this in them.")
    ] = "",
    once: Annotated[
        bool, typer.Option("--once", help="Print one plain table; also where stdout is no terminal.")
    ] = False,
    address: opt.AddressOption = None,
) -> None:
    """Watch what containers use: CPU, memory, network, disk, processes.

    100 % is one whole processor; rates are those since the last look. Keys: c m n d p a h sort, once more reverses;
    / filters; Enter shows the processes of a container; s stops and x destroys one, after a question; q quits.

        garden top --interval 500ms

        garden top --once --sort memory
    """
    span_s = parse.parse_duration(interval).total_seconds()
    if not 0.1 <= span_s <= 3600:
        raise parse.BadInput("--interval is 100ms to 1h")
    view = View(sort=_sort_named(sort), pattern=pattern)
    with opt.connect(context, address) as garden:
        if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
            _print_once(garden, view, span_s)
            return
        from garden_py.cli.top.screen import Screen

        with Screen() as screen:
            _Top(garden, screen, view, span_s).run()


def _sort_named(name: str) -> Sort:
    try:
        return Sort[name.upper()]
    except KeyError:
        known = ", ".join(sort.name.lower() for sort in Sort)
        raise parse.BadInput(f"--sort {name}: no such column; there are {known}") from None


def _print_once(garden: GardenClient, view: View, span_s: float) -> None:
    """Two looks, for rates need two."""
    asker = Asker(garden, lambda: None)
    try:
        asker.look()
        time.sleep(span_s)
        rows = view.arrange(asker.look().rows)
    finally:
        asker.close()
    render.print_table(HEADINGS, [cells(row) for row in rows])
    for row in rows:
        if row.error:
            render.note(f"{row.name}: {row.error}")


class _Top:
    """The live table: keys and looks change what is shown."""

    def __init__(self, garden: GardenClient, screen: Screen, view: View, span_s: float) -> None:
        self._screen = screen
        self._view = view
        self._span_s = span_s
        self._asker = Asker(garden, screen.wake)
        self._picture = Picture()
        self._news: tuple[str, float] = ("", 0.0)  # and until when

    def run(self) -> None:
        """Until the user has enough."""
        next_look_s = time.monotonic()
        try:
            while True:
                if time.monotonic() >= next_look_s:
                    self._asker.begin_look(self._view.looked_into)
                    next_look_s = time.monotonic() + self._span_s
                self._see()
                width, height = self._screen.size
                self._screen.show(draw(self._view, self._picture, width, height))
                looked_into = self._view.looked_into
                if self._quit_by(self._screen.wait_for_keys(next_look_s), height):
                    return
                if self._view.looked_into != looked_into:
                    self._picture = replace(self._picture, processes=None)
                    next_look_s = time.monotonic()
        except EOFError:
            return
        finally:
            self._asker.close()

    def _see(self) -> None:
        """Take what the last look has shown."""
        from garden_py.client.errors import GardenError

        try:
            look = self._asker.take_look()
        except GardenError as error:
            self._tell(failure_text(error).partition("\n")[0])
        else:
            if look is not None:
                self._take(look)
        news, until_s = self._news
        self._picture = replace(self._picture, message=news if time.monotonic() < until_s else "")

    def _take(self, look: Look) -> None:
        self._picture = Picture(look.rows, clock=look.clock)
        if look.looked_into == self._view.looked_into:  # else the user has gone on meanwhile
            self._picture = replace(self._picture, processes=look.processes, counted=look.counted or {})
        if look.problem:
            self._tell(look.problem)

    def _tell(self, text: str) -> None:
        self._news = (text, time.monotonic() + _NEWS_S)

    def _quit_by(self, keys: list[str], height: int) -> bool:
        """Do what was typed; whether that is to quit."""
        for key in keys:
            shown = self._view.arrange(self._picture.rows)
            self._view, command = press(self._view, key, shown, body_height(height))
            if command is None:
                continue
            if command.verb is Verb.QUIT:
                return True
            self._tell(f"{command.verb.value} {command.handle} …")
            self._asker.do(command, self._tell)
        return False
