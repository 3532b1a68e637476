"""A bar on stderr while bytes pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def counted(chunks: Iterable[bytes], what: str, *, total: int | None, show: bool) -> Iterator[bytes]:
    """The same chunks; meanwhile a bar on stderr says how many bytes have passed, and goes away at the end.

    Args:
        chunks: what passes.
        what: stands before the bar.
        total: bytes expected; None: nobody knows.
        show: whether there is a bar at all: not where nobody looks.
    """
    if not show:
        yield from chunks
        return
    # Here, for it takes as long to import as all the rest of a command.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        for chunk in chunks:
            yield chunk
            bars.advance(task, len(chunk))
