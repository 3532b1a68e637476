"""What is left out of what people are shown: values of environment variables and passwords. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

REMOVED = "<removed>"
_PASSWORDS = frozenset({"image_auth", "password"})
# Shorter ones are words such as `yes` and `80`, which would be taken out of everything else.
_SECRET_MIN_CHARACTERS = 6
_PUBLIC = frozenset({"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TERM", "LANG", "TZ", "HOSTNAME"})


def without_secrets(value: Any) -> Any:
    """A JSON value with `NAME=<removed>` in every list that is called env, and without what is called a password."""
    if isinstance(value, dict):
        return {key: _shown(key, inner) for key, inner in value.items() if key not in _PASSWORDS}
    return [without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _shown(key: Any, value: Any) -> Any:
    if key == "env" and isinstance(value, list):
        return [f"{str(entry).partition('=')[0]}={REMOVED}" for entry in value]
    return without_secrets(value)


def secrets_of(env: Iterable[str]) -> list[bytes]:
    """Values of environment variables that must appear nowhere, the longest first: one may contain another.

    Each also as JSON writes it.
    """
    pairs = (entry.partition("=") for entry in env)
    values = {
        value for name, _, value in pairs if name not in _PUBLIC and len(value) >= _SECRET_MIN_CHARACTERS
    }
    return sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)


def _forms(value: str) -> Iterator[bytes]:
    for text in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        yield text.encode(errors="surrogateescape")


def scrub(data: bytes, secrets: Iterable[bytes]) -> bytes:
    """Text without any of the secrets, wherever they have got into it."""
    for secret in secrets:
        data = data.replace(secret, REMOVED.encode())
    return data
