"""Output as messages in their wire form, which saves a copy into the message and one out of it.

Fields of a message follow each other in any order, and one with a length may come behind all others: so the data is
put behind what protobuf has made of the rest.

Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NewType

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.wire_form import bytes_head

Encoded = NewType("Encoded", bytes)
"""A message in its wire form; `pass_encoded` lets it through."""


def encode_chunk(stream: pb.Stream.ValueType, offset: int, data: bytes) -> Encoded:
    """An OutputChunk."""
    return Encoded(b"".join((_chunk_head(stream, offset, data), data)))


def encode_output(stream: pb.Stream.ValueType, offset: int, data: bytes) -> Encoded:
    """A ProcessEvent of an OutputChunk."""
    head = _chunk_head(stream, offset, data)
    return Encoded(
        b"".join((bytes_head(pb.ProcessEvent.OUTPUT_FIELD_NUMBER, len(head) + len(data)), head, data))
    )


def encode_stream_out(data: bytes) -> Encoded:
    """A StreamOutResponse."""
    return Encoded(b"".join((bytes_head(pb.StreamOutResponse.DATA_FIELD_NUMBER, len(data)), data)))


def _chunk_head(stream: pb.Stream.ValueType, offset: int, data: bytes) -> bytes:
    return pb.OutputChunk(stream=stream, offset=offset).SerializeToString() + bytes_head(
        pb.OutputChunk.DATA_FIELD_NUMBER, len(data)
    )


def pass_encoded(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """A serializer for answers of which some are Encoded already; grpc's stubs say that there may be none."""
    assert serialize is not None

    def pass_or_serialize(answer: Any) -> bytes:
        return answer if isinstance(answer, bytes) else serialize(answer)

    return pass_or_serialize
