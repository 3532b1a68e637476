"""Layers unpacked by the real process, harmless and hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit import hostile_layers as build
from kit.hostile_layers import CANARY, HOSTILE, MIB, Hostile, layer

pytestmark = pytest.mark.root

BOMB_BYTES = 256 * MIB
MEMORY_MAX_BYTES = BOMB_BYTES  # address space of each process, with its interpreter and the stacks of threads
WHITEOUT = (stat.S_IFCHR, 0)


@contextmanager
def started(fd: int, request: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The process with its request; what it says on stderr fails the test."""
    with tempfile.TemporaryFile() as stderr:
        limit = ["prlimit", f"--as={MEMORY_MAX_BYTES}"]
        command = [*limit, sys.executable, "-m", "garden_py.backend.images.unpack"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, pass_fds=[fd]) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            yield process
        stderr.seek(0)
        assert stderr.read() == b""


@contextmanager
def tmpfs(directory: Path, size: str) -> Iterator[None]:
    """A file system of its own: small, or faster than the disk."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True, timeout=20)


@dataclass
class Place:
    """A target with a directory beside it that no layer may reach."""

    root: Path

    def __post_init__(self) -> None:
        self.target.mkdir()
        for canary in self.canaries:
            shutil.rmtree(canary, ignore_errors=True)  # of a run that was killed
            canary.mkdir()
            (canary / "kept").write_bytes(b"kept")

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def far_canary(self) -> Path:
        return Path(os.fsdecode(CANARY))

    @property
    def canaries(self) -> tuple[Path, Path]:
        """One beside the target, and one that absolute names lead to."""
        return self.root / "canary", self.far_canary

    def state(self) -> list[Any]:
        """Everything outside the target that a layer could change."""
        found = [path for canary in self.canaries for path in (canary, *sorted(canary.rglob("*")))]
        status = [(path, path.lstat(), os.listxattr(path)) for path in found]
        return [(str(p), s.st_mode, s.st_uid, s.st_nlink, s.st_mtime_ns, x) for p, s, x in status] + [
            [(canary / "kept").read_bytes() for canary in self.canaries],
            sorted(os.listdir(self.root)),
        ]

    def unpack(self, data: bytes, **request: Any) -> dict[str, Any]:
        """The last message of the process: done or error."""
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            return self.unpack_fd(file.fileno(), **({"size": len(data)} | request))

    def unpack_fd(self, fd: int, **request: Any) -> dict[str, Any]:
        for each in self.target.iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        asked = {
            "target": str(self.target), "source_fd": fd, "size": None, "media_type": "", "digest": None,
            "diff_id": None, "max_bytes": 256 * MIB, "max_entries": 100_000,
        } | request  # fmt: skip
        with started(fd, asked) as process:
            assert process.stdout is not None
            out = process.stdout.read()
        *progress, last = [json.loads(line) for line in out.splitlines()]
        assert all(list(message) == ["progress"] for message in progress)
        assert process.returncode == (0 if "done" in last else 1)
        return last

    def done(self, *entries: bytes, **request: Any) -> dict[str, Any]:
        last = self.unpack(layer(*entries), **request)
        assert "done" in last, last
        return last["done"]

    def error(self, data: bytes, **request: Any) -> dict[str, Any]:
        last = self.unpack(data, **request)
        assert "error" in last, last
        return last["error"]

    def status(self, name: str) -> os.stat_result:
        return (self.target / name).lstat()

    def is_whiteout(self, name: str) -> bool:
        status = self.status(name)
        return (stat.S_IFMT(status.st_mode), status.st_rdev) == WHITEOUT

    def is_opaque(self, name: str) -> bool:
        return "trusted.overlay.opaque" in os.listxattr(self.target / name, follow_symlinks=False)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A target, removed at once: some trees are large."""
    (tmp_path / "place").mkdir()
    made = Place(tmp_path / "place")
    before = made.state()
    yield made
    after = made.state()
    shutil.rmtree(made.root)
    shutil.rmtree(made.far_canary)
    assert after == before


