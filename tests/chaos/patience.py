"""Which error is nobody's fault: told from what was being attacked at the time. Anything else is a failure."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from chaos.board import Board, Failure, Hurt, InputLost, Subject
from garden_py.client.errors import Cancelled, GardenError, Unavailable

T = TypeVar("T")
# One answer; the longest own deadline of the server is that of a start in an agent that does not answer (30 s).
ANSWER_S: Final = 45.0
# All tries together.
PATIENCE_S: Final = 90.0

SERVER: Final = frozenset({"server-kill", "server-term"})
LAUNCHER: Final = frozenset({"launcher-kill", "worker-kill"})
DISK: Final = frozenset({"disk-full"})
EXCUSES: Final[dict[str, frozenset[str]]] = {
    "": SERVER,  # no details: the connection broke
    "SHUTTING_DOWN": SERVER,
    "HOST_FAULT": LAUNCHER | DISK | {"runtime-kill", "puller-kill", "nft-table"},
    "IMAGE_UNREACHABLE": LAUNCHER | {"puller-kill"},
    "UNKILLABLE": LAUNCHER | DISK | {"nft-table"},
    "COPY_FAILED": DISK,
    # A create that was cut short is being removed by the next server.
    "HANDLE_IN_USE": SERVER | LAUNCHER | DISK | {"runtime-kill"},
    "CONTAINER_BUSY": frozenset(),
}


def is_typed(error: GardenError) -> bool:
    """Whether the server said what it is, as it must for whatever it can foresee."""
    return bool(error.code) or isinstance(error, Unavailable | Cancelled)


async def persist(board: Board, subject: Subject, what: str, act: Callable[[], Awaitable[T]]) -> T:
    """Do something until it is answered, over restarts of the server and whatever else is done to it.

    Raises:
        Hurt: it failed, as it may, since the container was broken on purpose.
        Failure: it failed and should not have, or was not answered in time.
    """
    deadline = time.monotonic() + PATIENCE_S
    pause_s = 0.02
    while True:
        began = time.monotonic()
        subject.doing = what
        try:
            async with asyncio.timeout(ANSWER_S):
                return await act()
        except GardenError as error:
            board.met[error.code or error.status] += 1
            if not is_typed(error):
                raise Failure(f"{what}: untyped {error.status}: {error}") from error
            if error.code == "OFFSET_UNKNOWN" and board.overlapped(SERVER, began):
                raise InputLost(what) from error
            if not excused(board, error, began):
                if subject.hurt:
                    raise Hurt(f"{what}: {error}") from error
                raise Failure(f"{what}: {error.status} {error.code}: {error}") from error
            if time.monotonic() > deadline:
                raise Failure(f"{what}: still after {PATIENCE_S} s: {error.status} {error}") from error
        except TimeoutError as error:
            board.dump()
            raise Failure(f"{what}: no answer in {ANSWER_S} s (hurt by {subject.hurt})") from error
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
        pause_s = min(pause_s * 2, 0.2)


def excused(board: Board, error: GardenError, began: float) -> bool:
    """Whether an attack explains this error of a call that began then."""
    if error.code == "POOL_EXHAUSTED":
        return True  # the pools are small on purpose
    return board.overlapped(EXCUSES.get(error.code, frozenset()), began)
