"""The wire codec keeps its promises towards friendly and hostile peers."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py import wire

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.binary(max_size=200)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(
        st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=5), max_leaves=20
)  # fmt: skip
PAYLOADS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), SCALARS, max_size=4)
FRAMES = st.builds(
    wire.Frame, st.integers(1, 4), st.integers(0, 2**32 - 1), PAYLOADS, st.integers(0, wire.MAX_FDS)
)


def nested(depth: int) -> object:
    value: object = None
    for _ in range(depth - 1):
        value = [value]
    return value


def as_bytes(frames: list[wire.Frame]) -> bytes:
    return b"".join(wire.encode_frame(f.kind, f.id, f.value, f.nfds) for f in frames)


@given(VALUES)
def test_a_value_comes_back_as_it_was(value: object) -> None:
    """Types included: True must not become 1, nor bytes text."""
    decoded = wire.decode(wire.encode(value))
    assert decoded == value
    assert repr(decoded) == repr(value)


@given(st.binary(max_size=400))
def test_garbage_raises_wire_error_and_nothing_else(data: bytes) -> None:
    """The peer is hostile; any other exception would escape its handler."""
    with suppress(wire.WireError):
        wire.decode(data)
    with suppress(wire.WireError):
        list(wire.Decoder().feed(data))


@given(VALUES, st.data())
def test_one_changed_byte_never_raises_anything_but_wire_error(value: object, data: st.DataObject) -> None:
    """Near misses reach deeper code than random bytes."""
    encoded = bytearray(wire.encode(value))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    with suppress(wire.WireError):
        wire.decode(bytes(encoded))


@given(VALUES, st.integers(1, 20))
def test_a_cut_value_is_refused(value: object, missing: int) -> None:
    """A prefix of a value is never another value."""
    encoded = wire.encode(value)
    with pytest.raises(wire.WireError):
        wire.decode(encoded[: max(0, len(encoded) - missing)])


@given(st.lists(FRAMES, max_size=5), st.lists(st.integers(0, 2000), max_size=12))
def test_frames_do_not_depend_on_how_the_stream_is_cut(frames: list[wire.Frame], cuts: list[int]) -> None:
    """A stream socket may deliver any pieces."""
    stream = as_bytes(frames)
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = wire.Decoder()
    received = []
    for start, end in pairwise(bounds):
        received += list(decoder.feed(stream[start:end]))
    assert received == frames
    assert decoder.buffered == b""


@given(st.lists(FRAMES, min_size=1, max_size=3), st.integers(1, 100))
def test_frames_before_a_broken_one_are_delivered_however_the_stream_is_cut(
    frames: list[wire.Frame], piece: int
) -> None:
    """Whether a request counts must not depend on the timing of the bytes behind it."""
    stream = as_bytes(frames) + b"no frame at all, and long enough"
    decoder = wire.Decoder()
    received: list[wire.Frame] = []

    def read_it_all() -> None:
        for at in range(0, len(stream), piece):
            received.extend(decoder.feed(stream[at : at + piece]))

    with pytest.raises(wire.WireError):
        read_it_all()
    assert received == frames


def test_after_an_error_the_decoder_stays_broken() -> None:
    """Framing is lost: later bytes must not be taken for frames again."""
    decoder = wire.Decoder()
    with pytest.raises(wire.WireError):
        list(decoder.feed(b"XX"))
    with pytest.raises(wire.WireError):
        list(decoder.feed(as_bytes([wire.Frame(1, 1, {})])))


@pytest.mark.parametrize(
    ("at", "byte", "reason"),
    [
        (0, 0, "magic"),
        (2, 2, "version"),
        (3, 0, "kind"),
        (3, 5, "kind"),
        (12, 17, "descriptors"),
        (13, 1, "reserved"),
    ],
)
def test_each_bad_header_byte_is_named(at: int, byte: int, reason: str) -> None:
    """A peer of another version should learn what is wrong."""
    frame = bytearray(as_bytes([wire.Frame(1, 1, {})]))
    frame[at] = byte
    with pytest.raises(wire.WireError, match=reason):
        list(wire.Decoder().feed(bytes(frame)))


def test_a_payload_above_the_maximum_is_refused_before_it_is_buffered() -> None:
    """Sixteen bytes must not be able to reserve four gigabytes."""
    header = bytearray(as_bytes([wire.Frame(1, 1, {})])[: wire.HEADER_SIZE])
    header[8:12] = (wire.MAX_PAYLOAD + 1).to_bytes(4, "little")
    with pytest.raises(wire.WireError, match="exceeds"):
        list(wire.Decoder().feed(bytes(header)))
    with pytest.raises(wire.WireError, match="exceeds"):
        wire.encode_frame(1, 1, {"x": bytes(wire.MAX_PAYLOAD)})


def test_a_payload_of_exactly_the_maximum_passes() -> None:
    """The bound is inclusive on both sides."""
    overhead = len(wire.encode({"x": b""}))
    value: dict[str, wire.Value] = {"x": bytes(wire.MAX_PAYLOAD - overhead)}
    assert next(wire.Decoder().feed(wire.encode_frame(1, 1, value))).value == value


@pytest.mark.parametrize("tag", [b"l", b"d"])
def test_a_huge_count_costs_nothing(tag: bytes) -> None:
    """The count is a claim, the bytes are the fact."""
    with pytest.raises(wire.WireError, match="cut short"):
        wire.decode(tag + b"\xff\xff\xff\xff")


def test_nesting_is_bounded_on_both_sides() -> None:
    """Deep nesting would exhaust the stack of whoever decodes it."""
    assert wire.decode(wire.encode(nested(wire.MAX_DEPTH))) == nested(wire.MAX_DEPTH)
    with pytest.raises(wire.WireError, match="nested"):
        wire.encode(nested(wire.MAX_DEPTH + 1))
    with pytest.raises(wire.WireError, match="nested"):
        wire.decode(b"l\x01\0\0\0" * 100_000 + b"N")


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, "\ud800", 1.5, (1,), {1: 2}, object()])
def test_a_value_that_cannot_be_carried_is_refused(value: object) -> None:
    """Silently changed values would surface far from their cause."""
    with pytest.raises(wire.WireError):
        wire.encode(value)


def test_a_repeated_key_is_refused() -> None:
    """Two readers could pick different ones."""
    entry = b"\x01\0\0\0aN"
    with pytest.raises(wire.WireError, match="twice"):
        wire.decode(b"d\x02\0\0\0" + entry + entry)


@pytest.mark.parametrize("value", [None, [], b"x"])
def test_a_payload_that_is_no_dict_is_refused(value: object) -> None:
    """Every handler may rely on fields."""
    with pytest.raises(wire.WireError, match="dict"):
        wire.encode_frame(1, 1, value)
    payload = wire.encode(value)
    header = b"GA\x01\x01" + (1).to_bytes(4, "little") + len(payload).to_bytes(4, "little") + bytes(4)
    with pytest.raises(wire.WireError, match="dict"):
        list(wire.Decoder().feed(header + payload))