# --- what is hostile


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layer(place: Place, name: str) -> None:
    """It gets a typed error that says why, or is harmless; what lies outside the target stays as it was."""
    case: Hostile = HOSTILE[name]
    last = place.unpack(case.build())
    if case.code is None:
        assert "done" in last, last
    else:
        assert last["error"]["code"] == case.code, last
        assert case.says in last["error"]["message"]
    for path in case.holds:
        assert os.path.lexists(place.target / path), path
    for path in case.lacks:
        assert not os.path.lexists(place.target / path), path
    for directory, _, files in os.walk(place.target):
        for each in (directory, *(f"{directory}/{file}" for file in files)):
            found = os.listxattr(each, follow_symlinks=False)
            assert set(found) <= {"trusted.overlay.opaque"}, (each, found)


@pytest.mark.parametrize("compress", ["gzip", "zstd"])
def test_a_bomb_meets_its_limit_and_not_the_memory(place: Place, compress: str) -> None:
    """A thousand times its size in zeros, once as a file and once behind the archive's end."""
    head = build.header(b"bomb", size=BOMB_BYTES)
    bomb = build.zeros_compressed(compress, BOMB_BYTES, head)
    assert len(bomb) < BOMB_BYTES // 900
    error = place.error(bomb, max_bytes=16 * MIB, max_entries=10)
    assert (error["code"], error["facts"]) == ("image_too_large", {"limit": "bytes", "value": 16 * MIB})
    behind = build.zeros_compressed(compress, BOMB_BYTES, layer(build.file(b"f")))
    assert place.error(behind, max_bytes=16 * MIB, max_entries=10)["code"] == "image_too_large"
    assert "done" in place.unpack(bomb, max_bytes=2 * BOMB_BYTES)


def test_too_many_entries_meet_their_limit(place: Place) -> None:
    """One more than allowed is one too many, implied directories included."""
    entries = [build.file(b"f%d" % number) for number in range(100)]
    assert place.done(*entries, max_entries=100)["entries"] == 100
    error = place.error(layer(*entries, build.file(b"g")), max_entries=100)
    assert (error["code"], error["facts"]) == ("image_too_large", {"limit": "entries", "value": 100})
    many = b"".join(entries) * 1000
    assert place.error(many, max_entries=1000)["code"] == "image_too_large"
    assert place.error(layer(build.file(b"d/" * 40 + b"f")), max_entries=40)["code"] == ("image_too_large")


