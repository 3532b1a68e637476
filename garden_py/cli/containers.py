"""Commands that make, show, change and destroy containers."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render
from garden_py.cli.egress import EgressAction, parse_rules
from garden_py.cli.failures import report_failure
from garden_py.cli.images import pull_with_progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from garden_py.client import AgentInfo, ContainerInfo, GardenClient

FETCHED = ("docker:", "oci:", "oci-archive:", "docker-archive:", "preloaded+layer:")
# Destroys asked for at once by one `destroy`; the server does the work, this only bounds our threads.
_PARALLEL_DESTROYS = 8


def create(
    context: typer.Context,
    handle: Annotated[
        str | None,
        typer.Option(
            "--handle",
            metavar="HANDLE",
            help="Name of the container.  [default: a new UUID]",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="Root file system: a directory or tar of the server, docker://HOST/REPO:TAG, oci:///DIR:TAG, "
            "store:NAME.  [default: the server's]",
        ),
    ] = "",
    image_user: opt.ImageUserOption = "",
    image_password_file: opt.ImagePasswordOption = None,
    privileged: Annotated[
        bool, typer.Option("--privileged", help="No user namespace, no seccomp, all capabilities.")
    ] = False,
    env: opt.EnvOption = None,
    properties: Annotated[
        list[str] | None,
        typer.Option("--property", "-p", metavar="NAME=VALUE", help="Property; repeat.", show_default=False),
    ] = None,
    mounts: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            "-v",
            metavar="[container:]SRC:DST[:ro|rw]",
            help="Bind mount, of the server's SRC, or of the container's own; repeat.",
            show_default=False,
        ),
    ] = None,
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
    grace_time: Annotated[
        str | None,
        typer.Option(
            "--grace-time",
            metavar="DURATION",
            help="Destroy it when unused this long, e.g. 10m, or never.  [default: the server's]",
            show_default=False,
        ),
    ] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option(
            "--publish", metavar="[HOST:]PORT[/udp]", help="Map a port; repeat.", show_default=False
        ),
    ] = None,
    egress_default: Annotated[
        EgressAction | None,
        typer.Option(
            "--egress-default", help="What no rule matches.  [default: the server's]", show_default=False
        ),
    ] = None,
    egress: Annotated[
        list[str] | None,
        typer.Option("--egress", metavar="RULE", help="Egress rule, in order; repeat.", show_default=False),
    ] = None,
    network: Annotated[
        str,
        typer.Option(
            "--network",
            metavar="SUBNET|ADDRESS/N|none|host",
            help="Subnet to be in, e.g. 10.1.2.0/24, or an address in it, e.g. 10.1.2.7/24; none: loopback only; "
            "host: the host's network.  [default: an address of the server's pool]",
            show_default=False,
        ),
    ] = "",
    hostname: Annotated[
        str, typer.Option("--hostname", metavar="NAME", help="Host name inside.  [default: from the handle]")
    ] = "",
    request_id: Annotated[
        str,
        typer.Option(
            "--request-id", metavar="ID", help="Makes a repeated create return the first one's container."
        ),
    ] = "",
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Make a container and print its handle.

    Returns when the container can run processes, its network works and its limits are in force. On a terminal, the
    fetch of an image shows its progress.

        garden create --handle web --memory 256M --pids 100 --publish 8080:80

        garden create --egress-default deny --egress tcp:10.0.0.0/8:443
    """
    from garden_py.client.values import ContainerSpec, EgressPolicy, NetworkMode

    named = {"none": NetworkMode.NONE, "host": NetworkMode.HOST}
    mode, subnet = (named[network], "") if network in named else (NetworkMode.OWN, network)

    io = opt.Io(io_weight, io_read, io_write, io_read_ops, io_write_ops)
    policy = None
    if egress or egress_default:
        policy = EgressPolicy((egress_default or EgressAction.SERVER).to_value(), parse_rules(egress or []))
    if handle == "":
        raise parse.BadInput("--handle is empty: give a name, or leave the option out for a new UUID")
    spec = ContainerSpec(
        handle=handle or "",
        image=image,
        privileged=privileged,
        env=parse.parse_pairs(env or [], "environment variable"),
        properties=parse.parse_pairs(properties or [], "property"),
        bind_mounts=tuple(parse.parse_mount(text) for text in mounts or []),
        limits=opt.limits_of(
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
        ),
        grace_time=opt.given("--grace-time", parse.parse_grace_time, grace_time),
        port_mappings=tuple(parse.parse_port(text) for text in publish or []),
        egress=policy,
        hostname=hostname,
        network_mode=mode,
        subnet=subnet,
        image_auth=opt.registry_auth(image_user, image_password_file),
    )
    with opt.connect(context, address) as garden:
        if image.startswith(FETCHED) and sys.stderr.isatty():
            pull_with_progress(garden, image, spec.image_auth, show=True)
        created = garden.create(spec, request_id=request_id)
        if output is render.OutputFormat.JSON:
            render.print_json(created.created)
        else:
            typer.echo(created.handle)


