"""Output that is put into its wire form by hand is what protobuf would have made."""

from __future__ import annotations

import pytest

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc.chunks import encode_chunk, encode_output, pass_encoded

# Around the lengths at which a length takes one more digit, of the chunk and of the event around it.
LENGTHS = (0, 1, 100, 127, 128, 16_370, 16_383, 16_384, 256 << 10, 2_097_152)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [0, 1, (1 << 64) - 1])
def test_encoded_output_is_read_as_the_message_it_stands_for(length: int, offset: int) -> None:
    """Any client must get the same stream, offset and data."""
    data = bytes(range(256)) * (length // 256) + bytes(length % 256)
    chunk = pb.OutputChunk(stream=pb.STDERR, offset=offset, data=data)
    assert pb.OutputChunk.FromString(encode_chunk(pb.STDERR, offset, data)) == chunk
    assert pb.ProcessEvent.FromString(encode_output(pb.STDERR, offset, data)) == pb.ProcessEvent(output=chunk)


def test_only_what_is_encoded_is_passed_on_as_it_is() -> None:
    """Streams of output tell other events as well."""
    serialize = pass_encoded(pb.ProcessEvent.SerializeToString)
    closed = pb.ProcessEvent(closed=pb.StreamClosed(length=3))
    assert serialize(closed) == closed.SerializeToString()
    encoded = encode_output(pb.STDOUT, 0, b"abc")
    assert serialize(encoded) is encoded
