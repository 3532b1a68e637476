"""`garden doctor --leaks`: what differs between a server's journal and its host, with the server running or stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render

if TYPE_CHECKING:
    from garden_py.client import Leak
    from garden_py.model.leak import LeakReport

EXIT_LEAKS = 1
DEFAULT_STATE_DIR = Path("/var/lib/garden")


def report_leaks(
    context: typer.Context,
    state_dir: Path,
    address: str | None,
    output: render.OutputFormat,
    *,
    fix: bool,
) -> None:
    """Find the leaks of one server, print them, and exit with 1 if any is left."""
    found = find_leaks(context, state_dir, address, fix=fix)
    if output is render.OutputFormat.JSON:
        render.print_json(found)
    else:
        _print_table(found, fix=fix)
    if any(not leak.removed for leak in found):
        raise typer.Exit(EXIT_LEAKS)


def find_leaks(context: typer.Context, state_dir: Path, address: str | None, *, fix: bool) -> list[Leak]:
    """Ask the server if there is one, else look ourselves, which only root can: others ask the default server."""
    stated = address is not None or opt.settings_of(context).address is not None
    if not stated and not _is_written(context, "state_dir"):
        stated = bool(os.environ.get("GARDEN_ADDRESS"))  # which `connect` follows
    if not stated and os.geteuid() != 0 and state_dir != DEFAULT_STATE_DIR:
        raise parse.BadInput(f"{state_dir}: root alone may read its journal; --address asks its server")
    if not stated and os.geteuid() == 0:
        # Imported here: only this needs the server's half.
        from garden_py.model.errors import GardenError
        from garden_py.observe.log import configure_logging
        from garden_py.stopped import JOURNAL_NAME, ServerRuns, check_stopped

        configure_logging("error", "auto")  # what is found is on stdout already
        if not (state_dir / JOURNAL_NAME).exists():
            typer.echo(f"garden doctor: no garden server has used {state_dir}", err=True)
            raise typer.Exit(EXIT_LEAKS)
        try:
            return [_from_report(report) for report in check_stopped(state_dir, remove=fix)]
        except ServerRuns as running:
            address = running.address
        except GardenError as error:
            typer.echo(f"garden doctor: {error}", err=True)
            raise typer.Exit(EXIT_LEAKS) from error
    with opt.connect(context, address) as garden:
        return list(garden.check_leaks(remove=fix))


def _is_written(context: typer.Context, option: str) -> bool:
    """Whether an option is on the command line: neither its default nor from the environment."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _from_report(report: LeakReport) -> Leak:
    from garden_py.client import Leak, LeakDirection, LeakKind

    leak = report.leak
    return Leak(
        kind=LeakKind[leak.kind.name],
        direction=LeakDirection[leak.direction.name],
        name=leak.name,
        handle=leak.handle,
        detail=leak.detail,
        removed=report.removed,
        kept_because=report.kept_because,
    )


def _print_table(found: list[Leak], *, fix: bool) -> None:
    if not found:
        sys.stdout.write("no leaks: journal and host agree\n")
        return
    render.print_table(
        ["WHAT", "SIDE", "NAME", "CONTAINER", "DETAIL", "DONE"],
        [
            [
                leak.kind.name.lower().replace("_", " "),
                leak.direction.name.lower(),
                leak.name,
                leak.handle,
                leak.detail,
                _done(leak, fix=fix),
            ]
            for leak in found
        ],
    )


def _done(leak: Leak, *, fix: bool) -> str:
    if leak.removed:
        return "removed"
    return leak.kept_because or ("" if fix else "--fix removes it")