def test_fifty_thousand_entries(place: Place) -> None:
    """Twice as many as there are files: each is replaced once. Memory holds directories, not entries."""
    entries = [build.file(b"d%d/f%d" % (number // 100, number), b"x") for number in range(25_000)]
    with tmpfs(place.target, "512m"):
        assert place.done(*entries, *entries)["entries"] == 50_000 + 250
        assert sum(len(files) for _, _, files in os.walk(place.target)) == 25_000


@pytest.mark.parametrize("compress", [build.gzip_members, build.zstd_frames, lambda data: data])
def test_digests_are_told_and_checked(place: Place, compress: Any) -> None:
    """Of the compressed bytes and of the tar, each for itself; bytes behind the size are not read."""
    plain = layer(build.file(b"f", random.Random(1).randbytes(300_000)))
    data = compress(plain)
    digest, diff_id = (f"sha256:{hashlib.sha256(each).hexdigest()}" for each in (data, plain))
    done = place.unpack(data + b"behind", size=len(data), digest=digest, diff_id=diff_id)["done"]
    assert (done["digest"], done["diff_id"]) == (digest, diff_id)
    assert (place.target / "f").stat().st_size == 300_000
    for wrong in ({"digest": diff_id.replace("a", "b")}, {"diff_id": digest.replace("a", "b")}):
        error = place.error(data, **wrong)
        assert error["code"] == "image_invalid"
        assert next(iter(wrong)) in error["message"]


@pytest.mark.parametrize("compress", [build.gzip_members, build.zstd_frames, lambda data: data])
def test_a_truncated_layer_is_told_from_a_whole_one(place: Place, compress: Any) -> None:
    """With or without a known size, wherever the cut is."""
    data = compress(layer(build.file(b"f", random.Random(1).randbytes(100_000))))
    for cut in (3, 100, len(data) // 2, len(data) - 1500):
        assert place.error(data[:cut], size=len(data))["code"] == "image_invalid"
        assert place.error(data[:cut], size=None)["code"] == "image_invalid"
    assert place.error(data, size=len(data) + 1)["facts"] == {"size": len(data) + 1, "received": len(data)}


@pytest.mark.parametrize("compress", [build.gzip_members, build.zstd_frames])
def test_damaged_compression(place: Place, compress: Any) -> None:
    """A bit in the middle, and something behind the end."""
    data = bytearray(compress(layer(build.file(b"f", b"text " * 20_000))))
    assert "done" in place.unpack(bytes(data))
    assert place.error(bytes(data) + b"something else")["code"] == "image_invalid"
    data[len(data) // 2] ^= 0x55
    assert place.error(bytes(data))["code"] == "image_invalid"


def test_gzip_may_be_padded_with_zeros(place: Place) -> None:
    """As gzip(1) has it."""
    assert "done" in place.unpack(build.gzip_members(layer(build.file(b"f"))) + bytes(700))


def test_a_pipe_that_somebody_holds_open_is_read_to_its_size(place: Place) -> None:
    """There is no end of file to wait for."""
    data = layer(build.file(b"f", b"x"))
    receive, send = os.pipe()
    try:
        os.write(send, data)
        assert "done" in place.unpack_fd(receive, size=len(data))
    finally:
        os.close(receive)
        os.close(send)


def test_a_full_file_system_is_told(place: Place) -> None:
    """The caller can make room; the layer is not to blame."""
    with tmpfs(place.target, "4m"):
        error = place.error(layer(build.file(b"f", bytes(8 * MIB))))
    assert error["code"] == "no_space"


def test_the_process_keeps_next_to_nothing(place: Place) -> None:
    """Seen from outside while it waits for the rest of a layer: namespaces, root, capabilities, filter."""
    receive, send = os.pipe()
    asked = {
        "target": str(place.target), "source_fd": receive, "size": None, "media_type": "", "digest": None,
        "diff_id": None, "max_bytes": MIB, "max_entries": 10,
    }  # fmt: skip
    # The writing end is closed first, whatever happens: the process waits for it.
    with (
        os.fdopen(receive, "rb"),
        started(receive, asked) as process,
        os.fdopen(send, "wb", buffering=0) as pipe,
    ):
        assert process.stdout is not None
        data = layer(build.file(b"f", b"x"))
        pipe.write(data[:300])  # no header yet: nothing is opened meanwhile
        assert b"progress" in process.stdout.readline()
        proc = Path(f"/proc/{process.pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
        mounts = (proc / "mounts").read_text().splitlines()
        own = {name: os.readlink(proc / "ns" / name) for name in ("mnt", "net", "ipc")}
        files = [os.readlink(each) for each in (proc / "fd").iterdir()]
        pipe.write(data[300:])
        pipe.close()
        assert b"done" in process.stdout.read()
    assert len(mounts) == 1
    assert all(os.readlink(f"/proc/self/ns/{name}") != found for name, found in own.items())
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN, SETFCAP: capabilities(7).
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0x8020_001B}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert len(files) == 6, files  # standard ones, the layer, and the two ends that stop the thread


# --- what is wanted


def test_owners_modes_and_times_are_kept(place: Place) -> None:
    """Numbers as the archive has them, setuid after the owner, a directory's time after its content."""
    place.done(
        build.directory(b"./", 0o1751, uid=3, mtime=11),
        build.directory(b"d", 0o2770, gid=50, mtime=12),
        build.file(b"d/suid", b"x", mode=0o6755, uid=100_000, gid=4_000_000_000, mtime=13),
        build.file(b"d/inside", b"x", mode=0o600),
        build.directory(b"d/sub", 0o700),
        build.header(b"d/fifo", b"6", mode=0o640, uid=7),
        build.symlink(b"d/link", b"/any/where", uid=8, mtime=14),
        build.file(b"implied/f"),
        build.file(b"d/implied/f"),
        build.pax({b"mtime": b"1.5", b"uid": b"70000"}) + build.file(b"fine"),
        build.pax({b"mtime": b"-1.25"}) + build.file(b"early"),
    )

    def facts(name: str) -> tuple[int, int, int, float]:
        status = place.status(name)
        return (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime)

    assert facts("") == (0o1751, 3, 0, 11)
    assert facts("d") == (0o2770, 0, 50, 12)
    assert facts("d/suid") == (0o6755, 100_000, 4_000_000_000, 13)
    assert facts("d/inside")[:3] == (0o600, 0, 0)
    assert facts("d/sub")[:3] == (0o700, 0, 0)
    assert facts("d/fifo")[:3] == (0o640, 7, 0)
    assert facts("d/link")[1:] == (8, 0, 14)
    assert os.readlink(place.target / "d/link") == "/any/where"
    assert facts("implied")[:3] == facts("d/implied")[:3] == (0o755, 0, 0)
    assert facts("fine")[1:] == (70_000, 0, 1.5)
    assert facts("early")[3] == -1.25


def test_whiteouts(place: Place) -> None:
    """They hide lower layers, never what the same layer has."""
    done = place.done(
        build.whiteout(b"gone"), build.whiteout(b"deep/gone"),
        build.opaque(b"opaque"), build.file(b"opaque/f"),
        build.file(b"stays", b"x"), build.whiteout(b"stays"),
        build.whiteout(b"back"), build.file(b"back", b"x"),
        build.directory(b"stays.d"), build.file(b"stays.d/f"), build.whiteout(b"stays.d"),
        build.whiteout(b"back.d"), build.directory(b"back.d"),
        build.whiteout(b"implied.d"), build.file(b"implied.d/f"),
    )  # fmt: skip
    assert place.is_whiteout("gone")
    assert place.is_whiteout("deep/gone")
    assert (place.target / "stays").read_bytes() == (place.target / "back").read_bytes() == b"x"
    assert (place.target / "stays.d/f").exists()
    assert (place.target / "implied.d/f").exists()
    # A directory whose name is hidden as well is seen without what lower layers have in it.
    assert all(place.is_opaque(name) for name in ("opaque", "stays.d", "back.d", "implied.d"))
    assert not place.is_opaque("deep")
    assert not done["opaque_root"]


def test_overlayfs_understands_the_marks(place: Place, tmp_path: Path) -> None:
    """The kernel is the one to be understood by, so it is asked; below lies a layer that has every name."""
    lower, upper, work, seen = (tmp_path / name for name in ("lower", "upper", "work", "seen"))
    for each in (lower / "gone", lower / "opaque", lower / "back.d", lower / "plain"):
        each.mkdir(parents=True)
        (each / "below").touch()
    for each in (upper, work, seen):
        each.mkdir()
    place.done(
        build.whiteout(b"gone"), build.opaque(b"opaque"), build.file(b"opaque/f"), build.whiteout(b"back.d"),
        build.file(b"back.d/f"), build.file(b"plain/f"),
    )  # fmt: skip
    options = f"lowerdir={place.target}:{lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", seen], check=True, timeout=20)
    try:
        found = {str(path.relative_to(seen)) for path in seen.rglob("*")}
    finally:
        subprocess.run(["umount", seen], check=True, timeout=20)
    assert found == {"opaque", "opaque/f", "back.d", "back.d/f", "plain", "plain/f", "plain/below"}


def test_a_layer_may_hide_all_lower_ones(place: Place) -> None:
    """The coordinator has to know: overlayfs does not look at a root's mark."""
    assert place.done(build.file(b".wh..wh..opq"), build.file(b"f"))["opaque_root"]


def test_later_entries_replace_earlier_ones(place: Place) -> None:
    """File, directory, file, link, directory; and what was seen through a link that has gone."""
    place.done(
        build.file(b"a", b"1"), build.directory(b"a"), build.file(b"a/b/c", b"2"), build.file(b"a", b"3"),
        build.symlink(b"l", b"one"), build.file(b"l/x", b"1"), build.symlink(b"l", b"two"), build.file(b"l/x", b"2"),
        build.directory(b"e"), build.symlink(b"e", b"a"), build.directory(b"e"), build.file(b"e/f"),
        build.file(b"h", b"old"), build.hard_link(b"i", b"h"), build.file(b"h", b"new"),
    )  # fmt: skip
    read = lambda name: (place.target / name).read_bytes()  # noqa: E731
    assert (read("a"), read("one/x"), read("two/x"), read("e/f")) == (b"3", b"1", b"2", b"")
    assert (read("h"), read("i")) == (b"new", b"old")


def test_disk_use_is_counted(place: Place) -> None:
    """The sum of what stat says, hard links once, replaced files not, holes not."""
    data = random.Random(2).randbytes(100_000)
    done = place.done(
        build.file(b"f", data), build.hard_link(b"g", b"f"), build.file(b"again", data), build.file(b"again", b"x"),
        build.symlink(b"l", b"t" * 90), build.directory(b"d"),
        build.pax({b"GNU.sparse.map": b"1048576,1000", b"GNU.sparse.size": b"2097152"}),
        build.file(b"hole", data[:1000]),
    )  # fmt: skip
    seen = {
        (s.st_dev, s.st_ino): s.st_blocks * 512
        for s in map(Path.lstat, [place.target, *place.target.rglob("*")])
    }
    assert done["bytes"] == sum(seen.values())
    assert done["logical_bytes"] == 2 * len(data) + 1 + 2097152


def test_names_of_any_bytes(place: Place) -> None:
    """Bytes that are no UTF-8, in the header, in pax and in GNU's form; 255 bytes are a name."""
    place.done(
        build.file(b"\xff\xfe\n", b"1"),
        build.pax({b"path": b"p\xff/" + b"n" * 255}) + build.file(b"short", b"2"),
        build.long_name(b"g\xff/" + b"m" * 255) + build.file(b"short", b"3"),
        build.long_name(b"\xfe" * 200, b"K") + build.symlink(b"l", b"short"),
    )
    root = os.fsencode(place.target)
    assert (Path(os.fsdecode(root + b"/\xff\xfe\n"))).read_bytes() == b"1"
    assert set(os.listdir(root + b"/p\xff")) == {b"n" * 255}
    assert set(os.listdir(root + b"/g\xff")) == {b"m" * 255}
    assert os.readlink(root + b"/l") == b"\xfe" * 200


def test_attributes(place: Place) -> None:
    """The user's and file capabilities, which the owner's change must not take away."""
    capability = bytes.fromhex("0100000200200000000000000000000000000000")  # net_raw, linux/capability.h
    attributes = {b"SCHILY.xattr.security.capability": capability, b"SCHILY.xattr.user.a=b\n": b"\0\xff"}
    place.done(
        build.pax(attributes) + build.file(b"f", b"x", uid=5),
        build.pax({b"SCHILY.xattr.user.d": b"1"}) + build.directory(b"d"),
    )
    assert os.getxattr(place.target / "f", "security.capability") == capability
    assert os.getxattr(place.target / "d", "user.d") == b"1"


SPARSE_PAX = "--format=pax --sparse-version="


@pytest.mark.parametrize(
    "form", ["--format=gnu", *(SPARSE_PAX + version for version in ("0.0", "0.1", "1.0"))]
)
def test_trees_that_tar_packs(place: Place, tmp_path: Path, form: str) -> None:
    """GNU tar's own forms of long names and sparse files come out as they went in."""
    source = tmp_path / "source"
    (source / ("deep" * 30) / ("er" * 60)).mkdir(parents=True)
    with (source / "sparse").open("wb") as file:
        for number in range(40):
            file.seek(number * 65536 + 8192)
            file.write(b"%d" % number * 3000)
        file.truncate(4 << 20)
    (source / ("deep" * 30) / ("er" * 60) / "f").write_bytes(b"x" * 5000)
    (source / "link").symlink_to("t" * 150)
    os.link(source / "sparse", source / "second")
    packed = tmp_path / "packed"
    command = ["tar", *form.split(), "--sparse", "-C", source, "-cf", packed, "."]
    subprocess.run(command, check=True, timeout=60)
    assert "done" in place.unpack(packed.read_bytes())
    subprocess.run(["diff", "-r", "--no-dereference", source, place.target], check=True, timeout=60)
    assert place.status("sparse").st_ino == place.status("second").st_ino
    assert place.status("sparse").st_blocks < 4 * MIB // 512


def test_archives_end_as_for_tar(place: Place) -> None:
    """One block of zeros is an end, so is none, and what comes behind does not matter."""
    for data in (
        build.file(b"f"),
        build.file(b"f") + bytes(512) + build.file(b"g"),
        bytes(1024),
        layer(b"") + b"junk",
    ):
        assert "done" in place.unpack(data)
    assert not (place.target / "g").exists()


def test_what_python_packs(place: Place, tmp_path: Path) -> None:
    """The standard library's three formats."""
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "packed", "w:gz", format=form) as archive:
            archive.add(Path(__file__).parent, "tests")
        assert "done" in place.unpack((tmp_path / "packed").read_bytes())
        assert (place.target / "tests" / Path(__file__).name).read_bytes() == Path(__file__).read_bytes()
