"""Options that several commands share, and the connection they lead to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from garden_py.cli import failures, parse
from garden_py.cli.render import OutputFormat

if TYPE_CHECKING:
    from garden_py.client import GardenClient, Limits, RegistryAuth

Value = TypeVar("Value")


def given(name: str, parser: Callable[[str], Value], text: str | None) -> Value | None:
    """The value of an option that may be absent.

    Raises:
        BadInput: the parser refuses the text; says so with the option's name.
    """
    try:
        return None if text is None else parser(text)
    except parse.BadInput as error:
        raise parse.BadInput(f"{name}: {error}") from error


class Scope(StrEnum):
    """Values of --disk-scope."""

    EXCLUSIVE = "exclusive"
    TOTAL = "total"


@dataclass(frozen=True)
class Io:
    """Values of the options about transfers with the block device."""

    weight: int | None = None
    read: str | None = None
    write: str | None = None
    read_ops: int | None = None
    write_ops: int | None = None


@dataclass(frozen=True)
class Settings:
    """Options given before the command's name."""

    address: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str = ""


def settings_of(context: typer.Context) -> Settings:
    """The options given before the command's name."""
    settings = context.find_root().obj
    if not isinstance(settings, Settings):
        raise AssertionError("the main callback has set the options")
    return settings


def connect(context: typer.Context, address: str | None) -> GardenClient:
    """A client for the server that the options and the environment name; close it."""
    # Imported here: `garden --help` must not pay 100 ms for gRPC.
    from garden_py.client import GardenClient, Tls
    from garden_py.client.address import resolve_target

    settings = settings_of(context)
    tls = None
    if settings.tls_ca is not None:
        if (settings.tls_cert is None) != (settings.tls_key is None):
            raise parse.BadInput("--tls-cert and --tls-key go together: give both or neither")
        tls = Tls(settings.tls_ca, settings.tls_cert, settings.tls_key, settings.tls_server_name)
    elif settings.tls_cert is not None or settings.tls_key is not None:
        raise parse.BadInput("--tls-cert and --tls-key need --tls-ca: whose signature shall the server show?")
    target = resolve_target(address if address is not None else settings.address)
    failures.remember_address(target)
    return GardenClient(target, tls=tls)


def limits_of(
    memory: str | None,
    cpu_weight: int | None,
    cpu_quota: str | None,
    pids: int | None,
    disk: str | None = None,
    disk_inodes: int | None = None,
    disk_scope: Scope | None = None,
    io: Io | None = None,
    bandwidth_in: str | None = None,
    bandwidth_out: str | None = None,
    rlimits: Sequence[str] | None = None,
    swap: str | None = None,
) -> Limits:
    """Limits from the shared limit options."""
    from garden_py.client.values import DiskScope, Limits

    io = io or Io()
    return Limits(
        io_weight=io.weight,
        io_read_bytes_per_s=given("--io-read", parse.parse_size, io.read),
        io_write_bytes_per_s=given("--io-write", parse.parse_size, io.write),
        io_read_ops_per_s=io.read_ops,
        io_write_ops_per_s=io.write_ops,
        disk_bytes=given("--disk", parse.parse_size, disk),
        disk_inodes=disk_inodes,
        network_rx_bytes_per_s=given("--bandwidth-in", parse.parse_size, bandwidth_in),
        network_tx_bytes_per_s=given("--bandwidth-out", parse.parse_size, bandwidth_out),
        disk_scope=None if disk_scope is None else DiskScope[disk_scope.name],
        memory_bytes=given("--memory", parse.parse_size, memory),
        cpu_weight=cpu_weight,
        cpu_quota_us=given("--cpu-quota", parse.parse_cpu_quota, cpu_quota),
        pids=pids,
        rlimits=parse.parse_rlimits(rlimits or ()),
        swap_bytes=given("--swap", parse.parse_swap, swap),
    )


def registry_auth(user: str, password_file: Path | None) -> RegistryAuth | None:
    """User and password at a registry; the password never stands on a command line, which others can read.

    Raises:
        BadInput: one without the other, or no password there.
    """
    from garden_py.client.image_values import RegistryAuth

    if not user and password_file is None:
        return None
    if not user or password_file is None:
        raise parse.BadInput("--image-user and --image-password-file go together: give both or neither")
    try:
        text = sys.stdin.read() if str(password_file) == "-" else password_file.read_text()
    except UnicodeDecodeError as error:
        raise parse.BadInput(f"{password_file} is not in UTF-8") from error
    password = text.partition("\n")[0]
    if not password:
        raise parse.BadInput(f"the first line of {password_file} is empty, and is to be the password")
    return RegistryAuth(user, password)


