"""The terminal: its size, what is typed on it, and what is shown. Gives it back as it was."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from garden_py.cli.top.draw import Line
from garden_py.cli.top.keys import KeyDecoder

_READ_BYTES = 1024
_ESCAPE_S = 0.05  # a key's sequence comes at once; an escape that is alone this long is the key


class Screen:
    """A terminal in the hands of one program; a context manager.

    Keys come without Enter and without being shown, the cursor is hidden, and the user's own screen comes back in the
    end, also when that is an error.
    """

    def __init__(self) -> None:
        from rich.console import Console  # here: it takes as long to import as all the rest of a command

        self._console = Console(force_terminal=True)
        self._keyboard = sys.stdin.fileno()
        self._decoder = KeyDecoder()
        self._wake_out, self._wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._former: Any = None
        self._former_handler: Any = None

    def __enter__(self) -> Self:
        self._former = termios.tcgetattr(self._keyboard)
        tty.setraw(self._keyboard)
        self._former_handler = signal.signal(signal.SIGWINCH, self._resized)
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.show_cursor(True)
        self._console.set_alt_screen(False)
        signal.signal(signal.SIGWINCH, self._former_handler)
        termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._former)
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _resized(self, number: int, frame: FrameType | None) -> None:
        self.wake()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), now; what is no size at all counts as the smallest."""
        # Not rich's: that one believes COLUMNS and LINES, which nobody sets anew when the size changes.
        width, height = os.get_terminal_size(sys.stdout.fileno())
        return max(1, width), max(1, height)

    def wake(self) -> None:
        """End a wait for keys; from any thread."""
        try:
            os.write(self._wake_in, b".")
        except BlockingIOError:  # it is awake anyway
            return

    def wait_for_keys(self, until_s: float) -> list[str]:
        """What is typed; empty when woken, or when time.monotonic() has reached until_s.

        Raises:
            EOFError: the terminal is gone.
        """
        limit_s = max(0.0, until_s - time.monotonic())
        if self._decoder.is_waiting:
            limit_s = min(limit_s, _ESCAPE_S)
        ready, _, _ = select.select([self._keyboard, self._wake_out], [], [], limit_s)
        if self._wake_out in ready:
            os.read(self._wake_out, _READ_BYTES)
        if self._keyboard not in ready:
            return self._decoder.flush() if self._decoder.is_waiting and not ready else []
        data = os.read(self._keyboard, _READ_BYTES)
        if not data:
            raise EOFError
        return self._decoder.feed(data)

    def show(self, lines: Sequence[Line]) -> None:
        """Replace the whole picture, in one write: nothing flickers."""
        from rich.control import Control
        from rich.text import Text

        width, _ = self.size
        text = Text("\n").join(Text(line, style=style, no_wrap=True) for line, style in lines)
        with self._console.capture() as capture:
            self._console.control(Control.home())
            self._console.print(
                text, end="", width=width, crop=True, no_wrap=True, overflow="crop", highlight=False
            )
        # In raw mode a line feed moves down and not to the left.
        sys.stdout.write(capture.get().replace("\n", "\r\n"))
        sys.stdout.flush()
