"""Tar archives read as streams: the same as the standard library sees, and numbers that mean harm."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import hostile_layers as build

from garden_py.backend.images import tar_numbers
from garden_py.backend.images.layer_failures import InvalidLayer, LayerTooLarge, shown
from garden_py.backend.images.tar_reader import Entry, Kind, PlainStream, TarReader


def read(data: bytes, *, step: int = 1000) -> Iterator[tuple[Entry, bytes]]:
    """Entries with their content, the archive in pieces."""
    pieces = iter([data[at : at + step] for at in range(0, len(data), step)])
    reader = TarReader(PlainStream(pieces, max_bytes=len(data)))
    for entry in reader:
        yield entry, b"".join(reader.content())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [1, 511, 512, 4096])
def test_what_the_standard_library_writes(form: int, step: int) -> None:
    """Names with a prefix, long ones and targets, large numbers, in its three formats."""
    out = io.BytesIO()
    names = ["a", "dir" * 20 + "/" + "file" * 20]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 300, "ümlaut\udcff"]
    with tarfile.open(
        fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = number * 700, 0o4755, 5
            member.uid = 5 if form == tarfile.USTAR_FORMAT else 3_000_000_000
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "t" * (100 if form == tarfile.USTAR_FORMAT else 300)
        archive.addfile(member)
    *files, (link, _) = read(out.getvalue(), step=step)
    for number, (entry, content) in enumerate(files):
        assert entry.name == names[number].encode("utf-8", "surrogateescape")
        assert content == bytes([number]) * number * 700
        assert (entry.mode, entry.mtime_ns) == (0o4755, 5_000_000_000)
        assert entry.uid == (5 if form == tarfile.USTAR_FORMAT else 3_000_000_000)
    assert (link.kind, link.target) == (Kind.SYMLINK, member.linkname.encode())


def test_content_that_nobody_takes_is_skipped() -> None:
    """Of files that are no part of the tree."""
    reader = TarReader(
        PlainStream(iter([build.layer(build.file(b"a", b"x" * 700), build.file(b"b"))]), max_bytes=9999)
    )
    assert [entry.name for entry in reader] == [b"a", b"b"]


def test_links_and_directories_have_no_content_whatever_they_say() -> None:
    """The next header follows at once."""
    heads = [build.header(b"n", kind, size=512, target=b"t") for kind in (b"1", b"2", b"5", b"6")]
    found = [entry for entry, _ in read(build.layer(*heads, build.file(b"f")))]
    assert [entry.kind for entry in found] == [
        Kind.HARD_LINK,
        Kind.SYMLINK,
        Kind.DIRECTORY,
        Kind.FIFO,
        Kind.FILE,
    ]
    assert not any(entry.size for entry in found)


def test_an_extension_is_for_one_entry() -> None:
    """A global one is for none: images' builders write comments only."""
    data = build.layer(
        build.pax({b"uid": b"7"}, b"g"),
        build.pax({b"path": b"p", b"uid": b"8"}),
        build.file(b"a"),
        build.file(b"b"),
    )
    assert [(entry.name, entry.uid) for entry, _ in read(data)] == [(b"p", 8), (b"b", 0)]


def test_a_volume_label_is_no_entry() -> None:
    """GNU tar's --label."""
    assert [entry.name for entry, _ in read(build.layer(build.header(b"label", b"V"), build.file(b"a")))] == [
        b"a"
    ]


def test_the_stream_is_bounded() -> None:
    """With what lies behind the end, which is hashed and read for nothing."""
    stream = PlainStream(iter([build.layer(build.file(b"a")), bytes(5000)]), max_bytes=5000)
    with pytest.raises(LayerTooLarge, match="limit of 5000 bytes"):
        list(TarReader(stream))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644), (b"    644 ", 0o644), (b"644\0junk", 0o644), (bytes(8), 0), (b"       \0", 0),
        (b"\x80" + bytes(6) + b"\x05", 5), (b"\xff" * 8, -1), (b"\xff" * 7 + b"\x00", -256),
        (b"\xc0" + bytes(7), -(1 << 62)),
    ],
)  # fmt: skip
def test_header_numbers(field: bytes, value: int) -> None:
    """Octal as anybody wrote it, and GNU's binary form."""
    assert tar_numbers.header_number(field, "size") == value


@pytest.mark.parametrize(
    "field", [b"-000001\0", b"0x1\0\0\0\0\0", b"0_1\0\0\0\0\0", b"89\0\0\0\0\0\0", b"+1\0\0\0\0\0\0"]
)
def test_what_is_no_header_number(field: bytes) -> None:
    """Though `int` would take some of it."""
    with pytest.raises(InvalidLayer, match="size is not a number"):
        tar_numbers.header_number(field, "size")


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        (b"1", 1_000_000_000),
        (b"1.", 1_000_000_000),
        (b"-1.25", -1_250_000_000),
        (b"0.1234567891", 123_456_789),
    ],
)
def test_times(text: bytes, ns: int) -> None:
    """Seconds with any number of digits behind the point."""
    assert tar_numbers.time_ns(text) == ns


@pytest.mark.parametrize("text", [b"", b"nan", b"1e9", b"--1", b"1.-5", b" 1", b"9" * 30])
def test_what_is_no_time(text: bytes) -> None:
    """Or too far away for any clock."""
    with pytest.raises(InvalidLayer, match="mtime"):
        tar_numbers.time_ns(text)


@given(
    st.lists(
        st.tuples(st.binary(min_size=1, max_size=9).filter(lambda k: b"=" not in k), st.binary(max_size=120))
    )
)
def test_pax_records_survive(records: list[tuple[bytes, bytes]]) -> None:
    """Values of any bytes, lengths whose own digits count."""
    data = b"".join(build._record(*record) for record in records)
    assert list(tar_numbers.pax_records(data)) == records
    assert list(tar_numbers.pax_records(data + bytes(3))) == records


@pytest.mark.parametrize(
    "data",
    b"x|5 a=b|4 a=b\n|99 a=b\n|6 a=b\n\n|5 ab\n|5 =b\n|0 a=b\n|-5 a=b\n".split(b"|"),
)
def test_malformed_pax_headers(data: bytes) -> None:
    """Lengths that lie, records without a keyword."""
    with pytest.raises(InvalidLayer, match="pax header is malformed"):
        list(tar_numbers.pax_records(data))


@pytest.mark.parametrize(
    ("flat", "stored", "real"),
    [
        ([0], 0, 9), ([5, 2, 4, 1], 3, 9), ([0, -1], -1, 9), ([-1, 2], 2, 9), ([5, 5], 5, 9), ([0, 2], 3, 9),
        ([0, 2, 5, 1], 2, 9),
    ],
)  # fmt: skip
def test_maps_that_are_not_of_the_file(flat: list[int], stored: int, real: int) -> None:
    """Out of order, beyond the end, more or less than what is stored."""
    with pytest.raises(InvalidLayer, match="sparse"):
        tar_numbers.checked_segments(flat, stored, real)


def test_names_in_messages_are_safe_to_show() -> None:
    """No control characters of a stranger on an operator's terminal, and not a megabyte of them."""
    assert shown(b"a\x1b[31m\n\xff") == "'a\\x1b[31m\\n\\\\xff'"
    assert len(shown(b"n" * 10_000)) < 130
