"""Typed access to the fields of a request; a wrong one is named in the error."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from garden_py.wire import Value

_MAX_TEXT = 4096
_MAX_IDENTIFIER_BYTES = 255
_INT_MAX = 2**63 - 1


class InvalidField(Exception):
    """A field is missing, has the wrong type or an impossible value."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Fields:
    """A dict of a request. Every accessor raises `InvalidField`; the field's name carries `prefix`."""

    def __init__(self, values: dict[str, Value], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def _bad(self, name: str, problem: str) -> InvalidField:
        return InvalidField(self._prefix + name, problem)

    def text(self, name: str, max_length: int = _MAX_TEXT) -> str:
        """A str without NUL."""
        value = self._values.get(name)
        if type(value) is not str or len(value) > max_length or "\0" in value:
            raise self._bad(name, f"must be a text of at most {max_length} characters without NUL")
        return value

    def identifier(self, name: str) -> str:
        """A name of 1..255 bytes."""
        value = self.text(name, _MAX_IDENTIFIER_BYTES)
        if not value or len(value.encode("utf-8")) > _MAX_IDENTIFIER_BYTES:
            raise self._bad(name, f"must have 1 to {_MAX_IDENTIFIER_BYTES} bytes")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of the choices."""
        value = self.text(name)
        if value not in choices:
            raise self._bad(name, f"must be one of {', '.join(choices)}")
        return value

    def optional_choice(self, name: str, choices: tuple[str, ...]) -> str | None:
        """One of the choices, or None."""
        return None if self._values.get(name) is None else self.choice(name, choices)

    def integer(self, name: str, lowest: int, highest: int = _INT_MAX) -> int:
        """An int within the bounds, both included; a bool is none."""
        value = self._values.get(name)
        if type(value) is not int or not lowest <= value <= highest:
            raise self._bad(name, f"must be an integer from {lowest} to {highest}")
        return value

    def optional_integer(self, name: str, lowest: int) -> int | None:
        """An int of at least `lowest`, or None."""
        return None if self._values.get(name) is None else self.integer(name, lowest)

    def integer_pair(self, name: str) -> tuple[int, int]:
        """Two ints."""
        value = self._values.get(name)
        if type(value) is list and len(value) == 2:
            first, second = value
            if type(first) is int and type(second) is int:
                return first, second
        raise self._bad(name, "must be two integers")

    def boolean(self, name: str) -> bool:
        """True or False."""
        value = self._values.get(name)
        if type(value) is not bool:
            raise self._bad(name, "must be a boolean")
        return value

    def byte_string(self, name: str) -> bytes:
        """Bytes without NUL, which no system call could take."""
        value = self._values.get(name)
        if type(value) is not bytes or b"\0" in value:
            raise self._bad(name, "must be bytes without NUL")
        return value

    def byte_strings(self, name: str) -> list[bytes]:
        """A list of bytes without NUL."""
        value = self._values.get(name)
        if type(value) is not list:
            raise self._bad(name, "must be a list of bytes")
        items = []
        for index, item in enumerate(value):
            if type(item) is not bytes or b"\0" in item:
                raise self._bad(f"{name}[{index}]", "must be bytes without NUL")
            items.append(item)
        return items

    def mapping(self, name: str) -> dict[str, Value]:
        """A dict."""
        value = self._values.get(name)
        if type(value) is not dict:
            raise self._bad(name, "must be a dict")
        return value

    def optional_mapping(self, name: str) -> dict[str, Value] | None:
        """A dict, or None."""
        return None if self._values.get(name) is None else self.mapping(name)
