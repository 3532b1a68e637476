"""Stays with a process: its output to our stdout and stderr, our stdin and signals to it.

    main thread      output chunks ──► stdout, stderr (a slow reader slows the process, nothing is buffered)
    stdin thread     stdin ──► process.stdin, watches for the detach keys on a terminal
    typing thread    on a terminal, stdin's ──► process.stdin, so that the keys are seen whatever holds up a write
    signal thread    INT, TERM, HUP, … ──► process.signal;  WINCH ──► process.resize

Signal handlers only put a number into a queue: gRPC's locks must not be taken inside a handler that may have
interrupted their holder.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Final

from garden_py.cli import render

if TYPE_CHECKING:
    from garden_py.client import Process

_READ_BYTES: Final = 64 << 10

# Ctrl-P Ctrl-Q, as in docker attach.
DETACH_KEYS: Final = b"\x10\x11"

# After the exit, output may go on as long as a background child holds the stream open. What the process
# itself wrote is in the server's hands at once, so a stream that is quiet for this long has nothing of it
# left.
_QUIET_AFTER_EXIT_S: Final = 1.0

_FORWARDED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)

# So many interrupts in a row, and it is us that the user wants to be rid of.
_INTERRUPTS_TO_LEAVE: Final = 3

_STOP: Final = 0

EXIT_DETACHED: Final = 0
EXIT_BROKEN_PIPE: Final = 128 + signal.SIGPIPE


class DetachScanner:
    """Finds the detach keys in what is typed, also when they come one by one. Pure."""

    def __init__(self, keys: bytes = DETACH_KEYS) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the keys were pressed; a possible first key is held back."""
        text = self._held + data
        before, found, _ = text.partition(self._keys)
        if found:
            return before, True
        held = next(
            (size for size in range(len(self._keys) - 1, 0, -1) if text.endswith(self._keys[:size])), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def window_size() -> tuple[int, int]:
    """Rows and columns of the terminal on stdin; 24 by 80 if it does not say."""
    try:
        size = os.get_terminal_size(sys.stdin.fileno())
    except OSError:
        return 24, 80
    return size.lines or 24, size.columns or 80


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the process, Ctrl-C included; the terminal is restored at the end."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # not FLUSH: what was typed ahead is for the process
    try:
        yield
    finally:
        with suppress(termios.error):  # it has hung up
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Session:
    """One conversation with one process.

    Args:
        process: an open reader of it.
        interactive: feed it our stdin; otherwise its stdin is left as it is.
        terminal: it has a terminal, and so have we.
        owner: we started it: if nobody reads our stdout any more, it gets SIGPIPE as it would in a shell.
    """

    def __init__(self, process: Process, *, interactive: bool, terminal: bool, owner: bool) -> None:
        self._process = process
        self._interactive = interactive
        self._terminal = terminal
        self._owner = owner
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._typed: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._detached = threading.Event()
        self._quiet_timer: threading.Timer | None = None
        self._interrupts = 0

    def run(self) -> int:
        """Stay until the process has ended and its output is written, or the user has left.

        Returns:
            The exit code for our own process.

        Raises:
            GardenError: the connection is lost for good.
        """
        with ExitStack() as undo:
            undo.callback(self._process.close)
            if self._terminal:
                undo.enter_context(_raw_terminal())
            undo.enter_context(self._signal_thread())
            if self._interactive:
                undo.enter_context(self._stdin_thread())
            undo.callback(self._process.close)  # first of all: unblocks the threads that the exits above join
            return self._copy_output()

    def _copy_output(self) -> int:
        from garden_py.client.values import ExitStatus, OutputChunk, Stream

        targets = {Stream.STDOUT: sys.stdout.fileno(), Stream.STDERR: sys.stderr.fileno()}
        try:
            for event in self._process.events():
                if isinstance(event, OutputChunk):
                    _write_all(targets[event.stream], event.data)
                if isinstance(event, ExitStatus) or self._process.exit is not None:
                    self._await_quiet()
        except BrokenPipeError:
            if self._owner:
                self._process.signal("PIPE")
            return EXIT_BROKEN_PIPE
        finally:
            if self._quiet_timer is not None:
                self._quiet_timer.cancel()
        return self._exit_code()

    def _exit_code(self) -> int:
        status = self._process.exit
        if status is None:
            how = "detached" if self._detached.is_set() else "left"
            render.note(f"{how}; process {self._process.id} goes on")
            return EXIT_DETACHED if self._detached.is_set() else 128 + signal.SIGINT
        if not self._process.ended:
            render.note(f"process {self._process.id} has exited; a child of it still holds its output open")
        if status.out_of_memory and status.reason:
            render.note(status.reason)
        return status.shell_code

    def _await_quiet(self) -> None:
        """Leave when no output comes for a while; called at the exit and at every chunk after it."""
        if self._quiet_timer is not None:
            self._quiet_timer.cancel()
        self._quiet_timer = threading.Timer(_QUIET_AFTER_EXIT_S, self._process.close)
        self._quiet_timer.daemon = True
        self._quiet_timer.start()

    # -- stdin
    # ------------------------------------------------------------------------------------------------

    @contextmanager
    def _stdin_thread(self) -> Iterator[None]:
        wake_read, wake_write = os.pipe()
        thread = threading.Thread(target=self._pump_stdin, args=[wake_read], name="stdin")
        typing = threading.Thread(target=self._write_typed, name="typing")
        thread.start()
        typing.start()
        try:
            yield
        finally:
            os.close(wake_write)  # the thread sees end of file on its end
            thread.join()
            self._typed.put(b"")
            typing.join()
            os.close(wake_read)

    def _pump_stdin(self, wake: int) -> None:
        from garden_py.client.errors import GardenError

        source = sys.stdin.fileno()
        scanner = DetachScanner() if self._terminal else None
        try:
            while True:
                ready, _, _ = select.select([source, wake], [], [])
                if wake in ready:
                    return
                try:
                    data = os.read(source, _READ_BYTES)
                except OSError:  # a terminal that has hung up
                    data = b""
                if not data:
                    self._process.stdin.close()
                    return
                if scanner is None:
                    self._process.stdin.write(data)
                    continue
                data, detach = scanner.feed(data)
                if detach:
                    self._detached.set()
                    self._process.close()
                    return
                if data:
                    self._typed.put(data)
        except GardenError:
            # The process has ended, or the connection is gone: the main thread reads the same stream and says
            # so.
            return

    def _write_typed(self) -> None:
        from garden_py.client.errors import GardenError

        try:
            while data := self._typed.get():
                self._process.stdin.write(data)
        except GardenError:  # as above
            return

    # -- signals
    # ----------------------------------------------------------------------------------------------

    @contextmanager
    def _signal_thread(self) -> Iterator[None]:
        caught = [*_FORWARDED, *([signal.SIGWINCH] if self._terminal else [])]
        before = {number: signal.signal(number, self._on_signal) for number in caught}
        # SIGPIPE as an exception of the write, whatever our parent left us.
        before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        thread = threading.Thread(target=self._forward_signals, name="signals")
        thread.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._signals.put(_STOP)
            thread.join()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.put(number)

    def _forward_signals(self) -> None:
        from garden_py.client.errors import GardenError

        while (number := self._signals.get()) != _STOP:
            try:
                if number == signal.SIGWINCH:
                    self._process.resize(*window_size())
                    continue
                self._interrupts = self._interrupts + 1 if number == signal.SIGINT else 0
                if self._interrupts >= _INTERRUPTS_TO_LEAVE:
                    self._process.close()
                else:
                    self._process.signal(number)
            except GardenError as error:
                render.note(f"signal {number} was not delivered: {error}")


def _write_all(fd: int, data: bytes) -> None:
    """Write all of it, also to what a parent of ours has made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
