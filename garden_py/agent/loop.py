"""The event loop of PID 1: one thread, one epoll, handlers that never block."""

from __future__ import annotations

import posix
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

_MAX_LOGGED_FAILURES = 64  # the log lies on the host; a bug that repeats must not fill its disk


class Loop:
    """Calls the handler of every descriptor that is ready.

    A handler gets the epoll event mask and must tolerate a call without cause: a descriptor closed earlier in
    the same turn may have been opened anew under the same number.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()  # close-on-exec by itself, as all descriptors Python makes
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._failures = 0

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler` when `fd` is ready for `events`; errors and hang-ups are always reported."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Wait for other events on a watched descriptor."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching; must come before the descriptor is closed. Harmless if it is not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            self.turn()

    def turn(self, timeout_s: float = -1) -> None:
        """One round: wait for events, at most `timeout_s` (negative: for ever), and call the handlers."""
        for fd, events in self._epoll.poll(timeout_s):
            handler = self._handlers.get(fd)
            if handler is None:
                continue
            try:
                handler(events)
            except Exception as error:  # noqa: BLE001 - if PID 1 ends, the kernel kills the whole container
                self._report(error)

    def _report(self, error: Exception) -> None:
        """A bug of ours, or memory ran out: say where, briefly, and go on."""
        self._failures += 1
        if self._failures <= _MAX_LOGGED_FAILURES:
            log(f"unexpected {describe_failure(error)}")


def log(text: str) -> None:
    """One line to the agent's log file on the host."""
    posix.write(2, f"garden-init: {text}\n".encode("utf-8", "backslashreplace"))


def describe_failure(error: BaseException) -> str:
    """Type, message and the innermost line; `traceback` would read source files and cost 10 ms to import."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}: {error}{where}"
