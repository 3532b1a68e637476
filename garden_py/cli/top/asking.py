"""Asks the server, in threads: the screen goes on while an answer takes its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from garden_py.cli.top.samples import Row, Samples
from garden_py.cli.top.view import Command, Verb

if TYPE_CHECKING:
    from garden_py.client import GardenClient, ProcessInfo

_DOERS = 4


@dataclass(frozen=True, slots=True)
class Look:
    """What one look has shown.

    Attributes:
        looked_into: the container whose processes were asked for; empty: nobody's.
        processes: of the container that was looked into; None: none was, or it cannot be asked.
        counted: usage of its processes that are counted by themselves, by id.
        clock: local time of it.
        problem: why a part is missing; empty: none is.
    """

    rows: list[Row]
    looked_into: str = ""
    processes: Sequence[ProcessInfo] | None = None
    counted: dict[str, Row] | None = None
    clock: str = ""
    problem: str = ""


class Asker:
    """One look at a time, and what the user wants done beside it.

    Args:
        wake: called, from a thread, when there is something to be shown.
    """

    def __init__(self, garden: GardenClient, wake: Callable[[], None]) -> None:
        self._garden = garden
        self._wake = wake
        self._samples = Samples()
        self._looker = ThreadPoolExecutor(1)
        self._doers = ThreadPoolExecutor(_DOERS)
        self._looking: Future[Look] | None = None

    def begin_look(self, handle: str) -> None:
        """Have a look, unless one is under way; handle: whose processes are wanted, too; empty: nobody's."""
        if self._looking is None:
            self._looking = self._looker.submit(self.look, handle)
            self._looking.add_done_callback(lambda _: self._wake())

    def take_look(self) -> Look | None:
        """What the look has shown that has ended; None: there is none.

        Raises:
            GardenError: the server has not answered.
        """
        if self._looking is None or not self._looking.done():
            return None
        done, self._looking = self._looking, None
        return done.result()

    def look(self, handle: str = "") -> Look:
        """One call for all containers, and one for the processes of the container that is looked into."""
        from garden_py.client.errors import GardenError

        processes, problem = None, ""
        if handle:
            try:
                processes = self._garden.container(handle).processes()
            except GardenError as error:
                problem = str(error)
        counted = [each.id for each in processes or () if each.exit is None and _is_counted(each)]
        measured = self._garden.metrics()
        if counted:
            measured = [*measured, *self._garden.metrics((), [(handle, each) for each in counted])]
        rows = self._samples.take(measured, time.monotonic())
        own = {row.name.partition("/")[2]: row for row in rows if "/" in row.name}
        containers = [row for row in rows if "/" not in row.name]
        clock = datetime.now().astimezone().strftime("%H:%M:%S")
        return Look(containers, handle, processes, own, clock, problem)

    def do(self, command: Command, tell: Callable[[str], None]) -> None:
        """Stop or destroy; tell is called, from a thread, with how it went."""
        self._doers.submit(self._do, command, tell)

    def _do(self, command: Command, tell: Callable[[str], None]) -> None:
        from garden_py.client.errors import GardenError

        container = self._garden.container(command.handle)
        acts: dict[Verb, tuple[Callable[[], Any], str]] = {
            Verb.STOP: (container.stop, "stopped"),
            Verb.DESTROY: (container.destroy, "destroyed"),
        }
        act, done = acts[command.verb]
        try:
            act()
            tell(f"{command.handle} {done}")
        except GardenError as error:
            tell(f"{command.handle}: {error}")
        self._wake()

    def close(self) -> None:
        """Wait for nothing: a call under way ends with the connection."""
        self._looker.shutdown(wait=False, cancel_futures=True)
        self._doers.shutdown(wait=False, cancel_futures=True)


def _is_counted(process: ProcessInfo) -> bool:
    """Whether it has a cgroup of its own; see GetMetrics in garden.proto."""
    from garden_py.client.values import Limits

    return process.spec.sidecar is not None or process.spec.limits != Limits()
