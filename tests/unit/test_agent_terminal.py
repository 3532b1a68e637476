"""The agent moves a terminal's output; its end is believed only when it is told twice."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from garden_py.agent.pty import Terminal

GONE = OSError(errno.EIO, "Input/output error")


class SilentLoop:
    """Watches nothing: the test says when something is ready."""

    def watch(self, fd: int, events: int, on_ready: Any) -> None: ...

    def forget(self, fd: int) -> None: ...


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal over descriptors that are never used."""
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(4)]
    loop: Any = SilentLoop()
    terminal = Terminal(fds, loop)
    yield terminal
    terminal.close()


def ready(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, *answers: int | OSError) -> list[bool]:
    """Whether the terminal is open after each answer of the kernel."""
    left = list(answers)

    def move() -> int:
        answer = left.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(terminal, "_move", move)
    found = []
    for _ in answers:
        terminal._on_ready(0)
        found.append(terminal.is_open)
    return found


def test_output_that_hid_behind_the_end_is_moved(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and closed between the kernel's two looks: EIO first, the output when asked again, then the end."""
    assert ready(terminal, monkeypatch, 10, GONE, 4096, GONE, GONE) == [True, True, True, True, False]


@pytest.mark.parametrize("end", [GONE, 0], ids=["EIO", "end of file"])
def test_end_that_is_told_twice_is_one(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, end: int | OSError
) -> None:
    assert ready(terminal, monkeypatch, end, end) == [True, False]


def test_nobody_who_could_read_it_is_the_end(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ready(terminal, monkeypatch, OSError(errno.EPIPE, "Broken pipe")) == [False]
