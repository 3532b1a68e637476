"""Frames between the server (backend) and the agent (PID 1 of a container), without any I/O.

Both sides import this module, the agent inside every container, so it imports nothing. It only turns values
into bytes and back; sockets and descriptors are the caller's. Neither side believes the other: whatever the
bytes are, `decode` and `Decoder` raise `WireError` and nothing else, and do work linear in their length.

Frame: a header of 16 bytes, little endian, then the payload::

    offset  size  field
    0       2     magic b"GA"
    2       1     framing, 1: the version of this layout and of the encoding of values
    3       1     kind: 1 request, 2 reply, 3 error, 4 event
    4       4     id: of the request, repeated by its reply or error; 0 in events
    8       4     payload length in bytes, at most MAX_PAYLOAD
    12      1     nfds: descriptors that travel with this frame (SCM_RIGHTS, unix(7)), at most MAX_FDS
    13      3     zero

The payload is one encoded dict. Descriptors are attached to the `sendmsg` that carries the frame's first
byte, so they have always arrived when the frame is complete; a receiver queues them and every frame takes its
`nfds` from the head.

Versions. What the messages below may hold is the wire version, VERSION; which one is spoken is agreed in `hello`. A
server speaks OLDEST to VERSION, that is, with agents of its own and of the previous version; an agent speaks VERSION
alone, for it is replaced when its server is (`upgrade`). Framing and the shape of `hello` never change with it.

    1   the first one; a terminal's stdin was its master
    2   ping, cancel, upgrade, keep, gated spawns, `build` in hello; a terminal's stdin is a pipe

Starting a process::

    server                         agent (PID 1)                     child
      |  request spawn + cgroup fds   |                                |
      |------------------------------>|  pipes or pty, fork            |
      |                               |------------------------------->|  cgroups, setsid, stdio, user,
      |  (journals it)                |                                |  directory, limits, capabilities
      |  gate: one byte, straight through a pipe or a socket           |
      |--------------------------------------------------------------->|
      |                               |    status pipe: failure        |
      |  error {code, message}        |<- - - - - - - - - - - - - - - -|  _exit, no record is left
      |<- - - - - - - - - - - - - - - |                                |
      |                               |    status pipe: end of file    |
      |  reply {pid, fds} + stdio fds |<-------------------------------|  execve (the pipe is close-on-exec)
      |<------------------------------|                                |
      |  (bytes flow through the descriptors, never through frames)    |
      |                               |    SIGCHLD, waitpid            |
      |  event exited {process,status}|<-------------------------------|  exit
      |<------------------------------|                                |
      |  request release              |   (kept until then, so a restarted server learns of it by hello)
      |------------------------------>|

Requests (`->` what the reply holds). `id` names a process and is chosen by the server::

    hello        server: str, wire: [lowest, highest] version
                 -> agent: str (version), wire: int, build: str (name of its bundle), processes: [record]
    ping         -> nothing
    list         -> processes: [record]
    spawn        id: str, argv: [bytes], env: [bytes "K=V"], dir: bytes, user: str,
                 tty: None | {rows: int, columns: int}, rlimits: {name: value | [soft, hard]},
                 bounding: int | None (mask of the capabilities kept), no_new_privs: bool,
                 program: None | "tar-in" | "tar-out", program_args: {path: bytes}, gated: bool
                 + descriptors: open cgroup.procs files, which the child joins; if gated, one more at the end: the
                 read end of a pipe from which the child must get one byte before exec. Its end without one
                 (the server is gone, or thought better of it) means that the program never runs: not_released.
                 A spawn with rlimits comes with a socket instead: a child that may not raise them so far
                 sends ASK_LIMITS, and gets LIMITS_RAISED or LIMITS_REFUSED after the byte
                 -> pid: int, fds: [name] + these descriptors. Without tty: stdin (write end), stdout and
                 stderr (read ends). With tty: stdin (write end) and stdout (read end); the agent moves the bytes
    attach       id -> record, fds: [name] + those of the descriptors above that are still held
    keep         id + a descriptor, the spool of its stdin, which attach gives back; once per process -> nothing
    close_stdin  id -> closed: bool (False with a tty, or if done before)
    drop_output  id, stream: "stdout" | "stderr" -> dropped: bool
    signal       id, signal: int, group: bool -> delivered: bool
    signal_all   signal: int -> delivered: bool
    resize       id, rows: int, columns: int (0 = the default) -> nothing
    release      id -> nothing
    cancel       id -> found: bool. The process is not wanted: if it lives, it is killed, and no exit is told;
                 if it is starting, its spawn is answered with `cancelled`. It is forgotten as soon as it is reaped
    upgrade      build: str, argv: [bytes], env: [bytes]: the program that is to take PID 1's place (execve(2)).
                 It is run beside PID 1 first, with `check` and the number of a descriptor added to argv: it must exit
                 with 0, else the answer is `upgrade_failed` and nothing has changed. Then PID 1 executes it with
                 `resume` and such a descriptor. The descriptor is a memfd with all that the agent knows
                 (agent/handover.py); connections, streams and children stay
                 -> agent, wire, build: as hello, from the new program, on the same connection

A record is {id, pid, started_ns, starting, exited, status, ended_ns, tty}: times are ns of CLOCK_REALTIME,
`status` is the raw wait status of waitpid(2), None while the process lives, `starting` is True before exec.

`program` replaces exec: the forked child itself unpacks or packs a tar stream on its standard streams as the
resolved user; `argv` must be empty then. It exits 0, or 1 with one line `CODE: message` on stderr, CODE being
no_such_path, permission_denied, broken_archive, no_space or io_error.

An error is {code: str, message: str, field: str if a field is to blame, step and errno (names) if the system
refused}. Codes: invalid_request, unsupported_wire, process_exists, process_not_found, still_running, no_tty,
not_kept, not_init, executable_not_found, not_executable, user_not_found, group_not_found, bad_directory, no_space,
bad_rlimit, out_of_memory, too_many_processes, not_released, spawn_failed, cancelled, upgrade_failed, internal.

Event, sent to every connection: {event: "exited", process: id, status, ended_ns}. It follows the reply of
the process's spawn, never precedes it.

Values: None, bool, int (64 bit signed), bytes, str (UTF-8 without surrogates), list, dict with str keys,
nested at most MAX_DEPTH deep. One tag byte each (`N`, `T`, `F` stand alone), then, little endian: `i` 8 byte
int; `y` bytes and `s` str: u32 length, content; `l`: u32 count, values; `d`: u32 count, then per entry u32
length, key, value.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` costs the agent 3 ms at start-up and is never needed at run time
    from collections.abc import Iterator
    from typing import TypeAlias

    Value: TypeAlias = "bool | int | bytes | str | list[Value] | dict[str, Value] | None"

VERSION = 2
OLDEST = 1
FRAMING = 1
HEADER_SIZE = 16
MAX_PAYLOAD = 1 << 20
MAX_FDS = 16
MAX_DEPTH = 16
ASK_LIMITS, LIMITS_RAISED, LIMITS_REFUSED = b"?", b"+", b"-"  # at a gate, see `spawn`

REQUEST, REPLY, ERROR, EVENT = 1, 2, 3, 4

_MAGIC = b"GA"
_U32_LIMIT = 1 << 32
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 63) - 1


class WireError(Exception):
    """Bytes that are no frame or no value of this protocol, or a value it cannot carry."""


class Frame:
    """One message.

    Attributes:
        kind: REQUEST, REPLY, ERROR or EVENT.
        id: correlates a reply or error with its request; 0 in events.
        value: the decoded payload.
        nfds: how many descriptors travel with the frame.
    """

    __slots__ = ("id", "kind", "nfds", "value")

    def __init__(self, kind: int, id: int, value: dict[str, Value], nfds: int = 0) -> None:
        self.kind = kind
        self.id = id
        self.value = value
        self.nfds = nfds

    def __repr__(self) -> str:
        return f"Frame(kind={self.kind}, id={self.id}, value={self.value!r}, nfds={self.nfds})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frame):
            return NotImplemented
        return (self.kind, self.id, self.value, self.nfds) == (other.kind, other.id, other.value, other.nfds)

    __hash__ = None  # type: ignore[assignment]  # its value is mutable


def encode_frame(kind: int, id: int, value: object, nfds: int = 0) -> bytes:
    """One frame as bytes, to be sent whole and in one piece with its descriptors.

    Raises:
        WireError: the value is no dict or cannot be carried, the payload exceeds MAX_PAYLOAD, or kind, id or
            nfds are out of range.
    """
    if type(value) is not dict:
        raise WireError(f"a payload is a dict, not {type(value).__name__}")
    if not REQUEST <= kind <= EVENT or not 0 <= id < _U32_LIMIT or not 0 <= nfds <= MAX_FDS:
        raise WireError(f"kind {kind}, id {id} or nfds {nfds} is out of range")
    payload = encode(value)
    if len(payload) > MAX_PAYLOAD:
        raise WireError(f"payload of {len(payload)} bytes exceeds {MAX_PAYLOAD}")
    header = b"%b%c%c%b%b%c\0\0\0" % (_MAGIC, FRAMING, kind, _u32(id), _u32(len(payload)), nfds)
    return header + payload


class Decoder:
    """Turns a byte stream, cut anywhere, into frames.

    After a `WireError` the stream has lost its framing: every further `feed` raises again, and the caller
    closes the connection. At most one frame (header + MAX_PAYLOAD) and one `feed` are buffered.

    Attributes:
        limits: largest payload in bytes, by kind of frame. Decoding a payload of a million values takes most of a
            second, so a receiver with other things to do accepts no more than it asked for.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._failure: str | None = None
        self.limits = dict.fromkeys((REQUEST, REPLY, ERROR, EVENT), MAX_PAYLOAD)

    @property
    def buffered(self) -> bytes:
        """The beginning of a frame that is not complete yet; empty between frames."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next bytes of the stream; the iterator yields the frames that are complete now.

        The bytes are taken at once, the frames are decoded as the iterator advances.

        Raises:
            WireError: while iterating, where the stream breaks the protocol, after all frames before that.
        """
        self._buffer += data
        return self._frames()

    def _frames(self) -> Iterator[Frame]:
        try:
            while (frame := self._next()) is not None:
                yield frame
        except WireError as error:
            self._failure = str(error)
            raise

    def _next(self) -> Frame | None:
        if self._failure is not None:
            raise WireError(self._failure)
        buffer = self._buffer
        if len(buffer) < HEADER_SIZE:
            # A wrong magic is told apart at once, so that a foreign client is not left waiting.
            if not _MAGIC.startswith(bytes(buffer[:2])):
                raise WireError("not a frame: bad magic")
            return None
        if buffer[:2] != _MAGIC:
            raise WireError("not a frame: bad magic")
        if buffer[2] != FRAMING:
            raise WireError(f"framing version {buffer[2]} is not {FRAMING}")
        kind, nfds = buffer[3], buffer[12]
        if not REQUEST <= kind <= EVENT:
            raise WireError(f"unknown frame kind {kind}")
        length = _u32_at(buffer, 8)
        if length > self.limits[kind]:
            raise WireError(f"payload of {length} bytes exceeds {self.limits[kind]}")
        if nfds > MAX_FDS:
            raise WireError(f"{nfds} descriptors exceed {MAX_FDS}")
        if any(buffer[13:HEADER_SIZE]):
            raise WireError("reserved header bytes are not zero")
        end = HEADER_SIZE + length
        if len(buffer) < end:
            return None
        value = decode(bytes(buffer[HEADER_SIZE:end]))
        if type(value) is not dict:
            raise WireError(f"a payload is a dict, not {type(value).__name__}")
        frame = Frame(kind, _u32_at(buffer, 4), value, nfds)
        del buffer[:end]
        return frame


