"""Changes in several steps that are made as a whole or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import structlog

from garden_py.model.errors import GardenError

log = structlog.get_logger()


@asynccontextmanager
async def all_or_nothing(what: str, handle: str) -> AsyncIterator[AsyncExitStack]:
    """A stack of what takes the steps of a change back; it does so, the last one first, if the body fails.

    What cannot be taken back is noted on the failure, and keeps nothing else from being taken back.

    Args:
        what: is changed, for the log.
        handle: of the container.
    """
    undo = AsyncExitStack()
    try:
        yield undo
    except BaseException as failure:
        try:
            await undo.aclose()
        except (GardenError, OSError) as error:
            failure.add_note(f"taking the change back failed too: {error}")
            log.error("container.change_not_undone", what=what, handle=handle, error=str(error))
        raise
