"""Commands for the processes of a container: run, attach, logs, ps, signal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from garden_py.cli import failures, parse, render
from garden_py.cli import options as opt

if TYPE_CHECKING:
    from garden_py.client import Container, ProcessInfo, Stream

# Options of garden end at the first argument: what follows belongs to the program.
RUN_SETTINGS = {"allow_interspersed_args": False}
PS_HEADINGS = ("ID", "PID", "STATE", "STARTED", "USER", "STDOUT", "STDERR", "COMMAND")


def run(
    context: typer.Context,
    handle: opt.HandleArgument,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROGRAM", help="What to run; without one, what the image says.", show_default=False
        ),
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Feed it our stdin.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give it a terminal.")] = False,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print its id and leave it alone.")] = False,
    user: opt.UserOption = "",
    directory: Annotated[
        str,
        typer.Option(
            "--dir", "-w", metavar="DIR", help="Working directory, made if missing.  [default: home]"
        ),
    ] = "",
    env: opt.EnvOption = None,
    process_id: Annotated[
        str, typer.Option("--id", metavar="ID", help="Id of the process.  [default: a new one]")
    ] = "",
    request_id: Annotated[
        str,
        typer.Option("--request-id", metavar="ID", help="Makes a repeated run with the same --id harmless."),
    ] = "",
    rlimits: opt.RlimitOption = None,
    image: Annotated[
        str,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="A root file system of its own: a sidecar.  [default: the container's]",
            show_default=False,
        ),
    ] = "",
    image_user: opt.ImageUserOption = "",
    image_password_file: opt.ImagePasswordOption = None,
    from_image: Annotated[
        bool,
        typer.Option(
            "--entrypoint", help="Run the image's entrypoint; what follows HANDLE are its arguments."
        ),
    ] = False,
    mounts: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            "-v",
            metavar="[container:]SRC:DST[:ro|rw]",
            help="With --image: bind mount; repeat.",
            show_default=False,
        ),
    ] = None,
    own_limits: Annotated[
        bool, typer.Option("--own-limits", help="With --image: limits beside the container's, not within.")
    ] = False,
    memory: opt.MemoryOption = None,
    swap: opt.SwapOption = None,
    cpu_weight: opt.CpuWeightOption = None,
    cpu_quota: opt.CpuQuotaOption = None,
    pids: opt.PidsOption = None,
    disk: opt.DiskOption = None,
    disk_inodes: opt.DiskInodesOption = None,
    disk_scope: opt.DiskScopeOption = None,
    retention: Annotated[
        str | None,
        typer.Option(
            "--retention",
            metavar="SIZE",
            help="Output kept per stream.  [default: the server's]",
            show_default=False,
        ),
    ] = None,
    address: opt.AddressOption = None,
) -> None:
    """Run a program; its output and exit code are ours.

    Options go before HANDLE; everything after it is the program's. A signal's death is exit code 128 + its
    number. INT, TERM and the like are passed on; with -t the terminal is raw and Ctrl-P Ctrl-Q leaves the
    process running. 127: no such program, 126: it cannot be executed, 125: it was not started for another reason.
    The limits are this process's own, within the container's. Without PROGRAM, what the image says is
    run: its entrypoint and command, as its user, in its working directory.

        garden run web ls -l /

        garden run -it web sh

        tar c src | garden run -i --dir /build web tar x

        id=$(garden run -d web make) && garden logs -f web $id

        garden run -d --id envoy --image /images/envoy --own-limits -m 64M web /envoy
    """
    from garden_py.client.errors import GardenError
    from garden_py.client.values import ProcessSpec, Sidecar, Tty

    if detach and interactive:
        raise parse.BadInput("-d leaves the process alone, -i stays with it: give one of them")
    if not image and (mounts or own_limits or disk or disk_inodes):
        raise parse.BadInput(
            "--mount, --own-limits and --disk are for processes with an --image of their own"
        )
    terminal = tty and not detach and sys.stdin.isatty()
    rows, columns = _window_size() if terminal else (0, 0)
    argv = command or []
    argv = argv[1:] if argv[:1] == ["--"] else argv
    from_image = from_image or not argv
    auth = opt.registry_auth(image_user, image_password_file)
    own_mounts = tuple(map(parse.parse_mount, mounts or []))
    sidecar = Sidecar(image, own_mounts, own_limits, auth) if image else None
    spec = ProcessSpec(
        path="" if from_image else argv[0],
        args=tuple(argv if from_image else argv[1:]),
        from_image=from_image,
        env=_with_term(parse.parse_pairs(env or [], "environment variable"), tty),
        dir=directory,
        user=user,
        tty=Tty(rows, columns) if tty else None,
        rlimits=parse.parse_rlimits(rlimits or []),
        limits=opt.limits_of(memory, cpu_weight, cpu_quota, pids, disk, disk_inodes, disk_scope, swap=swap),
        output_retention_bytes=opt.given("--retention", parse.parse_size, retention) or 0,
        id=process_id,
        sidecar=sidecar,
    )
    with opt.connect(context, address) as garden:
        container = garden.container(handle)
        try:
            if detach:
                typer.echo(container.start(spec, request_id=request_id).id)
                return
            process = container.run(spec, request_id=request_id)
        except GardenError as error:
            raise typer.Exit(failures.report_start(error)) from error
        from garden_py.cli.terminal import Session

        if not interactive:
            process.stdin.close()
        session = Session(process, interactive=interactive, terminal=terminal and interactive, owner=True)
        raise typer.Exit(session.run())


def _window_size() -> tuple[int, int]:
    from garden_py.cli.terminal import window_size

    return window_size()


def _with_term(env: dict[str, str], tty: bool) -> dict[str, str]:
    """A program on a terminal must know which kind, and it is ours."""
    term = os.environ.get("TERM", "")
    return {"TERM": term, **env} if tty and term else env


def attach(
    context: typer.Context,
    handle: opt.HandleArgument,
    process_id: opt.ProcessArgument,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Feed it our stdin.")] = False,
    start: Annotated[
        int | None,
        typer.Option(
            "--from",
            metavar="OFFSET",
            min=0,
            help="First byte of stdout to show; 0: all.  [default: from now on]",
            show_default=False,
        ),
    ] = None,
    stderr_start: Annotated[
        int | None,
        typer.Option(
            "--stderr-from", metavar="OFFSET", min=0, help="The same for stderr.", show_default=False
        ),
    ] = None,
    address: opt.AddressOption = None,
) -> None:
    """Join a process and stay until its end.

    Running or finished; its exit code is ours.
    If it has a terminal and so have we, -i makes ours raw; Ctrl-P Ctrl-Q leaves.

        garden attach -i web $id

        garden attach --from 0 --stderr-from 0 web $id
    """
    from garden_py.cli.terminal import Session, window_size

    with opt.connect(context, address) as garden:
        process = garden.container(handle).attach(process_id, stdout_offset=start, stderr_offset=stderr_start)
        terminal = interactive and process.started.spec.tty is not None and sys.stdin.isatty()
        if terminal:
            process.resize(*window_size())
        raise typer.Exit(Session(process, interactive=interactive, terminal=terminal, owner=False).run())


def logs(
    context: typer.Context,
    handle: opt.HandleArgument,
    process_id: opt.ProcessArgument,
    start: Annotated[
        int | None,
        typer.Option(
            "--from",
            metavar="OFFSET",
            min=0,
            help="First byte to print.  [default: the first kept]",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the stream is closed.")] = False,
    stderr: Annotated[
        bool, typer.Option("--stderr", help="The process's stderr instead of its stdout.")
    ] = False,
    address: opt.AddressOption = None,
) -> None:
    """Print what a process has written.

    Byte for byte, to stdout.
    If the beginning is no longer kept and --from is not given, says on stderr how much is missing; with
    --from that is an error.

        garden logs web $id | sha256sum

        garden logs -f --from 1048576 web $id
    """
    stream = parse.stream_named(stderr)
    with opt.connect(context, address) as garden:
        container = garden.container(handle)
        offset = _first_kept(container, process_id, stream) if start is None else start
        out = sys.stdout.buffer
        for chunk in container.read_output(process_id, stream, offset=offset, follow=follow):
            out.write(chunk.data)
            out.flush()


def _first_kept(container: Container, process_id: str, stream: Stream) -> int:
    """Offset of the first byte still kept; says on stderr if that is not the first byte."""
    from garden_py.client.errors import OutOfRange

    try:
        for _ in container.read_output(process_id, stream, limit_bytes=1):
            break
    except OutOfRange as error:
        if error.first_offset is None:
            raise
        render.note(f"the first {error.first_offset} bytes are no longer kept")
        return error.first_offset
    return 0


def ps(
    context: typer.Context,
    handle: opt.HandleArgument,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """List the processes of a container.

    Those that callers started, running and finished.

    garden ps web
    """
    with opt.connect(context, address) as garden:
        processes = garden.container(handle).processes()
    if output is render.OutputFormat.JSON:
        render.print_json(processes)
        return
    render.print_table(PS_HEADINGS, [ps_row(each) for each in processes])


def ps_row(process: ProcessInfo) -> list[str]:
    """A process as a row of a table."""
    state = "running"
    if process.exit is not None:
        state = (
            f"exit {process.exit.code}" if process.exit.signal is None else f"signal {process.exit.signal}"
        )
        state += " (out of memory)" if process.exit.out_of_memory else ""
    started = process.started_at
    return [
        process.id,
        str(process.pid or ""),
        state,
        "" if started is None else started.astimezone().isoformat(sep=" ", timespec="seconds"),
        process.spec.user or "root",
        parse.format_size(process.stdout_bytes),
        parse.format_size(process.stderr_bytes),
        " ".join([process.spec.path, *process.spec.args]),
    ]


def send_signal(
    context: typer.Context,
    handle: opt.HandleArgument,
    process_id: opt.ProcessArgument,
    which: Annotated[
        str, typer.Argument(metavar="SIGNAL", help="Number or name, e.g. TERM, 9, SIGUSR1.")
    ] = "TERM",
    group: Annotated[bool, typer.Option("--group", "-g", help="The whole process group.")] = False,
    address: opt.AddressOption = None,
) -> None:
    """Send a signal to a process.

    One that has exited is no error, but is noted on stderr.

    garden signal web $id HUP
    """
    number_or_name = parse.parse_signal(which)
    with opt.connect(context, address) as garden:
        if not garden.container(handle).signal(process_id, number_or_name, group=group):
            render.note(f"process {process_id} had exited")
