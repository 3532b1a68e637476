"""Layers built byte by byte: well-formed ones, and those that somebody who means harm would send."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import zstandard

BLOCK = 512
END = bytes(2 * BLOCK)
CANARY = b"/tmp/garden-canary"  # the absolute path of a directory outside the target
MIB = 1 << 20


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def binary(value: int, width: int) -> bytes:
    """The form of GNU tar for numbers that octal digits have no room for."""
    return ((1 << (8 * width - 1)) | (value & ((1 << (8 * width - 1)) - 1))).to_bytes(width, "big")


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_000_000_000,
    target: bytes = b"",
    tail: bytes = b"",
    size_field: bytes | None = None,
) -> bytes:
    """A ustar header, or a GNU one if `tail` (from byte 345 on) is given."""

    def number(value: int, width: int) -> bytes:
        fits = 0 <= value < 8 ** (width - 1)
        return octal(value, width) if fits else binary(value, width)

    head = b"".join(
        (
            name[:100].ljust(100, b"\0"), number(mode, 8), number(uid, 8), number(gid, 8),
            size_field or number(size, 12), number(mtime, 12), b" " * 8, kind, target[:100].ljust(100, b"\0"),
            b"ustar  \0" if tail else b"ustar\x0000", bytes(80), tail,
        )
    ).ljust(BLOCK, b"\0")  # fmt: skip
    assert len(head) == BLOCK
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file(name: bytes, data: bytes = b"", **fields: int) -> bytes:
    return header(name, size=len(data), **fields) + padded(data)


def directory(name: bytes, mode: int = 0o755, **fields: int) -> bytes:
    return header(name, b"5", mode=mode, **fields)


def symlink(name: bytes, target: bytes, **fields: int) -> bytes:
    return header(name, b"2", target=target, mode=0o777, **fields)


def hard_link(name: bytes, target: bytes) -> bytes:
    return header(name, b"1", target=target)


def whiteout(name: bytes) -> bytes:
    head, slash, tail = name.rpartition(b"/")
    return file(head + slash + b".wh." + tail)


def opaque(name: bytes) -> bytes:
    return file(name + b"/.wh..wh..opq")


def pax(records: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    """An extension header for the next entry."""
    data = b"".join(_record(*each) for each in (records.items() if isinstance(records, Mapping) else records))
    return header(b"pax", kind, size=len(data)) + padded(data)


def _record(keyword: bytes, value: bytes) -> bytes:
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while len(rest) + len(b"%d" % length) != length:
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    """GNU's extension header for names that the field has no room for."""
    return header(b"././@LongLink", kind, size=len(name) + 1) + padded(name + b"\0")


def layer(*entries: bytes) -> bytes:
    return b"".join(entries) + END


def gzip_members(data: bytes, *, pieces: int = 3) -> bytes:
    """Several members, as pigz and stargz write them."""
    step = len(data) // pieces + 1
    return b"".join(gzip.compress(data[at : at + step], 1) for at in range(0, len(data), step))


def zstd_frames(data: bytes, *, pieces: int = 3) -> bytes:
    """Several frames with a skippable one before each, as zstd:chunked has them; every second with a checksum."""
    step, frames = len(data) // pieces + 1, []
    for number, at in enumerate(range(0, len(data), step)):
        compress = zstandard.ZstdCompressor(level=1, write_checksum=number % 2 == 0)
        frames += [b"\x50\x2a\x4d\x18\x05\0\0\0abcde", compress.compress(data[at : at + step])]
    return b"".join(frames)


