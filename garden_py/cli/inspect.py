"""Commands that look at the server: ping, capacity, metrics, events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render
from garden_py.cli.printable import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from garden_py.client import ContainerMetrics, Event, GardenClient


def ping(context: typer.Context, address: opt.AddressOption = None) -> None:
    """Ask the server whether it serves.

    Prints its version and the time of the round trip.

    garden ping && echo ready
    """
    with opt.connect(context, address) as garden:
        begin_s = time.perf_counter()
        version = garden.ping()
        took_ms = (time.perf_counter() - begin_s) * 1000
    typer.echo(f"garden server {version} ({took_ms:.1f} ms)")


def capacity(
    context: typer.Context,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show what the server can hold, and holds.

    garden capacity -o json
    """
    with opt.connect(context, address) as garden:
        size = garden.capacity()
    if output is render.OutputFormat.JSON:
        render.print_json(size)
        return
    render.print_fields(
        {
            "containers": f"{size.containers} of {size.max_containers}",
            "ports": f"{size.ports_in_use} of {size.ports}" if size.ports else "the network plugin's",
            "memory": parse.format_size(size.memory_bytes),
            "disk": f"{parse.format_size(size.disk_free_bytes)} free of {parse.format_size(size.disk_bytes)}",
            "cpus": str(size.cpus),
        }
    )


def metrics(
    context: typer.Context,
    handles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HANDLE[/PROCESS]...",
            help="Containers, and processes that are counted by themselves.  [default: all containers]",
            show_default=False,
        ),
    ] = None,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show the usage of containers, all in one call.

    Processes with an image or with limits of their own are counted by themselves. DISK is what was written.
    The exit code is 1 if something could not be measured; the rest is shown all the same.

        garden metrics web worker-1

        garden metrics web/envoy
    """
    names = [name.partition("/") for name in handles or []]
    for handle, slash, process_id in names:
        if not handle or (slash and not process_id):
            raise parse.BadInput(f"{handle}{slash}{process_id}: a HANDLE or HANDLE/PROCESS is needed")
    with opt.connect(context, address) as garden:
        measured = garden.metrics(
            [handle for handle, slash, _ in names if not slash],
            [(handle, process_id) for handle, slash, process_id in names if slash],
        )
    if output is render.OutputFormat.JSON:
        render.print_json(measured)
    else:
        _print_metrics(measured)
    if any(each.error for each in measured):
        raise typer.Exit(1)


def _print_metrics(measured: Sequence[ContainerMetrics]) -> None:
    render.print_table(
        [
            "HANDLE",
            "AGE",
            "MEMORY",
            "LIMIT",
            "CPU",
            "THROTTLED",
            "PIDS",
            "DISK",
            "WITH IMAGE",
            "RX",
            "TX",
            "OOM",
        ],
        [_metrics_row(each) for each in measured],
    )
    for each in measured:
        if each.error:
            render.note(f"{_name(each)}: {each.error}")


def _name(usage: ContainerMetrics) -> str:
    return f"{usage.handle}/{usage.process_id}" if usage.process_id else usage.handle


def _metrics_row(usage: ContainerMetrics) -> list[str]:
    if usage.error:
        return [_name(usage), *[""] * 11]
    return [
        _name(usage),
        parse.format_duration(usage.age),
        parse.format_size(usage.memory_bytes),
        parse.format_size(usage.memory_limit_bytes) if usage.memory_limit_bytes else "",
        f"{usage.cpu_usage_ns / 1e9:.2f}s",
        f"{usage.cpu_throttled_ns / 1e9:.2f}s",
        f"{usage.pids}/{usage.pids_limit}" if usage.pids_limit else str(usage.pids),
        parse.format_size(usage.disk_exclusive_bytes),
        parse.format_size(usage.disk_total_bytes),
        parse.format_size(usage.network_rx_bytes),
        parse.format_size(usage.network_tx_bytes),
        str(usage.oom_kills),
    ]


def events(
    context: typer.Context,
    handles: Annotated[
        list[str] | None,
        typer.Option("--handle", metavar="HANDLE", help="Only this container's; repeat.", show_default=False),
    ] = None,
    _follow: Annotated[
        bool, typer.Option("--follow", "-f", hidden=True, help="Events are always followed.")
    ] = False,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", metavar="N", min=1, help="Stop after N events.", show_default=False),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(
            "--after",
            metavar="CURSOR",
            min=0,
            help="Also past events after this cursor; 0: all that are kept.",
            show_default=False,
        ),
    ] = None,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Print what happens, until interrupted.

    Containers made and destroyed, processes started and exited, memory run out, connections refused, … Goes on
    across a restart of the server without a gap, but for connections while there was none.

        garden events --handle web -o json | jq .kind
    """
    from garden_py.client.values import EventKind

    printed = 0
    with opt.connect(context, address) as garden:
        for event in _events(garden, handles or [], after):
            if event.kind is EventKind.WATCHING:
                continue
            if output is render.OutputFormat.JSON:
                render.print_json_line(event)
            else:
                typer.echo(plain(_event_text(event)))
            printed += 1
            if printed == count:
                return


def _events(garden: GardenClient, handles: list[str], after: int | None) -> Iterator[Event]:
    from garden_py.client.errors import OutOfRange

    try:
        yield from garden.events(handles, after_cursor=after)
    except OutOfRange as error:
        if after != 0 or error.first_offset is None:
            raise
        yield from garden.events(handles, after_cursor=error.first_offset)


def _event_text(event: Event) -> str:
    moment = "" if event.at is None else event.at.astimezone().isoformat(sep=" ", timespec="milliseconds")
    words = [
        moment,
        str(event.cursor),
        event.kind.name.lower().replace("_", " "),
        event.handle,
        event.process_id,
    ]
    if event.exit is not None:
        words.append(event.exit.reason or f"exit {event.exit.shell_code}")
    words += [f"{name}={value}" for name, value in sorted(event.details.items())]
    return "  ".join(word for word in words if word)
