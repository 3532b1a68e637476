"""Texts of any length get to a worker."""

from __future__ import annotations

import os
from typing import Any

import pytest

from garden_py import wire
from garden_py.backend.launcher.long_texts import put_out, take_in

LONG = "é" * (700 << 10)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": "short", "n": 1, "none": None, "list": ["x", {"y": True}]},
        {"a": LONG, "b": {"c": [LONG + "1", "short"], "d": LONG + "2"}},
    ],
)
def test_values_come_out_as_they_went_in(value: dict[str, Any]) -> None:
    with open(os.devnull, "rb") as null:
        fds = [os.dup(null.fileno())]
        own = fds.copy()
        sent = put_out(value, fds)
        assert len(wire.encode_frame(wire.REQUEST, 1, sent, len(fds))) < wire.MAX_PAYLOAD
        files = fds[1:]
        assert take_in(sent, fds) == value
        assert fds == own
        for fd in files:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        os.close(own[0])


def test_what_is_short_makes_no_files() -> None:
    fds: list[int] = []
    value = {"text": "x" * 1000}
    assert put_out(value, fds) == value
    assert fds == []
