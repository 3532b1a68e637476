"""Commands that change a running container: limits, grace time, ports, properties."""

from __future__ import annotations

from typing import Annotated

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render

properties = typer.Typer(no_args_is_help=True, help="Show, set and remove the properties of a container.")


def limits(
    context: typer.Context,
    handle: opt.HandleArgument,
    memory: opt.MemoryOption = None,
    swap: opt.SwapOption = None,
    cpu_weight: opt.CpuWeightOption = None,
    cpu_quota: opt.CpuQuotaOption = None,
    pids: opt.PidsOption = None,
    disk: opt.DiskOption = None,
    disk_inodes: opt.DiskInodesOption = None,
    disk_scope: opt.DiskScopeOption = None,
    bandwidth_in: opt.BandwidthInOption = None,
    bandwidth_out: opt.BandwidthOutOption = None,
    io_weight: opt.IoWeightOption = None,
    io_read: opt.IoReadOption = None,
    io_write: opt.IoWriteOption = None,
    io_read_ops: opt.IoReadOpsOption = None,
    io_write_ops: opt.IoWriteOpsOption = None,
    rlimits: opt.RlimitOption = None,
    process: Annotated[
        str,
        typer.Option(
            "--process",
            metavar="PROCESS",
            help="Of this process alone: its --rlimit, and the rest if it has an image or was started with limits.",
        ),
    ] = "",
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show or change limits, as the kernel has them.

    An --rlimit is in force in what runs already, too: in the whole container but where a process was given its own, or
    in a process and its children.

    garden limits web

    garden limits web --memory 512M --cpu-quota 150% --bandwidth-out 10M

    garden limits web --process worker --memory 64M --rlimit nofile=4096
    """
    from garden_py.client.values import Limits

    io = opt.Io(io_weight, io_read, io_write, io_read_ops, io_write_ops)
    changed = opt.limits_of(
        memory,
        cpu_weight,
        cpu_quota,
        pids,
        disk,
        disk_inodes,
        disk_scope,
        io,
        bandwidth_in,
        bandwidth_out,
        rlimits,
        swap,
    )
    with opt.connect(context, address) as garden:
        container = garden.container(handle)
        asks = changed == Limits()
        in_force = container.limits(process) if asks else container.update_limits(changed, process)
    if output is render.OutputFormat.JSON:
        render.print_json(in_force)
    else:
        typer.echo(render.limits_text(in_force))


def grace_time(
    context: typer.Context,
    handle: opt.HandleArgument,
    duration: Annotated[str, typer.Argument(metavar="DURATION", help="10m, 2h, … or never.")],
    address: opt.AddressOption = None,
) -> None:
    """Destroy a container when unused for so long.

    garden grace-time web 30m

    garden grace-time web never
    """
    span = parse.parse_grace_time(duration)
    with opt.connect(context, address) as garden:
        garden.container(handle).set_grace_time(span or None)


def publish(
    context: typer.Context,
    handle: opt.HandleArgument,
    ports: Annotated[list[str], typer.Argument(metavar="[HOST:]CONTAINER[/udp]...", help="Ports to map.")],
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Map ports of the host into a container.

    Prints each mapping.

    garden publish web 8080:80

    garden publish web 53/udp
    """
    wanted = [parse.parse_port(text) for text in ports]
    with opt.connect(context, address) as garden:
        container = garden.container(handle)
        mapped = [
            container.map_port(each.container_port, host_port=each.host_port, protocol=each.protocol)
            for each in wanted
        ]
    if output is render.OutputFormat.JSON:
        render.print_json(mapped)
    else:
        typer.echo("\n".join(parse.format_port(each) for each in mapped))


@properties.command("get")
def properties_get(
    context: typer.Context,
    handle: opt.HandleArgument,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one's value.")] = None,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Print all properties, or the value of one.

    Exit code 1 if there is no such property.

    garden properties get web owner
    """
    with opt.connect(context, address) as garden:
        found = garden.container(handle).properties()
    if name is not None:
        if name not in found:
            render.note(f"container {handle} has no property {name!r}")
            raise typer.Exit(1)
        if output is render.OutputFormat.JSON:
            render.print_json(found[name])
        else:
            typer.echo(found[name])
    elif output is render.OutputFormat.JSON:
        render.print_json(found)
    else:
        typer.echo("".join(f"{key}={value}\n" for key, value in sorted(found.items())), nl=False)


@properties.command("set")
def properties_set(
    context: typer.Context,
    handle: opt.HandleArgument,
    pairs: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Properties to set.")],
    address: opt.AddressOption = None,
) -> None:
    """Set properties, all in one step.

    garden properties set web owner=ci stage=test
    """
    to_set = parse.parse_pairs(pairs, "property")
    with opt.connect(context, address) as garden:
        garden.container(handle).update_properties(to_set)


@properties.command("rm")
def properties_rm(
    context: typer.Context,
    handle: opt.HandleArgument,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Properties to remove.")],
    address: opt.AddressOption = None,
) -> None:
    """Remove properties; absent ones are no error.

    garden properties rm web stage
    """
    with opt.connect(context, address) as garden:
        garden.container(handle).update_properties(remove=names)
