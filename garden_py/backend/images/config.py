"""What of an image's config is of use here. Pure; the config may say anything.

Source: OCI image-spec config.md.
"""

from __future__ import annotations

from typing import Any

from garden_py.model.image import ImageConfig

_TEXT_MAX = 256 << 10  # of one text; execve(2) takes 128 KiB
_COUNT_MAX = 10_000


def parse_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of store.Image that a config states: what is not as it should be is left out.

    Nothing in a config makes an image unusable: a caller states what it wants itself.
    """
    own = config.get("config")
    own = own if isinstance(own, dict) else {}
    return {
        "config": ImageConfig(
            env=tuple(entry for entry in _texts(own.get("Env")) if entry.partition("=")[0] and "=" in entry),
            user=_text(own.get("User")),
            working_dir=_text(own.get("WorkingDir")),
            entrypoint=_texts(own.get("Entrypoint")),
            cmd=_texts(own.get("Cmd")),
            labels=_pairs(own.get("Labels")),
        ),
        "architecture": _text(config.get("architecture")),
        "os": _text(config.get("os")),
        "created": _text(config.get("created")),
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) and "\0" not in value and len(value) <= _TEXT_MAX else ""


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(each for each in value[:_COUNT_MAX] if isinstance(each, str) and _text(each) == each)


def _pairs(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        return ()
    pairs = ((_text(key), _text(text)) for key, text in list(value.items())[:_COUNT_MAX])
    return tuple(sorted((key, text) for key, text in pairs if key))
