"""Directories of containers, rubbish, agents' sockets and the OCI runtime's records."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from garden_py.backend.depot import TRASH_NAME, Depot, why_foreign
from garden_py.backend.ledger.book import Book
from garden_py.model.leak import Direction, Leak, LeakKind

_SOCKET_NAME = re.compile(r"[0-9a-f]{24}\.sock")
_RUNTIME_ID = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{12})?")  # a sidecar's begins with its container's
_NOT_OURS = "no garden server makes such a thing: "


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen: name to why it cannot be the server's, "" if it can. Claimed ones are not examined.

    Attributes:
        containers: below `containers/`, by handle.
        trash: below `trash/`, unless it is being emptied.
        sockets: by file name.
        runtimes: by `<runtime>/<id>`.
        volumes: by the runtime's id of what they belong to.
        socket_names: file name of each claimed container's socket, by handle.
    """

    containers: dict[str, str] = field(default_factory=dict)
    trash: dict[str, str] = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    runtimes: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, str] = field(default_factory=dict)
    socket_names: dict[str, str] = field(default_factory=dict)


def look(depot: Depot, runtime_roots: Iterable[Path], volumes: Path, handles: set[str]) -> Sight:
    """Read the directories.

    Args:
        depot: of the server.
        runtime_roots: state directories of OCI runtimes; those that do not exist are empty.
        volumes: directory of volumes; if it does not exist there are none.
        handles: claimed when the look began.
    """
    return Sight(
        containers=_examine(depot.containers, lambda path: "" if path.name in handles else why_foreign(path)),
        trash={} if depot.sweeping else _examine(depot.trash, _why_no_rubbish),
        sockets=_examine(depot.agents, _why_no_socket),
        runtimes={
            f"{root.name}/{name}": why
            for root in runtime_roots
            for name, why in _examine(root, _why_no_runtime).items()
        },
        volumes=_examine(volumes, _why_no_runtime),
        socket_names={handle: depot.socket(handle).name for handle in handles},
    )


def _examine(directory: Path, why: Callable[[Path], str]) -> dict[str, str]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return {}
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = why(directory / name)
        except FileNotFoundError:
            continue  # gone since the listing
    return found


def _why_no_rubbish(path: Path) -> str:
    return "" if TRASH_NAME.fullmatch(path.name) else "its name"


def _why_no_socket(path: Path) -> str:
    if not _SOCKET_NAME.fullmatch(path.name):
        return "its name"
    return "" if stat.S_ISSOCK(path.lstat().st_mode) else "it is not a socket"


def _why_no_runtime(path: Path) -> str:
    if not _RUNTIME_ID.fullmatch(path.name):
        return "its name"
    return "" if stat.S_ISDIR(path.lstat().st_mode) else "it is not a directory"


def judge(book: Book, seen: Sight) -> list[Leak]:
    """Files that no row claims, and files that a row lacks."""
    claimed_sockets = {seen.socket_names[handle] for handle in book.handles if handle in seen.socket_names}
    orphans: list[Leak] = []

    def orphan(kind: LeakKind, name: str, why: str, handle: str = "") -> None:
        keep = f"{_NOT_OURS}{why}" if why else ""
        orphans.append(Leak(kind, Direction.ORPHAN, name, handle, keep_because=keep))

    for handle, why in seen.containers.items():
        if handle not in book.handles:
            orphan(LeakKind.DIRECTORY, f"containers/{handle}", why, "" if why else handle)
    for name, why in seen.trash.items():
        orphan(LeakKind.DIRECTORY, f"trash/{name}", why)
    for name, why in seen.sockets.items():
        if name not in claimed_sockets:
            orphan(LeakKind.SOCKET, name, why)
    for path, why in seen.runtimes.items():
        if book_id(path.rpartition("/")[2]) not in book.runtime_ids:
            orphan(LeakKind.RUNTIME, path, why)
    for name, why in seen.volumes.items():
        if book_id(name) not in book.runtime_ids:
            orphan(LeakKind.DIRECTORY, f"volumes/{name}", why)
    return orphans + _missing(book, seen)


def book_id(runtime_id: str) -> str:
    """The id that a row knows: of the container itself, also for its sidecars."""
    return runtime_id.partition("-")[0]


def _missing(book: Book, seen: Sight) -> list[Leak]:
    found: list[Leak] = []
    runtime_ids = {path.rpartition("/")[2] for path in seen.runtimes}
    for holding in book.settled:
        lacking = {
            (LeakKind.DIRECTORY, f"containers/{holding.handle}"): holding.handle not in seen.containers,
            (LeakKind.SOCKET, seen.socket_names.get(holding.handle, "")): (
                seen.socket_names.get(holding.handle) not in seen.sockets
            ),
            (LeakKind.RUNTIME, holding.runtime_id): holding.runtime_id not in runtime_ids,
        }
        found += [
            Leak(kind, Direction.MISSING, name, holding.handle)
            for (kind, name), lacks in lacking.items()
            if lacks
        ]
    return found


def remove_runtime(root: Path, name: str) -> None:
    """Remove a runtime's record; gone is fine. OSError names what cannot be removed."""
    try:
        shutil.rmtree(root / name)
    except FileNotFoundError:
        return