def encode(value: object) -> bytes:
    """The value in the compact encoding described above.

    Raises:
        WireError: a type that cannot be carried (subclasses included), an int outside 64 bits, a str with
            surrogates, nesting deeper than MAX_DEPTH.
    """
    parts: list[bytes] = []
    _encode_into(parts, value, 1)
    return b"".join(parts)


def _encode_into(parts: list[bytes], value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    if value is None:
        parts.append(b"N")
    elif value is True:
        parts.append(b"T")
    elif value is False:
        parts.append(b"F")
    elif type(value) is int:
        if not _INT_MIN <= value <= _INT_MAX:
            raise WireError(f"int of {value.bit_length()} bits does not fit 64")
        parts.append(b"i" + value.to_bytes(8, "little", signed=True))
    elif type(value) is bytes:
        parts.append(b"y" + _u32(len(value)))
        parts.append(value)
    elif type(value) is str:
        parts.append(b"s")
        _encode_text(parts, value)
    elif type(value) is list:
        parts.append(b"l" + _u32(len(value)))
        for item in value:
            _encode_into(parts, item, depth + 1)
    elif type(value) is dict:
        parts.append(b"d" + _u32(len(value)))
        for key, item in value.items():
            if type(key) is not str:
                raise WireError(f"a key is a str, not {type(key).__name__}")
            _encode_text(parts, key)
            _encode_into(parts, item, depth + 1)
    else:
        raise WireError(f"cannot carry a {type(value).__name__}")


def _encode_text(parts: list[bytes], text: str) -> None:
    try:
        content = text.encode("utf-8", "strict")
    except UnicodeEncodeError as error:
        raise WireError("a str holds surrogates; raw bytes are sent as bytes") from error
    parts.append(_u32(len(content)))
    parts.append(content)


def decode(data: bytes) -> Value:
    """The one value that `data` encodes, all of it.

    Raises:
        WireError: anything else than exactly one well-formed value.
    """
    value, end = _decode_at(data, 0, 1)
    if end != len(data):
        raise WireError(f"{len(data) - end} bytes after the value")
    return value


def _decode_at(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise WireError(f"nested deeper than {MAX_DEPTH}")
    tag = data[at : at + 1]
    at += 1
    if tag == b"s":
        return _text_at(data, at)
    if tag == b"y":
        return _content_at(data, at)
    if tag == b"i":
        if at + 8 > len(data):
            raise WireError("value is cut short")
        return int.from_bytes(data[at : at + 8], "little", signed=True), at + 8
    if tag == b"d":
        return _dict_at(data, at, depth)
    if tag == b"l":
        return _list_at(data, at, depth)
    if tag == b"N":
        return None, at
    if tag == b"T":
        return True, at
    if tag == b"F":
        return False, at
    raise WireError(f"unknown tag {tag!r}" if tag else "value is cut short")


def _list_at(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    # A count needs no bound of its own: every item takes a byte at least, so the loop ends with the data.
    count, at = _count_at(data, at)
    items: list[Value] = []
    for _ in range(count):
        item, at = _decode_at(data, at, depth + 1)
        items.append(item)
    return items, at


def _dict_at(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    count, at = _count_at(data, at)
    entries: dict[str, Value] = {}
    for _ in range(count):
        key, at = _text_at(data, at)
        if key in entries:
            raise WireError("a key occurs twice")
        entries[key], at = _decode_at(data, at, depth + 1)
    return entries, at


def _text_at(data: bytes, at: int) -> tuple[str, int]:
    content, at = _content_at(data, at)
    try:
        return content.decode("utf-8", "strict"), at
    except UnicodeDecodeError as error:
        raise WireError("a str is not UTF-8") from error


def _content_at(data: bytes, at: int) -> tuple[bytes, int]:
    length, at = _count_at(data, at)
    if at + length > len(data):
        raise WireError("value is cut short")
    return data[at : at + length], at + length


def _count_at(data: bytes, at: int) -> tuple[int, int]:
    if at + 4 > len(data):
        raise WireError("value is cut short")
    return _u32_at(data, at), at + 4


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _u32_at(data: bytes | bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