def zeros_compressed(compress: str, count: int, head: bytes) -> bytes:
    """`head` and count zeros, compressed without ever being in memory."""
    out = io.BytesIO()
    if compress == "gzip":
        writer: io.RawIOBase | gzip.GzipFile = gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6)
    else:
        writer = zstandard.ZstdCompressor(level=3).stream_writer(out, closefd=False)  # type: ignore[assignment]
    with writer:
        writer.write(head)
        for _ in range(count // MIB):
            writer.write(bytes(MIB))
    return out.getvalue()


@dataclass(frozen=True)
class Hostile:
    """A layer that means harm.

    Attributes:
        build: its bytes.
        code: of the error; None: it is unpacked and harmless.
        says: what the message has in it.
        holds: paths that are in the tree afterwards.
        lacks: paths that are not.
    """

    build: Callable[[], bytes]
    code: str | None = "image_invalid"
    says: str = ""
    holds: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


def _loops() -> bytes:
    return layer(symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/x", b"lost"))


def _deep(depth: int) -> bytes:
    return layer(long_name(b"d/" * depth), directory(b"d"))


def _deep_by_links() -> bytes:
    """Each link leads 200 directories down from where the one before leads."""
    way, entries, link = b"/".join([b"d"] * 200), [], b""
    for number in range(4):
        name = link + b"l%d" % number
        entries += [long_name(way, b"K"), symlink(name, b"")]
        link = name + b"/"
        entries += [file(link + b"x")]
    return layer(*entries)


def _link_bomb() -> bytes:
    """Links that double: a name of twenty links has a million components."""
    links = [symlink(b"l%d" % n, b"l%d/../l%d" % (n + 1, n + 1)) for n in range(20)]
    return layer(directory(b"l20"), *links, file(b"l0/x", b"x"))


def _sparse_bomb() -> bytes:
    tail = bytes(41) + octal(1 << 30, 12) + octal(MIB, 12)
    tail = tail.ljust(483 - 345, b"\0") + octal((1 << 30) + MIB, 12)
    return header(b"sparse", b"S", size=MIB, tail=tail) + bytes(MIB) + END


HOSTILE: dict[str, Hostile] = {
    "dot dot": Hostile(lambda: layer(file(b"../canary/x", b"x")), says="'..'"),
    "dot dot within": Hostile(lambda: layer(file(b"a/../../canary/x", b"x")), says="'..'"),
    "absolute name": Hostile(lambda: layer(file(CANARY + b"/x", b"x")), None, holds=("tmp/garden-canary/x",)),
    "link to outside": Hostile(lambda: layer(symlink(b"l", CANARY), file(b"l/x", b"x")), None),
    "link upwards": Hostile(
        lambda: layer(symlink(b"l", b"../../../canary"), file(b"l/x", b"x")), None, holds=("canary/x",)
    ),
    "link to the real root": Hostile(
        lambda: layer(symlink(b"l", b"/proc/1/root"), file(b"l/x", b"x")), None, holds=("proc/1/root/x",)
    ),
    "file over a link to outside": Hostile(
        lambda: layer(symlink(b"l", CANARY + b"/kept"), file(b"l", b"changed")), None, holds=("l",)
    ),
    "directory over a link to outside": Hostile(
        lambda: layer(symlink(b"l", CANARY), directory(b"l", 0o777, uid=5), file(b"l/kept", b"x")),
        None,
        holds=("l/kept",),
    ),
    "opaque through a link": Hostile(lambda: layer(symlink(b"l", CANARY), opaque(b"l")), None),
    "whiteout through a link": Hostile(lambda: layer(symlink(b"l", CANARY), whiteout(b"l/kept")), None),
    "hard link to outside": Hostile(
        lambda: layer(hard_link(b"h", CANARY + b"/kept")), says="not in this layer"
    ),
    "hard link upwards": Hostile(lambda: layer(hard_link(b"h", b"../canary/kept")), says="'..'"),
    "hard link through a link": Hostile(
        lambda: layer(symlink(b"l", CANARY), hard_link(b"h", b"l/kept"), file(b"h", b"changed")),
        says="not in this layer",
    ),
    "hard link to a directory": Hostile(
        lambda: layer(directory(b"d"), hard_link(b"h", b"d")), says="directory"
    ),
    "hard link to a whiteout": Hostile(
        lambda: layer(whiteout(b"w"), hard_link(b"h", b"w")), says="not in this layer"
    ),
    "hard link to a whiteout's name": Hostile(
        lambda: layer(whiteout(b"w"), hard_link(b"h", b".wh.w")), says="cannot be"
    ),
    "hard link to itself": Hostile(
        lambda: layer(file(b"h", b"x"), hard_link(b"h", b"./h")), None, holds=("h",)
    ),
    "hard link over what it lies in": Hostile(lambda: layer(file(b"a/b", b"x"), hard_link(b"a", b"a/b"))),
    "hard link to what comes later": Hostile(
        lambda: layer(hard_link(b"h", b"f"), file(b"f")), says="not in this layer"
    ),
    "whiteout of .": Hostile(lambda: layer(file(b".wh..")), says="whiteout"),
    "whiteout of ..": Hostile(lambda: layer(file(b"a/.wh...")), says="whiteout"),
    "whiteout of nothing": Hostile(lambda: layer(file(b"a/.wh.")), says="whiteout"),
    "file below a whiteout's name": Hostile(lambda: layer(file(b".wh.a/b")), says="whiteout"),
    "aufs metadata": Hostile(
        lambda: layer(directory(b".wh..wh.plnk"), file(b".wh..wh.plnk/1.2", b"x"), file(b".wh..wh.aufs")),
        None,
        lacks=(".wh..wh.plnk", ".wh..wh.aufs"),
    ),
    "devices": Hostile(
        lambda: layer(header(b"b", b"4"), header(b"c", b"3"), file(b"f")),
        None,
        holds=("f",),
        lacks=("b", "c"),
    ),
    "forged overlay marks": Hostile(
        lambda: layer(
            pax(
                {
                    b"SCHILY.xattr.trusted.overlay.redirect": b"/etc",
                    b"SCHILY.xattr.user.overlay.opaque": b"y",
                    b"SCHILY.xattr.security.selinux": b"x",
                    b"SCHILY.xattr.system.posix_acl_default": b"x",
                }
            ),
            directory(b"d"),
        ),
        None,
        holds=("d",),
    ),
    "a name of 300 bytes": Hostile(
        lambda: layer(long_name(b"n" * 300), file(b"n")), says="File name too long"
    ),
    "a path of 5000 bytes": Hostile(
        lambda: layer(long_name((b"n" * 199 + b"/") * 25), file(b"n")), says="File name too long"
    ),
    "a link target of 5000 bytes": Hostile(
        lambda: layer(long_name(b"t" * 5000, b"K"), symlink(b"l", b"")), says="File name too long"
    ),
    "an empty link": Hostile(lambda: layer(symlink(b"l", b""))),
    "a zero byte in a name": Hostile(lambda: layer(pax({b"path": b"a\0b"}), file(b"a")), says="zero byte"),
    "a zero byte in an attribute": Hostile(
        lambda: layer(pax({b"SCHILY.xattr.user.a\0b": b"c"}), file(b"a")), says="zero byte"
    ),
    "an attribute of 512 KiB": Hostile(
        lambda: layer(pax({b"SCHILY.xattr.user.a": b"c" * (MIB // 2)}), file(b"a"))
    ),
    "no capability": Hostile(lambda: layer(pax({b"SCHILY.xattr.security.capability": b"junk"}), file(b"a"))),
    "the root as a file": Hostile(lambda: layer(symlink(b"./", b"/")), says="root"),
    "10,000 directories deep": Hostile(lambda: _deep(10_000), "image_too_large", "path depth"),
    "deep by links": Hostile(_deep_by_links, "image_too_large", "path depth"),
    "links in a loop": Hostile(_loops, says="symbolic links"),
    "links that double": Hostile(_link_bomb, says="symbolic links"),
    "below a file": Hostile(lambda: layer(file(b"f"), file(b"f/x")), says="no directory"),
    "a pax header of 2 MiB": Hostile(
        lambda: layer(pax({b"comment": bytes(2 * MIB)}), file(b"f")), says="extension"
    ),
    "a global header of 2 MiB": Hostile(
        lambda: layer(pax({b"comment": bytes(2 * MIB)}, b"g"), file(b"f")), says="extension"
    ),
    "1,000 extension headers": Hostile(
        lambda: layer(pax({b"comment": b"x"}) * 1000, file(b"f")), says="extension"
    ),
    "a negative size": Hostile(lambda: layer(header(b"f", size=-512)), says="size"),
    "a negative size in digits": Hostile(
        lambda: layer(header(b"f", size_field=b"-0000001000\0")), says="size"
    ),
    "a size beyond 2^63": Hostile(lambda: layer(header(b"f", size=1 << 64)), says="size"),
    "a size of an exbibyte": Hostile(lambda: layer(header(b"f", size=1 << 60)), "image_too_large", "bytes"),
    "a pax size that is no number": Hostile(lambda: layer(pax({b"size": b"-1"}), file(b"f")), says="size"),
    "an owner that means no change": Hostile(lambda: layer(file(b"f", uid=(1 << 32) - 1)), says="user"),
    "a time without end": Hostile(lambda: layer(pax({b"mtime": b"9" * 20}), file(b"f")), says="mtime"),
    "a time that is none": Hostile(lambda: layer(pax({b"mtime": b"nan"}), file(b"f")), says="mtime"),
    "a damaged header": Hostile(lambda: layer(file(b"f", b"x"))[:1024] + b"\xff" * 512, says="checksum"),
    "no tar at all": Hostile(lambda: b"#!/bin/sh\n" * 200, says="not a tar archive"),
    "nothing at all": Hostile(lambda: b"", says="empty"),
    "an unknown type": Hostile(lambda: layer(header(b"f", b"D", size=0)), says="type"),
    "cut in a header": Hostile(lambda: file(b"f", b"x") + file(b"g")[:100], says="truncated"),
    "cut in a file": Hostile(lambda: file(b"f", b"x" * 3000)[:1500], says="truncated"),
    "sparse beyond the limit": Hostile(_sparse_bomb, "image_too_large", "bytes"),
    "sparse out of order": Hostile(
        lambda: layer(pax({b"GNU.sparse.map": b"512,1,0,1", b"GNU.sparse.size": b"1024"}), file(b"f", b"xy")),
        says="order",
    ),
    "sparse without lines": Hostile(
        lambda: layer(
            pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"1"}),
            file(b"f", b"1" * 4096),
        ),
        says="sparse",
    ),
    "a million segments": Hostile(
        lambda: layer(
            pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"1"}),
            file(b"f", b"1000000\n" + b"1\n1\n" * 1_000_000),
        ),
        says="sparse",
    ),
    "system directories as links": Hostile(
        lambda: layer(*(symlink(name, CANARY) for name in (b"dev", b"proc", b"sys", b"etc"))),
        None,
        holds=("dev", "proc", "sys", "etc"),
    ),
    "system directories as files": Hostile(
        lambda: layer(*(file(name, b"x") for name in (b"dev", b"proc", b"sys", b"etc"))),
        None,
        holds=("dev", "proc", "sys", "etc"),
    ),
    "modules of the unpacker": Hostile(
        lambda: layer(
            *(
                file(b"usr/lib/python3.11/" + name, b"import os; os._exit(7)")
                for name in (b"bz2.py", b"traceback.py", b"warnings.py", b"encodings/idna.py")
            )
        ),
        None,
    ),
}