HandleArgument = Annotated[
    str, typer.Argument(metavar="HANDLE", help="Handle of the container.", show_default=False)
]
ProcessArgument = Annotated[
    str, typer.Argument(metavar="PROCESS", help="Id of the process.", show_default=False)
]

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        envvar="GARDEN_ADDRESS",
        help="Server to talk to: unix:/path, /path or HOST:PORT.  [default: unix:/run/garden/garden.sock]",
        show_default=False,
        show_envvar=True,
    ),
]
FormatOption = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", help="table for people, json for programs."),
]

MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        "-m",
        metavar="SIZE",
        help="Memory limit of all processes together, e.g. 64M or 1GiB; 0: unlimited.",
        show_default=False,
    ),
]
SwapOption = Annotated[
    str | None,
    typer.Option(
        "--swap",
        metavar="SIZE",
        help="Swap on top of --memory, e.g. 64M, or unlimited.  [default: none]",
        show_default=False,
    ),
]
CpuWeightOption = Annotated[
    int | None,
    typer.Option(
        "--cpu-weight",
        metavar="1..10000",
        help="Relative share of the processors under contention.",
        show_default=False,
    ),
]
CpuQuotaOption = Annotated[
    str | None,
    typer.Option(
        "--cpu-quota",
        metavar="QUOTA",
        help="CPU time: 150% of one processor, or µs per period of 100000; 0: unlimited.",
        show_default=False,
    ),
]
PidsOption = Annotated[
    int | None,
    typer.Option(
        "--pids", metavar="N", min=0, help="Processes and threads at most; 0: unlimited.", show_default=False
    ),
]
DiskOption = Annotated[
    str | None,
    typer.Option(
        "--disk",
        metavar="SIZE",
        help="Disk space of what it writes, e.g. 500M; 0: unlimited.",
        show_default=False,
    ),
]
DiskInodesOption = Annotated[
    int | None,
    typer.Option(
        "--disk-inodes",
        metavar="N",
        min=0,
        help="Files and directories that it writes; 0: unlimited. Not on btrfs.",
        show_default=False,
    ),
]
BandwidthInOption = Annotated[
    str | None,
    typer.Option(
        "--bandwidth-in",
        metavar="SIZE",
        help="Bytes per second that it may receive, e.g. 10M; 0: unlimited.",
        show_default=False,
    ),
]
BandwidthOutOption = Annotated[
    str | None,
    typer.Option(
        "--bandwidth-out", metavar="SIZE", help="Bytes per second that it may send.", show_default=False
    ),
]
DiskScopeOption = Annotated[
    Scope | None,
    typer.Option(
        "--disk-scope",
        help="Whether --disk counts the image as well.  [default: exclusive]",
        show_default=False,
    ),
]
IoWeightOption = Annotated[
    int | None,
    typer.Option(
        "--io-weight",
        metavar="1..10000",
        help="Relative share of the disk under contention.",
        show_default=False,
    ),
]
IoReadOption = Annotated[
    str | None,
    typer.Option(
        "--io-read",
        metavar="SIZE",
        help="Bytes read from disk per second, e.g. 20M; 0: unlimited.",
        show_default=False,
    ),
]
IoWriteOption = Annotated[
    str | None,
    typer.Option(
        "--io-write",
        metavar="SIZE",
        help="Bytes written to disk per second; 0: unlimited. On cgroup v1 of direct writes only.",
        show_default=False,
    ),
]
IoReadOpsOption = Annotated[
    int | None,
    typer.Option(
        "--io-read-ops",
        metavar="N",
        min=0,
        help="Reads from disk per second; 0: unlimited.",
        show_default=False,
    ),
]
IoWriteOpsOption = Annotated[
    int | None,
    typer.Option(
        "--io-write-ops",
        metavar="N",
        min=0,
        help="Writes to disk per second; 0: unlimited.",
        show_default=False,
    ),
]
RlimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rlimit",
        metavar="NAME=N",
        help="Resource limit, setrlimit(2), e.g. nofile=1024, core=unlimited; repeat.",
        show_default=False,
    ),
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option(
        "--env", "-e", metavar="NAME=VALUE", help="Environment variable; repeat.", show_default=False
    ),
]
ImageUserOption = Annotated[
    str,
    typer.Option("--image-user", metavar="NAME", help="User at the image's registry.", show_default=False),
]
ImagePasswordOption = Annotated[
    Path | None,
    typer.Option(
        "--image-password-file",
        metavar="FILE",
        help="File with that user's password in its first line; - for stdin.",
        show_default=False,
    ),
]
UserOption = Annotated[
    str,
    typer.Option(
        "--user",
        "-u",
        metavar="USER",
        help="User of the container: name, uid, uid:gid or name:group.  [default: root]",
        show_default=False,
    ),
]
