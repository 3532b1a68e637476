"""What a client has written reaches the process, whatever it calls next."""

from __future__ import annotations

from datetime import timedelta

import pytest
from kit.garden import sh

from garden_py.client import Container, Tty

pytestmark = pytest.mark.root


def test_input_written_just_before_a_bounded_wait_arrives(box: Container) -> None:
    """A wait with a time-out must not drop what is still on its way."""
    for _ in range(10):
        process = box.run(sh('read line; [ "$line" = go ] && exit 7'))
        process.stdin.write(b"go\n")
        assert process.wait(timedelta(seconds=20)).code == 7


def test_interrupt_typed_just_before_a_bounded_wait_arrives(box: Container) -> None:
    """Ctrl-C in a terminal ends the program."""
    process = box.run(["sleep", "60"], tty=Tty(24, 80))
    process.stdin.write(b"\x03")
    assert process.wait(timedelta(seconds=20)).signal == 2
