"""Compressed layers in pieces: whole ones, cut ones, and bombs."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterable

import pytest
import zstandard
from kit import hostile_layers as build

from garden_py.backend.images import decompress
from garden_py.backend.images.layer_failures import InvalidLayer

PLAIN = b"".join(random.Random(3).randbytes(1000) + bytes(3000) for _ in range(100))
FORMS = {"gzip": build.gzip_members, "zstd": build.zstd_frames}
forms = pytest.mark.parametrize("compress", FORMS.values(), ids=FORMS)


def plain_pieces(pieces: Iterable[bytes]) -> list[bytes]:
    """All that comes out; the head is looked at as the reader of layers does."""
    pieces = list(pieces)
    made = decompress.decompressor_for(b"".join(pieces)[: decompress.DETECT_BYTES])
    found = [plain for piece in pieces for plain in made.feed(piece)]
    made.finish()
    return found


@forms
@pytest.mark.parametrize("step", [1, 2, 7, 1000, 10**9])
def test_the_same_comes_out_however_it_comes_in(compress: Callable[[bytes], bytes], step: int) -> None:
    """Several members or frames, skippable ones among them."""
    data = compress(PLAIN)
    assert b"".join(plain_pieces(data[at : at + step] for at in range(0, len(data), step))) == PLAIN


@forms
def test_every_cut_is_noticed(compress: Callable[[bytes], bytes]) -> None:
    """But one between members or frames: what is there is whole then, and the digest tells."""
    data = compress(b"some text " * 20)
    problems = {cut: _problem(data[:cut]) for cut in range(4, len(data))}
    assert {problem.split()[-1] for problem in problems.values() if problem} == {"truncated"}
    # After a skippable frame as well.
    assert list(problems.values()).count("") == (2 if compress is build.gzip_members else 5)


def _problem(data: bytes) -> str:
    try:
        plain_pieces([data])
    except InvalidLayer as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_a_bomb_comes_out_in_small_pieces(form: str) -> None:
    """However large what it is fed at once."""
    count = 64 << 20
    data = build.zeros_compressed(form, count, b"")
    pieces = plain_pieces([data])
    assert sum(map(len, pieces)) == count
    assert max(map(len, pieces)) <= 10 * (128 << 10)


def test_windows_are_bounded() -> None:
    """A frame may ask for gigabytes of memory before its first byte."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compress = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compress.compress(b"x" * 1000) + compress.flush()
    with pytest.raises(InvalidLayer, match="memory"):
        plain_pieces([data])


def test_gzip_is_followed_by_members_or_zeros() -> None:
    """Anything else is no part of the stream."""
    data = gzip.compress(b"a")
    assert b"".join(plain_pieces([data, bytes(3), bytes(3)])) == b"a"
    for behind in (b"x", b"\0x", data[:2] + b"x" * 20):
        with pytest.raises(InvalidLayer):
            plain_pieces([data + behind])


def test_what_has_no_magic_number_is_plain() -> None:
    """A tar archive, or nothing that the reader of archives would take."""
    assert plain_pieces([b"BZh", b"9"]) == [b"BZh", b"9"]
