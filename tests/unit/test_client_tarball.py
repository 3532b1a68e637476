"""Copies: what is packed comes out the same, and a hostile archive gets nowhere."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from kit.fake_server import serve_fake

from garden_py.client import GardenClient, UnsafeArchive
from garden_py.client.tar_pack import count_bytes, pack, pack_bytes
from garden_py.client.tarball import split_container_path, unpack, unpack_single


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> list[bytes]:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return [packed.getvalue()]


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def file(name: str, data: bytes = b"x", mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.mode = mode
    return member, data


def split(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    data = b"".join(chunks)
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


@pytest.mark.parametrize("chunk_bytes", [1000, 7, 1 << 20])
def test_a_tree_comes_out_as_it_went_in(tmp_path: Path, chunk_bytes: int) -> None:
    """However the network cuts the stream."""
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "file").write_bytes(os.urandom(1500))
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o750)
    (source / "link").symlink_to("/nowhere/at/all")
    os.link(source / "run.sh", source / "same.sh")
    (source / ("long" * 40)).write_text("a name beyond the old limit of 100 bytes")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
        unpack(split(pack(source), chunk_bytes), tmp_path / "copy")
    copy = tmp_path / "copy" / "source"
    assert (copy / "deep/er/file").read_bytes() == (source / "deep/er/file").read_bytes()
    assert (copy / "run.sh").stat().st_mode & 0o777 == 0o750
    assert (copy / "run.sh").stat().st_ino == (copy / "same.sh").stat().st_ino
    assert os.readlink(copy / "link") == "/nowhere/at/all"
    assert (copy / ("long" * 40)).exists()
    assert not (copy / "socket").exists()


def test_holes_and_attributes_come_out_as_they_went_in(tmp_path: Path) -> None:
    """With data at both ends, at the beginning alone, and with none at all; nothing is sent of the holes."""
    source = tmp_path / "source"
    source.mkdir()
    for name, places in {"both": (0, (64 << 20) - 4), "head": (0,), "none": ()}.items():
        with (source / name).open("wb") as held:
            for place in places:
                held.seek(place)
                held.write(b"data")
            held.truncate(64 << 20)
    os.setxattr(source / "both", "user.note", b"\0\xff\n")
    os.setxattr(source, "user.dir", b"1")
    packed = b"".join(pack(source))
    assert len(packed) < 1 << 16
    assert count_bytes(source) < 1 << 16
    unpack(split([packed], 700), tmp_path / "copy")
    copy = tmp_path / "copy" / "source"
    for name in ("both", "head", "none"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
        assert (copy / name).stat().st_blocks * 512 < 1 << 16
    assert os.getxattr(copy / "both", "user.note") == b"\0\xff\n"
    assert os.getxattr(copy, "user.dir") == b"1"
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert [member.size for member in tar if member.isreg()] == [64 << 20] * 3
    collected = io.BytesIO()
    unpack_single(pack(source / "head"), collected)
    assert collected.getvalue() == (source / "head").read_bytes()


@pytest.mark.parametrize("numbers", ["1\n0\n9999\n", "2\n5\n3\n1\n2\n", "1\n0\n600\n"])
def test_a_map_of_holes_that_lies_is_refused(tmp_path: Path, numbers: str) -> None:
    """More than is there, out of order, beyond the end: it would read the next member as content."""
    member, data = file("f", numbers.encode().ljust(512, b"\0") + bytes(5))
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("g"))
    with pytest.raises(UnsafeArchive, match="map of holes"):
        unpack([packed.getvalue()], tmp_path / "target")


def test_the_standard_library_reads_what_is_packed(tmp_path: Path) -> None:
    """Headers are written by hand, so somebody else must agree that they are right."""
    (tmp_path / "file").write_bytes(b"hello")
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(tmp_path / "file", "renamed")))) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.uid, member.uname) == ("renamed", 0, "")
        source = tar.extractfile(member)
        assert source is not None
        assert source.read() == b"hello"


def test_a_copy_can_be_given_another_name(tmp_path: Path) -> None:
    """Hard links inside the archive follow the new name."""
    unpack(archive(file("old/a"), link("old/b", "old/a", tarfile.LNKTYPE)), tmp_path, "new")
    assert (tmp_path / "new" / "a").stat().st_ino == (tmp_path / "new" / "b").stat().st_ino


@pytest.mark.parametrize(
    "members",
    [
        [file("../escaped")],
        [file("/escaped")],
        [file("a/../../escaped")],
        [link("out", ".."), file("out/escaped")],
        [link("dir", "/"), file("dir/escaped")],
        [file("plain"), file("plain/escaped")],
        [link("stolen", "../secret", tarfile.LNKTYPE)],
        [link("stolen", "/etc/passwd", tarfile.LNKTYPE)],
        [link("inner", "../secret"), link("stolen", "inner", tarfile.LNKTYPE)],
        [link("null", "", tarfile.CHRTYPE)],
        [link("pipe", "", tarfile.FIFOTYPE)],
    ],
)
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    """The container may send anything; only the target directory is at stake."""
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    with pytest.raises(UnsafeArchive):
        unpack(archive(*members), tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "target"]
    assert secret.stat().st_nlink == 1


def test_a_file_replaces_a_link_instead_of_following_it(tmp_path: Path) -> None:
    """A link that an earlier copy left must not redirect a later one."""
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    target = tmp_path / "target"
    target.mkdir()
    (target / "name").symlink_to(outside)
    unpack(archive(file("name", b"new")), target)
    assert outside.read_text() == "untouched"
    assert (target / "name").read_bytes() == b"new"


def test_special_mode_bits_are_dropped(tmp_path: Path) -> None:
    """A setuid file of a container must not become one of the host."""
    unpack(archive(file("tool", mode=0o6755)), tmp_path)
    assert (tmp_path / "tool").stat().st_mode & 0o7777 == 0o755


def test_an_unreadable_source_reaches_the_caller(tmp_path: Path) -> None:
    """GRPC reads the tar in a thread of its own; the error must not stay there."""
    with serve_fake(tmp_path) as fake, GardenClient(fake.address) as client:
        container = client.create()

        def failing() -> Iterator[bytes]:
            yield b"".join(pack_bytes("a", b"1", 0o644))[:512]
            raise PermissionError("no entry")

        with pytest.raises(PermissionError, match="no entry"):
            container.stream_in(failing(), path="/")


def test_single_files_can_be_written_and_read(tmp_path: Path) -> None:
    """The common case needs no archive in the caller's hands."""
    with serve_fake(tmp_path) as fake, GardenClient(fake.address) as client:
        container = client.create()
        container.write_file("/etc/motd", b"hello")
        assert container.read_file("/etc/motd") == b"hello"


@pytest.mark.parametrize(
    ("path", "parts"), [("/a/b", ("/a", "b")), ("/b", ("/", "b")), ("b", (".", "b")), ("a/b", ("a", "b"))]
)
def test_container_paths_are_split_into_directory_and_name(path: str, parts: tuple[str, str]) -> None:
    """A relative path stays relative: to the user's home."""
    assert split_container_path(path) == parts
