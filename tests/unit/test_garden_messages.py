"""Control messages may be cut anywhere, and what makes no sense costs nothing but itself."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.api.http import messages
from garden_py.api.http.messages import (
    MESSAGE_MAX_BYTES,
    Garbage,
    GardenSignal,
    Message,
    MessageDecoder,
    Resize,
    SignalProcess,
    StdinData,
    StdinEnd,
)
from garden_py.model.process import WindowSize


def decode(*pieces: bytes) -> list[Message]:
    decoder = MessageDecoder()
    return [message for piece in pieces for message in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"process_id":"p","source":0,"data":"hello"}', StdinData(b"hello")),
        ('{"process_id":"p","source":0}', StdinEnd()),
        ('{"source":0,"data":null}', StdinEnd()),
        ('{"source":2,"data":"x"}', StdinData(b"x")),
        ('{"source":0,"data":""}', StdinData(b"")),
        ('{"tty":{"window_size":{"columns":100,"rows":40}}}', Resize(WindowSize(rows=40, columns=100))),
        ('{"tty":{},"source":0,"signal":1}', Resize(None)),
        ('{"signal":0}', SignalProcess(GardenSignal.TERMINATE)),
        ('{"source":0,"data":"x","signal":1}', StdinData(b"x")),
        ('{"signal":1}', SignalProcess(GardenSignal.KILL)),
        (r'{"source":0,"data":"\ud83d\ude00 \ud800"}', StdinData("\U0001f600 �".encode())),
    ],
)
def test_messages_and_their_precedence(text: str, message: Message) -> None:
    """Statements 17 and 19 of the protocol's §6.4; a newline is not needed."""
    assert decode(text.encode()) == [message]
    assert decode(text.encode() + b"\n") == [message]


@pytest.mark.parametrize(
    "text",
    [
        '{"process_id":"p"}',
        "{}",
        '{"signal":2}',
        '{"signal":"TERM"}',
        '{"tty":{"window_size":{"rows":70000}}}',
    ],
)
def test_unknown_messages_are_ignored(text: str) -> None:
    """Statement 21."""
    assert decode(text.encode(), b'{"signal":1}\n') == [SignalProcess(GardenSignal.KILL)]


@pytest.mark.parametrize("data", [b"hello\n", b"}", b"\x00", b'"text\n', b"[1}\n", b"1" * 5000, b"nul\n"])
def test_what_is_no_json_is_garbage(data: bytes) -> None:
    """Nothing behind it could be understood."""
    with pytest.raises(Garbage):
        decode(data)


@pytest.mark.parametrize("data", [b"null\n", b"[1]\n", b'"text"\n', b"-1.5e3\n", b"\n\n true\n"])
def test_what_is_no_object_is_ignored(data: bytes) -> None:
    """Statement 21, as far as it is JSON on a line of its own."""
    assert decode(data + b'{"signal":1}\n') == [SignalProcess(GardenSignal.KILL)]
    assert decode(*(bytes([each]) for each in data + b'{"signal":1}')) == [SignalProcess(GardenSignal.KILL)]


