"""Reading JSON bodies as the reference server does: keys in any case, null as zero, integers that are integers.

What is wrong is told with the path of the field. Source: Garden HTTP protocol §1.2, statements 14 to 19.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")
_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse_constant(name))
UINT64_MAX = (1 << 64) - 1
_SURROGATES = re.compile("[\ud800-\udfff]")


class BadJson(ValueError):
    """A body is not what its route takes; the message says where."""


def _refuse_constant(name: str) -> NoReturn:
    raise BadJson(f"{name} is no JSON value")


def parse_value(body: bytes) -> Any:
    """The first JSON value of a body; whatever follows it is ignored.

    Raises:
        BadJson: there is none.
    """
    text = body.decode(errors="replace").lstrip(" \t\r\n")
    if not text:
        raise BadJson("EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except BadJson:
        raise
    except (ValueError, RecursionError) as error:
        raise BadJson(f"invalid JSON: {error}") from None
    return value


def parse_object(body: bytes) -> Fields:
    """The first JSON value of a body, which must be an object or null."""
    return as_fields(parse_value(body), "")


def whole_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, as Go decodes it: UTF-8 has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
    return text


def as_fields(value: Any, path: str) -> Fields:
    """A JSON object's fields; null has none."""
    if value is None:
        return Fields({}, path)
    if not isinstance(value, dict):
        raise BadJson(f"{path or 'the body'}: cannot take {_name(value)} for an object")
    return Fields({key.lower(): item for key, item in value.items()}, path)


class Fields:
    """One JSON object. Getters take a missing key and null for the type's zero value, or None where they say so."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self._values = values
        self._path = path

    @property
    def path(self) -> str:
        """Where the object stands in the body; empty: it is the body."""
        return self._path

    def at(self, key: str) -> str:
        """Where a key stands in the body."""
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def _get(self, key: str, kinds: type | tuple[type, ...], wanted: str, zero: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            return zero
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise BadJson(f"{self.at(key)}: cannot take {_name(value)} for {wanted}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return whole_text(self._get(key, str, "a string", ""))

    def flag(self, key: str) -> bool:
        """A boolean."""
        return bool(self._get(key, bool, "a boolean", False))

    def number(self, key: str, *, most: int = UINT64_MAX, least: int = 0) -> int:
        """An integer within least to most."""
        return self.optional_number(key, most=most, least=least) or 0

    def optional_number(self, key: str, *, most: int = UINT64_MAX, least: int = 0) -> int | None:
        """The same, None if it is missing: where that is not zero."""
        value = self._get(key, int, "an integer", None)
        if value is not None and not least <= value <= most:
            raise BadJson(f"{self.at(key)}: {value} is not within {least} to {most}")
        return None if value is None else int(value)

    def child(self, key: str) -> Fields:
        """An object; a missing one has no fields."""
        return as_fields(self._values.get(key), self.at(key))

    def each(self, key: str, read: Callable[[Any, str], Value]) -> tuple[Value, ...]:
        """The items of an array, each read with its path."""
        return read_list(self._get(key, list, "an array", []), self.at(key), read)

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of strings."""
        return self.each(key, _as_text)

    def text_map(self, key: str) -> dict[str, str]:
        """An object from strings to strings."""
        values = self._get(key, dict, "an object", {})
        return {whole_text(name): _as_text(value, f"{self.at(key)}.{name}") for name, value in values.items()}


def read_list(values: Any, path: str, read: Callable[[Any, str], Value]) -> tuple[Value, ...]:
    """The items of an array or null."""
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadJson(f"{path or 'the body'}: cannot take {_name(values)} for an array")
    return tuple(read(value, f"{path}[{i}]") for i, value in enumerate(values))


def _as_text(value: Any, path: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadJson(f"{path}: cannot take {_name(value)} for a string")
    return whole_text(value)


def _name(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number with a fraction", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")
