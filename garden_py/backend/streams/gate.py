"""What keeps a process from running before it has been recorded."""

from __future__ import annotations

import os
from collections.abc import Callable


class Gate:
    """A pipe on which a child waits before exec: one byte lets it run, the end without one lets it go.

    So a process can be prepared while it is still being recorded, and none that is not recorded ever runs, whenever
    this server may be killed.

    Args:
        record: called by `open` before the byte is written.
    """

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record
        self.failure: Exception | None = None
        self.child_end, self._own_end = os.pipe2(os.O_CLOEXEC)

    def open(self) -> None:
        """Let the program run, if it can be recorded; else `failure` says why not, and the agent answers soon."""
        try:
            self._record()
            os.write(self._own_end, b"\n")
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for the agent's answer
            self.failure = error
        finally:
            self._close_own_end()

    def _close_own_end(self) -> None:
        if self._own_end >= 0:
            os.close(self._own_end)
            self._own_end = -1

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.child_end)
        self._close_own_end()
