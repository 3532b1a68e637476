"""The `cp` command: files and directories into and out of containers, with the rules of `docker cp`.

SRC is a file        DST is a directory, or ends with / : DST/NAME        else: the file DST
SRC is a directory   DST is a directory: DST/NAME       DST is missing: DST itself becomes the copy
SRC ends with /.     the directory's contents into DST
-                    a tar stream on stdin (unpacked into DST) or on stdout
"""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse
from garden_py.cli.progress import counted

if TYPE_CHECKING:
    from garden_py.client import Container

_STDIO: Final = "-"
_READ_BYTES: Final = 256 << 10


class Kind(Enum):
    """What stands at a path."""

    MISSING = "missing"
    DIRECTORY = "directory"
    OTHER = "other"


def cp(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="HANDLE:PATH, a local path, or - for a tar on stdin.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="HANDLE:PATH, a local path, or - for a tar on stdout.")
    ],
    user: opt.UserOption = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    address: opt.AddressOption = None,
) -> None:
    """Copy files into or out of a container.

    As one of the container's users. Holes of sparse files, hard links and users' extended attributes are
    kept, owners are not. On a terminal a bar shows how far it is. A local path with a colon is written
    ./so:. What a container sends is never written outside DST.

        garden cp ./src web:/build           # /build/src if /build exists, else /build

        garden cp web:/build/out/. ./out

        garden cp web:/var/log - | tar t
    """
    from_handle, from_path = parse.parse_place(source)
    to_handle, to_path = parse.parse_place(target)
    if (from_handle is None) == (to_handle is None):
        raise parse.BadInput("one of SRC and DST is HANDLE:PATH, the other a local path or -")
    show = not quiet and sys.stderr.isatty()
    with opt.connect(context, address) as garden:
        if to_handle is not None:
            _copy_in(garden.container(to_handle), from_path, to_path, user, show=show)
        elif from_handle is not None:
            _copy_out(garden.container(from_handle), from_path, to_path, user, show=show)


def place_copy(source_name: str, target: str, kind: Kind, *, source_is_directory: bool) -> tuple[str, str]:
    """Directory to copy into and name of the copy there. Pure.

    Args:
        source_name: last part of the source's path; ".": the contents of a directory.
        target: path as given.
        kind: what stands at target.
        source_is_directory: whether the source is one.

    Raises:
        BadInput: a directory cannot take the place of a file.
    """
    if source_is_directory and kind is Kind.OTHER:
        raise parse.BadInput(f"{target} is not a directory")
    if source_name == ".":
        return target, "."
    if kind is Kind.DIRECTORY or target.endswith("/"):
        return target, source_name
    directory, _, name = target.rpartition("/")
    if name in (".", ".."):
        return target, source_name
    return (directory or ("/" if target.startswith("/") else ".")), name


def _copy_in(container: Container, source: str, target: str, user: str, *, show: bool) -> None:
    from garden_py.client import tar_pack

    if source == _STDIO:
        chunks = counted(_stdin_chunks(), f"to {target}", total=None, show=show)
        container.stream_in(chunks, path=target, user=user)
        return
    path = Path(source)
    if not path.exists():
        raise parse.BadInput(f"{source}: no such file or directory")
    name = "." if source.endswith("/.") or source == "." else path.absolute().name
    directory, name = place_copy(
        name, target, _kind_in_container(container, target, user), source_is_directory=path.is_dir()
    )
    packed = tar_pack.pack(path, name)
    total = tar_pack.count_bytes(path) if show else None
    container.stream_in(counted(packed, source, total=total, show=show), path=directory, user=user)


def _stdin_chunks() -> Iterator[bytes]:
    while data := sys.stdin.buffer.read(_READ_BYTES):
        yield data


def _copy_out(container: Container, source: str, target: str, user: str, *, show: bool) -> None:
    from garden_py.client import tarball

    contents = source.endswith("/.")
    wire_path = source[:-1] if contents else source.rstrip("/") or "/"
    chunks = counted(container.stream_out(wire_path, user=user), source, total=None, show=show)
    if target == _STDIO:
        if sys.stdout.isatty():
            raise parse.BadInput("a tar on a terminal is of no use to anybody: say `> FILE` or `| tar t`")
        _write_chunks(chunks)
        return
    is_directory = contents or _kind_in_container(container, wire_path, user) is Kind.DIRECTORY
    name = "." if contents else posixpath.basename(wire_path)
    directory, name = place_copy(name, target, _kind_of(Path(target)), source_is_directory=is_directory)
    tarball.unpack(chunks, Path(directory), "" if name == "." else name)


def _write_chunks(chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


def _kind_of(path: Path) -> Kind:
    if path.is_dir():
        return Kind.DIRECTORY
    return Kind.OTHER if path.exists() else Kind.MISSING


def _kind_in_container(container: Container, path: str, user: str) -> Kind:
    """Look at the first header of a tar of path: the image may hold no program that could be asked."""
    import tarfile

    from garden_py.client.errors import NotFound

    stream = container.stream_out(path.rstrip("/") or "/", user=user)
    try:
        head = b""
        while len(head) < tarfile.BLOCKSIZE and (chunk := next(stream, b"")):
            head += chunk
        member = tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except NotFound as error:
        if error.code == "CONTAINER_NOT_FOUND":
            raise
        return Kind.MISSING
    finally:
        close = getattr(stream, "close", None)  # a generator's: leaving it ends the call
        if close is not None:
            close()
    return Kind.DIRECTORY if member.isdir() else Kind.OTHER
