"""The messages of a control connection: JSON objects one behind the other. Source: Garden HTTP protocol §6.4, §6.5."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

from garden_py.api.http.fields import Fields, as_fields
from garden_py.api.http.long_strings import StringPieces, find_end_of_string
from garden_py.model.process import WindowSize

MESSAGE_MAX_BYTES: Final = 4 << 20  # but for the data of a message for stdin, which is of any size
# Go's io.Copy sends what its reader gives at once: some ten kilobytes, or all of a bytes.Buffer. From this size on a
# message's data is passed on as it comes.
_LONG_BYTES: Final = 1 << 20
_VALUE_MAX_BYTES: Final = 4096  # that is no object, and is ignored
_DEPTH_MAX: Final = 64  # of objects and arrays in each other; the protocol's own have three
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_NOTHING: Final[dict[str, Any]] = {}  # a message without meaning
_SPACE: Final = b" \t\r\n"
_STRUCTURE: Final = re.compile(rb'["{}\[\]]')
_VALUE_STARTS: Final = frozenset(b'"[-0123456789tfn')
# How such a message begins: as Go's client orders the fields, with or without the process.
_STDIN_HEAD: Final = re.compile(
    rb"""\{\s*(?:"process_id"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*)?"source"\s*:\s*\d{1,9}\s*,\s*"data"\s*:\s*\"""",
    re.DOTALL,
)


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
    """Bytes in, messages out. A message may be cut anywhere; a newline behind it is usual and not needed.

    Data for stdin of more than a MiB may leave as several messages, before all of it has come; what stands behind it in
    its object then means nothing. Lines that are JSON and no object are ignored.

    Every byte is looked at once for the end of its object, however small the pieces are that a client sends. JSON's
    signs are ASCII, which in UTF-8 is part of nothing else, so bytes will do for that.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._by_line = True
        self._found: Any = None
        self._long: StringPieces | None = None
        self._in_rest = False  # of an object whose data has been passed on

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take the next bytes; the iterator yields the messages that are complete now, but for those without meaning.

        Raises:
            Garbage: while iterating, behind the last message that can be understood: what follows is no JSON object, or
                too large. Nothing can be understood from there on.
        """
        self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[Message]:
        while True:
            if self._long is not None:
                if text := self._take_string(self._long):
                    yield StdinData(_encode(text))
                if self._long is not None:
                    return
            found = self._take_object()
            if found is not None:
                if (message := _read(found)) is not None:
                    yield message
            elif self._long is None:
                return

    def _take_string(self, pieces: StringPieces) -> str:
        """What has come of data that is passed on."""
        try:
            text, ended = pieces.take(self._buffer)
        except ValueError as error:
            raise Garbage(f"a message is no JSON object: {error}") from error
        if ended:
            self._long, self._in_rest = None, True
            self._depth, self._scanned = 1, 0
        return text

    def _take_object(self) -> Any:
        """The next object, None if not all of it is there yet."""
        buffer = self._buffer
        if not self._depth:
            del buffer[: len(buffer) - len(buffer.lstrip(_SPACE))]
            if not buffer:
                return None
            if buffer[:1] != b"{":
                return self._take_value()
            self._scanned = 0
        end = (0 if self._in_rest else self._find_line()) or self._find_end()
        size = end or len(buffer)
        if size > (MESSAGE_MAX_BYTES if end else _LONG_BYTES) and not self._in_rest and self._begin_long():
            return None
        if size > MESSAGE_MAX_BYTES:
            raise Garbage(f"a message is longer than {MESSAGE_MAX_BYTES} bytes")
        if not end:
            return None
        found, self._found = self._found, None
        try:
            if self._in_rest:
                return _NOTHING
            return _parse(buffer[:end]) if found is None else found
        except (ValueError, RecursionError) as error:
            raise Garbage(f"a message is no JSON object: {error}") from error
        finally:
            del buffer[:end]
            self._depth, self._in_string, self._in_rest = 0, False, False

    def _take_value(self) -> Any:
        """Something other than an object, on a line of its own, which means nothing; None if not all of it is there."""
        buffer = self._buffer
        end = buffer.find(b"\n", 0, _VALUE_MAX_BYTES) + 1
        if buffer[0] not in _VALUE_STARTS or (not end and len(buffer) >= _VALUE_MAX_BYTES):
            raise Garbage("a message must be a JSON object")
        if not end:
            return None
        try:
            _parse(buffer[:end])
        except (ValueError, RecursionError) as error:
            raise Garbage(f"a message must be a JSON object: {error}") from error
        del buffer[:end]
        return _NOTHING

    def _begin_long(self) -> bool:
        """Whether the object is a message for stdin whose data has begun: then that is what the buffer begins with."""
        head = _STDIN_HEAD.match(self._buffer)
        if head is None:
            return False
        end = head.end()
        del head  # it holds the buffer
        del self._buffer[:end]
        self._long = StringPieces()
        self._depth, self._in_string, self._found = 0, False, None
        return True

    def _find_line(self) -> int:
        """The offset behind a line that is an object, which is then in _found; 0 if there is none.

        So clients write them, and it is much faster. One that once does not is not tried again.
        """
        end = self._buffer.find(b"\n", self._scanned) + 1 if self._by_line else 0
        if end:
            try:
                self._found = _parse(self._buffer[:end])
            except (ValueError, RecursionError):
                self._by_line, end = False, 0
        return end

    def _find_end(self) -> int:
        """The offset behind the object that the buffer begins with; 0 if it is not there yet."""
        buffer, at = self._buffer, self._scanned
        while True:
            if self._in_string:
                at = find_end_of_string(buffer, at)
                if not at:
                    break
                self._in_string = False
            found = _STRUCTURE.search(buffer, at)
            if found is None:
                break
            at = found.end()
            match found[0]:
                case b'"':
                    self._in_string = True
                case b"{" | b"[":
                    self._depth += 1
                    if self._depth > _DEPTH_MAX:
                        raise Garbage("a message is nested too deeply")
                case _:
                    self._depth -= 1
                    if not self._depth:
                        return at
        self._scanned = len(buffer)
        return 0


def _parse(data: bytearray) -> Any:
    return json.loads(data.decode(errors="replace"))


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