def test_message_without_end_is_garbage() -> None:
    """Memory is bounded."""
    pieces = [b'{"signal":0,"data":"', *[b"x" * (64 << 10)] * (MESSAGE_MAX_BYTES // (64 << 10) + 1)]
    with pytest.raises(Garbage, match="longer than"):
        decode(*pieces)


LONG = ["x" * 3_000_000, 'é\U0001f600\n"\\' * 300_000, "\\" * 1_500_000, '"' * 1_500_000]


@pytest.mark.parametrize("text", LONG, ids=["plain", "mixed", "backslashes", "quotes"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("piece", [65_537, 256 << 10])
def test_input_of_any_size_may_come_in_one_message(text: str, piece: int, *, ascii_only: bool) -> None:
    """So Go sends a bytes.Buffer. It is passed on as it comes, and what is behind it is understood."""
    message = {"process_id": 'p"{', "source": 0, "data": text}
    data = json.dumps(message, ensure_ascii=ascii_only).encode() + b'\n{"signal":1}\n'
    decoder = MessageDecoder()
    found: list[Message] = []
    held = 0
    for at in range(0, len(data), piece):
        found += decoder.feed(data[at : at + piece])
        held = max(held, len(decoder._buffer))
    *inputs, last = found
    assert b"".join(each.data for each in inputs if isinstance(each, StdinData)) == text.encode()
    assert last == SignalProcess(GardenSignal.KILL)
    assert held < 2 << 20
    assert not decoder._buffer


@given(st.text(), st.booleans(), st.lists(st.integers(1, 9)))
def test_cuts_change_nothing_of_long_input(text: str, ascii_only: bool, cuts: list[int]) -> None:
    """Wherever in an escape, a pair or a character they are."""
    value = {"process_id": "p", "source": 0, "data": text}
    data = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass") + b'{"signal":0}'
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut
    with mock.patch.object(messages, "_LONG_BYTES", 45):
        *inputs, last = decode(*pieces, data[at:])
    assert last == SignalProcess(GardenSignal.TERMINATE)
    whole = json.loads(json.dumps(value)) if ascii_only else json.loads(data[:-12].decode(errors="replace"))
    assert b"".join(each.data for each in inputs if isinstance(each, StdinData)) == messages._encode(
        whole["data"]
    )


def test_long_input_that_is_no_json_is_garbage() -> None:
    """As short one is; what came before that has been passed on."""
    pieces = [b'{"source":0,"data":"', *[b"x" * (64 << 10)] * 32, b"\\q", b"x" * 100]
    with pytest.raises(Garbage):
        decode(*pieces)


def test_half_of_a_pair_at_the_end_of_long_input_is_replaced() -> None:
    """As in short input."""
    decoder, found = MessageDecoder(), []
    for piece in (b'{"source":0,"data":"', *[b"x" * (64 << 10)] * 17, b"\\ud83d", b'"}{"signal":1}'):
        found += decoder.feed(piece)
    data = b"".join(each.data for each in found if isinstance(each, StdinData))
    assert data.lstrip(b"x") == "\N{REPLACEMENT CHARACTER}".encode()
    assert found[-1] == SignalProcess(GardenSignal.KILL)


def test_what_is_behind_long_input_in_its_object_means_nothing() -> None:
    """It has been passed on already."""
    long = b"x" * (2 << 20)
    pieces = [b'{"source":0,"data":"', long[: 1 << 20], long[1 << 20 :], b'","tty":{"a":["}"]}}{"signal":0}']
    *_, last = decode(*pieces)
    assert last == SignalProcess(GardenSignal.TERMINATE)


@pytest.mark.parametrize("bad", [b"{]}", b'{"source":' + b"1" * 5000 + b"}", b"{" * 100, b'{"a":\x01}', b"x"])
def test_what_can_be_understood_before_garbage_is_done(bad: bytes) -> None:
    """And garbage is told at once, not when more of it has come than a message may have."""
    messages = MessageDecoder().feed(b'{"signal":1}' + bad)
    assert next(messages) == SignalProcess(GardenSignal.KILL)
    with pytest.raises(Garbage):
        next(messages)


def test_drip_costs_what_it_weighs() -> None:
    """A client that sent braces one at a time had its message read anew for each: half a minute of everybody's time."""
    decoder, seen = MessageDecoder(), 0
    list(decoder.feed(b'{"source":0,"data":"'))
    for _ in range(100_000):
        list(decoder.feed(b"}"))
        seen += len(decoder._buffer) - decoder._scanned
    assert seen == 0  # nothing is left to be looked at again
    assert list(decoder.feed(b'"}')) == [StdinData(b"}" * 100_000)]


def test_message_is_done_before_the_next_one_is_complete() -> None:
    """A signal does not wait for what is behind it."""
    assert decode(b'{"signal":1}{"source":0,"da') == [SignalProcess(GardenSignal.KILL)]


_messages = st.one_of(
    st.builds(
        lambda data: ({"source": 0, "data": data}, StdinData(data.encode())),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    st.just(({"source": 0}, StdinEnd())),
    st.just(({"signal": 1}, SignalProcess(GardenSignal.KILL))),
)


@given(
    st.lists(_messages, max_size=8), st.lists(st.integers(1, 40), max_size=60), st.booleans(), st.booleans()
)
def test_cuts_change_nothing(
    messages: list[tuple[dict[str, Any], Message]], cuts: list[int], newlines: bool, indented: bool
) -> None:
    """The same messages come out wherever the network cuts them."""
    end = "\n" if newlines else ""
    data = "".join(json.dumps(value, indent=1 if indented else None) + end for value, _ in messages).encode()
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut
    assert decode(*pieces, data[at:]) == [message for _, message in messages]


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_no_bytes_make_it_fail_otherwise(pieces: list[bytes]) -> None:
    """Messages, or Garbage."""
    try:
        decode(*pieces)
    except Garbage:
        return
