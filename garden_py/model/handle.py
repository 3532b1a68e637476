"""Names that callers choose: container handles, process ids, property keys, hostnames."""

from __future__ import annotations

import re
import uuid
from typing import NewType

Handle = NewType("Handle", str)
ProcessId = NewType("ProcessId", str)

NAME_MAX = 128
# A leading '-' could be taken for an option by a command line, a leading '.' for a hidden file or for `..`.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_HOSTNAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,61}[A-Za-z0-9_])?", re.ASCII)
HOSTNAME_KEEP = 49


def name_problem(text: str) -> str | None:
    """Say what keeps text from being a handle or process id; None if nothing does.

    A valid name is 1 to 128 characters of A-Z a-z 0-9 . _ - and starts with a letter, a digit or `_`.
    """
    if _NAME.fullmatch(text):
        return None
    if len(text) > NAME_MAX:
        return f"has {len(text)} characters; at most {NAME_MAX} are allowed"
    return "must be 1 to 128 characters of A-Z a-z 0-9 . _ - and start with a letter, a digit or _"


def hostname_problem(text: str) -> str | None:
    """Say what keeps text from being a hostname; None if nothing does. hostname(7): at most 63 characters."""
    if _HOSTNAME.fullmatch(text):
        return None
    return "must be 1 to 63 characters of A-Z a-z 0-9 . _ - and start and end with a letter or digit"


def hostname_for(handle: str) -> str:
    """The default hostname: the handle's last 49 characters, without leading separators.

    Source: Garden behaviour, statement H1.
    """
    return handle[-HOSTNAME_KEEP:].lstrip(".-") or "container"


def make_name() -> str:
    """A fresh random name (UUID version 4)."""
    return str(uuid.uuid4())
