"""`garden`: the command line. Every command lives in the module named after what it is about.

Starting fast is a feature: gRPC and the client are imported by the command that uses them, the server only by
`garden server`. tests/unit/test_cli_startup.py holds that.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from garden_py.cli import containers, copying, diagnose, egress, failures, images, inspect, processes, tune
from garden_py.cli.options import Settings
from garden_py.cli.parse import BadInput
from garden_py.cli.top.command import top

_WALK_THROUGH = """
A first walk, with a server running (`garden server` as root):

\b
    garden create --handle web --memory 256M      make a container
    garden run web echo hello                     run a program in it
    garden run -it web sh                         a shell; Ctrl-P Ctrl-Q leaves it running
    garden cp ./site web:/srv                     copy files in
    garden run -d web httpd -f -h /srv            start and leave alone; prints the process's id
    garden ps web                                 what runs
    garden publish web 8080:80                    open a port of the host
    garden egress set web --default deny          close the network outwards
    garden metrics web                            what it uses
    garden top                                    what all of them use, live
    garden inspect web                            all there is to know about it
    garden destroy web                            and away with it

`garden doctor` says what this host can do. `garden COMMAND --help` has examples.

\b
Exit codes: 0 done, 1 failed, 2 bad input. `run` and `attach` pass on the process's
own code; 128 + N when signal N ended it. `run`: 127 no such program, 126 it cannot
be executed, 125 it was not started for another reason.
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"garden {version('garden-py')}")
        raise typer.Exit


app = typer.Typer(
    name="garden",
    help="Containers for programs that start, feed, limit and throw away containers all day.",
    epilog=_WALK_THROUGH,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The parent of typer's errors about the command line; typer gives it no public name of its own.
_UsageError: Any = typer.BadParameter.__base__


@app.callback()
def settings(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="ADDRESS", help="Server to talk to, for any command.", show_default=False
        ),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="GARDEN_TLS_CA", help="Use TLS; trust these certificates (PEM)."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="GARDEN_TLS_CERT", help="Our certificate (PEM).")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="GARDEN_TLS_KEY", help="Our private key (PEM).")
    ] = None,
    tls_server_name: Annotated[
        str, typer.Option(metavar="NAME", help="Name to expect in the server's certificate.")
    ] = "",
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version of this command."
        ),
    ] = False,
) -> None:
    """Containers for programs that start, feed, limit and throw away containers all day."""
    context.obj = Settings(address, tls_ca, tls_cert, tls_key, tls_server_name)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    rich_help_panel="Server",
)
def server(context: typer.Context) -> None:
    """Serve containers on this host (as root)."""
    gc.disable()  # what a start makes stays; looking through it for garbage is a tenth of it (see wiring.serve)
    from garden_py.cli import serve

    _hand_over(context, serve.server)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    rich_help_panel="Server",
)
def doctor(context: typer.Context) -> None:
    """Check what this host can do for containers, or what a server has left on it."""
    from garden_py.cli.doctor.command import doctor as examine

    _hand_over(context, examine)


def _hand_over(context: typer.Context, function: Any) -> None:
    """Let a command that was imported just now parse its own arguments."""
    inner = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    inner.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    settings = context.find_root().obj
    code = inner(args=context.args, prog_name=context.command_path, standalone_mode=False, obj=settings)
    if code:
        raise typer.Exit(code)


app.command("create")(containers.create)
app.command("run", context_settings=processes.RUN_SETTINGS)(processes.run)
app.command("attach")(processes.attach)
app.command("logs")(processes.logs)
app.command("ps")(processes.ps)
app.command("signal")(processes.send_signal)
app.command("cp")(copying.cp)
app.add_typer(images.app, name="image")
app.command("list")(containers.list_containers)
app.command("info")(containers.info)
app.command("inspect")(diagnose.inspect)
app.command("diagnose")(diagnose.diagnose)
app.command("metrics")(inspect.metrics)
app.command("top")(top)
app.command("events")(inspect.events)
app.command("limits")(tune.limits)
app.add_typer(egress.app, name="egress")
app.command("publish")(tune.publish)
app.add_typer(tune.properties, name="properties")
app.command("grace-time")(tune.grace_time)
app.command("stop")(containers.stop)
app.command("destroy")(containers.destroy)
app.command("capacity")(inspect.capacity)
app.command("ping")(inspect.ping)


_TOO_LARGE = "Value out of range: "
"""What protobuf says of a number that its field in a message to the server cannot hold."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: without the program's name; None: sys.argv.
    """
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors a user can act on become one line on stderr."""
    # gRPC writes connection chatter to stderr, which belongs to the processes we run.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = app(args=arguments, prog_name="garden", standalone_mode=False)
    except KeyboardInterrupt:  # while the command line was put together
        return failures.EXIT_INTERRUPTED
    except typer.Abort:
        failures.report("aborted")
        return failures.EXIT_FAILED
    except BadInput as error:
        failures.report(str(error))
        return failures.EXIT_BAD_INPUT
    except BrokenPipeError:
        # Nobody reads our stdout any more; keep the interpreter from complaining when it flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failures.EXIT_FAILED
    except OSError as error:
        failures.report(str(error))
        return failures.EXIT_FAILED
    except _UsageError as error:
        text = error.format_message()
        if text.startswith("Usage:"):  # a group without a command: the error is its help
            sys.stderr.write(f"{text}\n")
        else:
            failures.report(f"{text} (see `{_command_of(error)} --help`)")
        return failures.EXIT_BAD_INPUT
    except Exception as error:
        # Imported here and not above: only a command that talked to a server can have raised it.
        from garden_py.client.address import BadAddress
        from garden_py.client.errors import GardenError

        if isinstance(error, BadAddress):
            failures.report(str(error))
            return failures.EXIT_BAD_INPUT
        if isinstance(error, GardenError):
            return failures.report_failure(error)
        if isinstance(error, ValueError) and str(error).startswith(_TOO_LARGE):
            failures.report(f"{str(error).removeprefix(_TOO_LARGE)} is too large a number")
            return failures.EXIT_BAD_INPUT
        if isinstance(error, UnicodeEncodeError):  # PEP 383: bytes of an argument that are no UTF-8
            failures.report(f"{os.fsencode(error.object)!r} is no UTF-8, and cannot be sent to the server")
            return failures.EXIT_BAD_INPUT
        raise
    return code if isinstance(code, int) else 0


def _command_of(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "garden"
