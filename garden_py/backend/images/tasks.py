"""What the server's helpers for images are told to do: lines of JSON."""

from __future__ import annotations

import json
from typing import Any, TextIO


def read_task(stream: TextIO) -> dict[str, Any] | None:
    """The next task; None if there is none: whoever gives them has gone, maybe in the middle of one."""
    line = stream.readline()
    if not line.endswith("\n"):
        return None
    task: dict[str, Any] = json.loads(line)
    return task
