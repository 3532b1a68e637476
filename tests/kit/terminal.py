"""`garden` on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

from kit.patience import FACTOR

DEADLINE_S = 30.0 * FACTOR
GARDEN = [sys.executable, "-m", "garden_py"]


class Terminal:
    """`garden` on a terminal of its own, driven like a person would: type, look, wait for words."""

    def __init__(self, environ: dict[str, str], *arguments: str, rows: int = 33, columns: int = 99) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            [*GARDEN, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environ,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, pattern: str) -> str:
        """All that was shown up to and including the pattern, which is then forgotten."""
        deadline_s = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self.seen)) is None:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{pattern!r} did not appear in {self.seen!r}"
            ready, _, _ = select.select([self.ours], [], [], left_s)
            if ready:
                self.seen += self._read()
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def _read(self) -> str:
        try:
            return os.read(self.ours, 65536).decode(errors="replace")
        except OSError as error:  # EIO: the other side is closed, pty(7)
            raise AssertionError(f"the terminal closed after {self.seen!r}") from error

    def end(self) -> int:
        """Wait for its end, and look meanwhile: a program that nobody reads does not come to its keys."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, f"it does not end after {self.seen!r}"
            ready, _, _ = select.select([self.ours], [], [], 0.05)
            if ready:
                try:
                    self.seen += os.read(self.ours, 65536).decode(errors="replace")
                except OSError:  # EIO: the other side is closed, pty(7)
                    self.process.wait(DEADLINE_S)
        os.close(self.ours)
        return self.process.returncode