def list_containers(
    context: typer.Context,
    properties: Annotated[
        list[str] | None,
        typer.Option("--property", "-p", metavar="NAME=VALUE", help="Only containers with it; repeat."),
    ] = None,
    all_states: Annotated[
        bool, typer.Option("--all", "-a", help="Also those being created or destroyed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Handles only.")] = False,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """List containers.

    garden list --property owner=ci

    garden list -q | xargs -r garden destroy
    """
    wanted = parse.parse_pairs(properties or [], "property")
    with opt.connect(context, address) as garden:
        containers = list(garden.list(wanted, all_states=all_states))
    if quiet:
        typer.echo("".join(f"{each.handle}\n" for each in containers), nl=False)
    elif output is render.OutputFormat.JSON:
        render.print_json(containers)
    else:
        render.print_table(
            ["HANDLE", "STATE", "AGE", "IP", "PORTS", "PROCESSES", "IMAGE"],
            [_list_row(each) for each in containers],
        )


def _age(moment: datetime | None) -> str:
    return "" if moment is None else parse.format_duration(datetime.now(UTC) - moment)


def _list_row(container: ContainerInfo) -> list[str]:
    return [
        container.handle,
        container.state.name.lower(),
        _age(container.created_at),
        container.container_ip,
        ",".join(parse.format_port(each) for each in container.mapped_ports),
        str(len(container.process_ids)),
        container.spec.image,
    ]


def info(
    context: typer.Context,
    handle: opt.HandleArgument,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show one container.

    garden info web -o json | jq .container_ip
    """
    with opt.connect(context, address) as garden:
        container = garden.container(handle).info()
    if output is render.OutputFormat.JSON:
        render.print_json(container)
        return
    render.print_fields(info_fields(container))


def info_fields(container: ContainerInfo) -> dict[str, str]:
    """What is known of a container, in words; empty where there is nothing to say."""
    spec, image = container.spec, container.image
    return {
        "handle": container.handle,
        "state": container.state.name.lower()
        + (f" ({reason})" if (reason := container.state_reason) else ""),
        "age": _age(container.created_at),
        "image": spec.image,
        "image id": "" if image is None else image.id,
        "labels": "" if image is None else _pairs_text(image.config.labels),
        "privileged": "yes" if spec.privileged else "",
        "hostname": spec.hostname,
        "network": spec.subnet or spec.network_mode.name.lower(),
        "container ip": container.container_ip,
        "container ipv6": container.container_ipv6,
        "host ip": container.host_ip,
        "external ip": container.external_ip,
        "ports": ", ".join(parse.format_port(each) for each in container.mapped_ports),
        "limits": render.limits_text(spec.limits),
        "grace time": _grace_text(spec.grace_time),
        "mounts": ", ".join(
            f"{mount.source} -> {mount.destination} ({'rw' if mount.mode else 'ro'})"
            for mount in spec.bind_mounts
        ),
        "properties": _pairs_text(container.properties),
        "processes": ", ".join(container.process_ids),
        "events": ", ".join(container.events),
        "pid": str(container.pid or ""),
        "agent": _agent_text(container.agent),
    }


def _pairs_text(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(pairs.items()))


def _agent_text(agent: AgentInfo | None) -> str:
    if agent is None:
        return ""
    state = (
        "current"
        if agent.current
        else f"not upgraded: {agent.problem}"
        if agent.problem
        else "to be upgraded"
    )
    return f"{agent.build or 'unnamed'}, wire {agent.wire_version} ({state})"


def _grace_text(grace_time: timedelta | None) -> str:
    return parse.format_duration(grace_time) if grace_time else "never"


def stop(
    context: typer.Context,
    handle: opt.HandleArgument,
    kill: Annotated[bool, typer.Option("--kill", "-k", help="SIGKILL at once.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="DURATION",
            help="Time between SIGTERM and SIGKILL.  [default: 10s]",
            show_default=False,
        ),
    ] = None,
    address: opt.AddressOption = None,
) -> None:
    """End all processes of a container.

    The container stays and can run new ones.

    garden stop web --grace 30s
    """
    span = opt.given("--grace", parse.parse_duration, grace)
    with opt.connect(context, address) as garden:
        garden.container(handle).stop(kill=kill, grace=span)


def destroy(
    context: typer.Context,
    handles: Annotated[
        list[str] | None,
        typer.Argument(metavar="HANDLE...", help="Containers to destroy.", show_default=False),
    ] = None,
    all_containers: Annotated[bool, typer.Option("--all", help="Every container of the server.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --all: do not ask.")] = False,
    address: opt.AddressOption = None,
) -> None:
    """End and remove containers, and all they had.

    The exit code is 1 if any of them could not be destroyed; the others are destroyed all the same.

        garden destroy web worker-1 worker-2

        garden destroy --all --yes
    """
    if bool(handles) == all_containers:
        either = "either name the containers to destroy or give --all"
        raise parse.BadInput(f"{either}, not both" if handles else either)
    with opt.connect(context, address) as garden:
        wanted = list(dict.fromkeys(handles or []))
        if all_containers:
            wanted = [each.handle for each in garden.list(all_states=True)]
            if wanted and not yes:
                typer.confirm(f"Destroy {len(wanted)} containers?", abort=True, err=True)
        with ThreadPoolExecutor(_PARALLEL_DESTROYS) as pool:
            destroyed = list(pool.map(lambda handle: _destroy_one(garden, handle), wanted))
    if not all(destroyed):
        raise typer.Exit(1)


def _destroy_one(garden: GardenClient, handle: str) -> bool:
    from garden_py.client.errors import GardenError

    try:
        garden.container(handle).destroy()
    except GardenError as error:
        report_failure(error, about=handle)
        return False
    return True
