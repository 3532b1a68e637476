"""Commands for images: pull, ls, inspect, import, rm, prune."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render
from garden_py.cli.failures import report_failure

if TYPE_CHECKING:
    from garden_py.client import GardenClient, ImageInfo, PullProgress, RegistryAuth

app = typer.Typer(no_args_is_help=True, help="Fetch, show and remove what containers are made of.")
_READ_BYTES: Final = 1 << 20
_SHORT_ID: Final = 12

ImageArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE", help="Reference, id, or the first 12 digits of an id.", show_default=False
    ),
]


@app.command()
def pull(
    context: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE", help="e.g. docker:///busybox:1.36, oci:///srv/layout:v1.", show_default=False
        ),
    ],
    user: opt.ImageUserOption = "",
    password_file: opt.ImagePasswordOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Bring an image into the server's store, or up to date, and print its id.

    Layers that are in the store are not fetched again. Ctrl-C ends the pull; layers that have come stay.

    Kinds of references: docker://HOST/REPO:TAG, docker:///REPO:TAG (Docker Hub), oci:///DIR:TAG,
    oci-archive:///FILE, docker-archive:///FILE, /FILE.tar, preloaded+layer:/FILE.tar?layer=…; paths are the
    server's.

        garden image pull docker:///debian:12

        garden image pull --image-user me --image-password-file - docker://registry.example/app:3 < password
    """
    with opt.connect(context, address) as garden:
        found = pull_with_progress(
            garden, image, opt.registry_auth(user, password_file), show=not quiet and sys.stderr.isatty()
        )
    if output is render.OutputFormat.JSON:
        render.print_json(found)
    else:
        typer.echo(found.id)


def pull_with_progress(
    garden: GardenClient, image: str, auth: RegistryAuth | None, *, show: bool
) -> ImageInfo:
    """Pull, with a progress bar on stderr if show; the image."""
    from garden_py.client.image_values import ImageInfo

    if not show:
        return garden.images.pull(image, auth)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("resolving", total=None)
        for news in garden.images.pulling(image, auth):
            if isinstance(news, ImageInfo):
                return news
            bars.update(
                task,
                description=describe_progress(news),
                total=news.bytes or None,
                completed=news.bytes_done,
            )
    raise AssertionError("a pull ends with an image or an error")


def describe_progress(progress: PullProgress) -> str:
    """What stands before the bar."""
    if not progress.layers:
        return progress.phase
    return f"{progress.phase} {progress.layers_done}/{progress.layers} layers"


@app.command("ls")
def list_images(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only.")] = False,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """List the images in the server's store, the latest used first.

    SIZE is disk space, with layers that other images share.
    """
    with opt.connect(context, address) as garden:
        images = garden.images.list()
    if quiet:
        typer.echo("".join(f"{each.id}\n" for each in images), nl=False)
    elif output is render.OutputFormat.JSON:
        render.print_json(images)
    else:
        render.print_table(
            ["NAME", "ID", "SIZE", "LAYERS", "USED", "IN USE"],
            [row for each in images for row in _rows(each)],
        )


def _rows(image: ImageInfo) -> list[list[str]]:
    facts = [
        image.id.removeprefix("sha256:")[:_SHORT_ID],
        parse.format_size(image.bytes),
        str(len(image.layers)),
        _ago(image.used_at),
        str(image.in_use),
    ]
    return [[name, *facts] for name in image.names or ("-",)]


def _ago(moment: datetime | None) -> str:
    return "-" if moment is None else f"{parse.format_duration(datetime.now(UTC) - moment)} ago"


@app.command()
def inspect(
    context: typer.Context,
    image: ImageArgument,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show one image: names, layers, and what it says of itself."""
    with opt.connect(context, address) as garden:
        found = garden.images.inspect(image)
    if output is render.OutputFormat.JSON:
        render.print_json(found)
        return
    config = found.config
    render.print_fields(
        {
            "id": found.id,
            "names": ", ".join(found.names),
            "manifest": found.manifest_digest,
            "platform": "/".join(filter(None, (found.os, found.architecture))),
            "created": found.created,
            "size": parse.format_size(found.bytes),
            "in use": str(found.in_use),
            "user": config.user,
            "working dir": config.working_dir,
            "entrypoint": " ".join(config.entrypoint),
            "cmd": " ".join(config.cmd),
            "env": ", ".join(config.env),
            "labels": ", ".join(f"{name}={value}" for name, value in config.labels.items()),
        }
    )
    render.print_table(
        ["LAYER", "SIZE"], [[layer.diff_id, parse.format_size(layer.bytes)] for layer in found.layers]
    )


@app.command("import")
def import_tar(
    context: typer.Context,
    tar: Annotated[
        str,
        typer.Argument(
            metavar="TAR",
            help="Tar of a root file system, plain, gzip or zstd; - for stdin.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Argument(metavar="NAME[:TAG]", help="Used as store:NAME[:TAG].", show_default=False)
    ],
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Make an image of a tar of a root file system, and print its id.

    debootstrap stable root && tar -C root -c . | garden image import - debian:stable

    garden create --image store:debian:stable
    """
    with opt.connect(context, address) as garden:
        if tar == "-":
            found = garden.images.import_tar(name, _chunks(sys.stdin.buffer.fileno()))
        else:
            with Path(tar).open("rb") as file:
                found = garden.images.import_tar(name, _chunks(file.fileno()))
    if output is render.OutputFormat.JSON:
        render.print_json(found)
    else:
        typer.echo(found.id)


def _chunks(fd: int) -> Iterator[bytes]:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        while data := file.read(_READ_BYTES):
            yield data


@app.command("rm")
def remove(
    context: typer.Context,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="References, ids, or first digits.", show_default=False),
    ],
    address: opt.AddressOption = None,
) -> None:
    """Remove names, and images with their last name or by id. What containers use is refused."""
    from garden_py.client.errors import GardenError

    code = 0
    with opt.connect(context, address) as garden:
        for image in images:
            try:
                garden.images.remove(image)
            except GardenError as error:
                code = max(code, report_failure(error, about=image))
    if code:
        raise typer.Exit(code)


@app.command()
def prune(
    context: typer.Context,
    every: Annotated[bool, typer.Option("--all", "-a", help="Also images that have a name.")] = False,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Remove images that no container uses, and layers that no image has."""
    with opt.connect(context, address) as garden:
        pruned = garden.images.prune(named=every)
    if output is render.OutputFormat.JSON:
        render.print_json(pruned)
    else:
        for image in pruned.ids:
            typer.echo(image)
        render.note(f"{len(pruned.ids)} images removed, {parse.format_size(pruned.freed_bytes)} freed")
