"""What must hold for any bytes at all."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import h11

from garden_py import wire
from garden_py.agent import fields as agent_fields
from garden_py.api.http import decode, exchange, fields, messages, routes
from garden_py.backend.images import decompress, layer_paths, tar_numbers, tar_reader
from garden_py.backend.images.layer_failures import LayerError
from garden_py.backend.streams import agent_replies
from garden_py.model import errors
from garden_py.model.netrule import DefaultAction

_BODY_MAX = 64 << 10
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


def cuts_of(data: bytes) -> Iterator[list[bytes]]:
    """The same bytes in different pieces: whole, one by one, and somehow; the same for the same bytes."""
    yield [data]
    if len(data) <= 200:
        yield [data[i : i + 1] for i in range(len(data))]
    chance, pieces, at = random.Random(zlib.crc32(data)), [], 0
    while at < len(data):
        size = chance.choice((1, 2, 3, 30, 200))
        pieces.append(data[at : at + size])
        at += size
    yield pieces


def same_however_cut(data: bytes, read: Callable[[Iterable[bytes]], Any]) -> Any:
    """What `read` makes of the bytes, which must not depend on where the network cuts them."""
    first, *others = [read(pieces) for pieces in cuts_of(data)]
    for other in others:
        assert other == first, f"{other} is not {first}"
    return first


# --- control messages of the Garden door


def read_messages(pieces: Iterable[bytes]) -> tuple[list[messages.Message], bool]:
    """The messages, and whether they ended with garbage."""
    decoder, found = messages.MessageDecoder(), []
    try:
        for piece in pieces:
            for message in decoder.feed(piece):
                found.append(message)
    except messages.Garbage:
        return found, True
    return found, False


def check_messages(data: bytes) -> object:
    """Messages or Garbage, and the same however they are cut."""
    return same_however_cut(data, read_messages)


# --- frames between server and agent


def read_frames(pieces: Iterable[bytes]) -> tuple[list[wire.Frame], str]:
    """The frames, and what ended them."""
    decoder, found = wire.Decoder(), []
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                found.append(frame)
    except wire.WireError as error:
        return found, str(error)
    return found, ""


def check_frames(data: bytes) -> object:
    """Each frame has one encoding only; neither side fails on what is in it in a way that it did not foresee."""
    frames, failure = same_however_cut(data, read_frames)
    encoded = b"".join(wire.encode_frame(f.kind, f.id, f.value, f.nfds) for f in frames)
    assert data.startswith(encoded)
    for frame in frames:
        with suppress(agent_replies.AgentMisbehaved, agent_replies.ForeignWire):
            agent_replies.parse_greeting(frame.value)
        agent_replies.parse_exit(frame.value)
        for flag in (True, False):
            reply = agent_replies.Reply(frame.value, [])
            with suppress(agent_replies.AgentMisbehaved):
                agent_replies.parse_spawned(reply, is_master=flag, is_complete=not flag, is_tty=flag)
        request = agent_fields.Fields(frame.value)
        for name in list(frame.value)[:8]:
            for take in (
                request.text, request.identifier, request.integer_pair, request.boolean, request.byte_string,
                request.byte_strings, request.optional_mapping,
            ):  # fmt: skip
                with suppress(agent_fields.InvalidField):
                    take(name)
    return len(frames), failure


# --- requests of the Garden door


class _Writer:
    """Of a connection whose client reads all."""

    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        pass


_LOOP = asyncio.new_event_loop()
_DECODERS: dict[str, Callable[[fields.Fields], object]] = {
    "create": lambda found: decode.container_spec(found, DefaultAction.ALLOW),
    "run": decode.process_spec,
    "net_in": decode.port_mapping,
    "net_out": decode.egress_rule,
}


async def _handle(request: exchange.Request, hijacked: list[Any]) -> exchange.Answer:
    """Route and decode as the door does, without a service behind."""
    found = routes.match_route(request.method, request.target)
    try:
        body = await request.body(_BODY_MAX)
    except (exchange.BodyTooLarge, exchange.BrokenBody):
        return exchange.Reply(500, b"")
    if isinstance(found, routes.NoMatch):
        return exchange.Reply(404, b"")
    try:
        if found.name in ("run", "attach"):

            async def then(reader: Any, writer: Any) -> None:
                pieces = []
                while piece := await reader.read(1 << 16):
                    pieces.append(piece)
                hijacked.append(read_messages(pieces))

            if found.name == "run":
                decode.process_spec(fields.parse_object(body))
            return exchange.Hijack(200, then)
        if found.name in _DECODERS:
            _DECODERS[found.name](fields.parse_object(body))
        elif found.name == "set_grace_time":
            decode.grace_time_s(fields.parse_value(body))
    except (fields.BadJson, errors.GardenError):
        return exchange.Reply(500, b"")
    return exchange.Reply(200, b"{}\n")


def read_requests(pieces: Iterable[bytes]) -> tuple[list[bytes], list[Any]]:
    """The statuses that are answered, and what came over connections that were taken over.

    Without 100: whether somebody waits for leave to send a body depends on how much of it has come.
    """
    return _LOOP.run_until_complete(_converse(list(pieces)))


async def _converse(pieces: list[bytes]) -> tuple[list[bytes], list[Any]]:
    reader, writer, hijacked = asyncio.StreamReader(), _Writer(), list[Any]()
    handler: Callable[[exchange.Request], Awaitable[exchange.Answer]] = lambda r: _handle(r, hijacked)  # noqa: E731
    made = exchange.Connection(reader, writer, handler, head_timeout_s=0, idle_timeout_s=60)  # type: ignore[arg-type]
    serving = asyncio.ensure_future(made.serve())
    for piece in pieces:
        reader.feed_data(piece)
        for _ in range(3):
            await asyncio.sleep(0)
    reader.feed_eof()
    await asyncio.wait_for(serving, 10)
    return [status for status in _STATUS.findall(writer.sent) if status != b"100"], hijacked


def check_requests(data: bytes) -> object:
    """Every request gets an answer that does not depend on the cuts; nothing else escapes."""
    return same_however_cut(data, read_requests)


# --- layers of images

_PLAIN_MAX = 4 << 20
_PIECE_MAX = 10 * (128 << 10)  # zstd: a block that was cut before, and the eight that are decoded at once


def read_layer(pieces: Iterable[bytes]) -> object:
    """The entries of a tar archive with their content, and what ended them; checksums are taken as right."""
    stream = tar_reader.PlainStream(iter([piece for piece in pieces if piece]), max_bytes=_PLAIN_MAX)
    reader, found = tar_reader.TarReader(stream), []
    has_checksum, tar_reader.has_checksum = tar_reader.has_checksum, lambda header: True
    try:
        for entry in reader:
            found.append((repr(entry), b"".join(reader.content())))
            assert 0 <= entry.stored_size <= entry.size or entry.segments is None
            assert sum(length for _, length in entry.segments or ()) in (0, entry.stored_size)
            with suppress(LayerError):
                parts = layer_paths.split_name(entry.name)
                assert not {b"", b".", b".."}.intersection(parts)
    except LayerError as error:
        return found, str(error)
    finally:
        tar_reader.has_checksum = has_checksum
    return found, ""


def read_compressed(pieces: Iterable[bytes]) -> object:
    """The plain bytes; None if they are damaged or too many."""
    pieces = [piece for piece in pieces if piece]
    head = b"".join(pieces)[: decompress.DETECT_BYTES]
    made, plain = decompress.decompressor_for(head), b""
    try:
        for piece in itertools.chain.from_iterable(map(made.feed, pieces)):
            assert len(piece) <= _PIECE_MAX
            plain += piece
            if len(plain) > _PLAIN_MAX:
                return None
        made.finish()
    except LayerError:
        return None
    return plain


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        check: takes an input and raises when something does not hold.
        read: the heart of it, from pieces; whatever it reaches in `modules` that was not reached before is new.
    """

    check: Callable[[bytes], object]
    read: Callable[[Iterable[bytes]], object]
    modules: tuple[ModuleType, ...]


TARGETS = {
    "requests": Target(
        check_requests, read_requests, (exchange, routes, decode, fields, messages, h11._readers)
    ),
    "messages": Target(check_messages, read_messages, (messages, fields)),
    "frames": Target(
        check_frames, lambda pieces: check_frames(b"".join(pieces)), (wire, agent_replies, agent_fields)
    ),
    "layers": Target(
        lambda data: same_however_cut(data, read_layer), read_layer, (tar_reader, tar_numbers, layer_paths)
    ),
    "compressed": Target(
        lambda data: same_however_cut(data, read_compressed), read_compressed, (decompress,)
    ),
}
