"""The messages of a control connection: JSON objects one behind the other. Source: Garden HTTP protocol §6.4, §6.5."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

from garden_py.api.http.fields import Fields, as_fields
from garden_py.model.process import WindowSize

# One message; a client sends what it has read of its input, some ten kilobytes, in each.
MESSAGE_MAX_CHARS: Final = 4 << 20
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_SPACE: Final = " \t\r\n"


class Garbage(ValueError):
    """What came is no series of JSON objects."""


class GardenSignal(Enum):
    """The two signals of the protocol."""

    TERMINATE = 0
    KILL = 1


@dataclass(frozen=True, slots=True)
class StdinData:
    """Bytes for stdin."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StdinEnd:
    """This client sends no more input."""


@dataclass(frozen=True, slots=True)
class Resize:
    """A window size; None: the message had none and means nothing."""

    size: WindowSize | None


@dataclass(frozen=True, slots=True)
class SignalProcess:
    """A signal for the process."""

    signal: GardenSignal


Message: TypeAlias = StdinData | StdinEnd | Resize | SignalProcess


class MessageDecoder:
    """Bytes in, messages out. A message may be cut anywhere; a newline behind it is usual and not needed."""

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._json = json.JSONDecoder()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete now; those without meaning are left out.

        Raises:
            Garbage: it is no JSON, or one message is too large. What came before it has been returned already, or is
                lost with the connection.
        """
        self._pending += self._text.decode(data)
        found: list[Message] = []
        # An object ends with a brace; looking for its end in every piece of a long one would cost its length each time.
        if self._pending.rstrip(_SPACE).endswith("}"):
            self._pending = self._take(self._pending, found)
        elif "\n" in self._pending:
            whole, newline, rest = self._pending.rpartition("\n")
            self._pending = self._take(whole + newline, found) + rest
        if self._pending and self._pending[0] != "{":
            raise Garbage("a message must be a JSON object")
        if len(self._pending) > MESSAGE_MAX_CHARS:
            raise Garbage(f"a message is longer than {MESSAGE_MAX_CHARS} characters")
        return found

    def _take(self, text: str, found: list[Message]) -> str:
        """Move complete objects at the beginning of text into found; what is left."""
        at = 0
        while True:
            while at < len(text) and text[at] in _SPACE:
                at += 1
            if at == len(text):
                return ""
            if text[at] != "{":
                raise Garbage("a message must be a JSON object")
            try:
                value, at = self._json.raw_decode(text, at)
            except ValueError:
                return text[at:]
            except RecursionError as error:
                raise Garbage("a message is nested too deeply") from error
            if (message := _read(value)) is not None:
                found.append(message)


def _read(value: Any) -> Message | None:
    """`tty` goes before `source`, and that before `signal`; None for anything else, which is ignored."""
    try:
        fields = as_fields(value, "")
        if fields.has("tty"):
            return Resize(window_size(fields.child("tty")))
        if fields.has("source"):
            return StdinData(_encode(fields.text("data"))) if fields.has("data") else StdinEnd()
        if fields.has("signal"):
            return SignalProcess(GardenSignal(fields.number("signal")))
    except ValueError:  # BadJson is one: a field of a wrong type, or a signal that the protocol does not have
        return None
    return None


def window_size(tty: Fields) -> WindowSize | None:
    """The size that a `tty` object asks for; None if it names none.

    Raises:
        BadJson: it does not fit 16 bits.
    """
    if not tty.has("window_size"):
        return None
    size = tty.child("window_size")
    return WindowSize(rows=size.number("rows", most=0xFFFF), columns=size.number("columns", most=0xFFFF))


def _encode(text: str) -> bytes:
    """UTF-8; half a surrogate pair becomes U+FFFD, as Go decodes it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text).encode()


def encode_message(**fields: Any) -> bytes:
    """One message of the server's."""
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"
