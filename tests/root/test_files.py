"""Copying in and out (Garden's statements F1 to F8), through gRPC, in containers without a tar of their own."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kit.garden import code_of, sh, text_of, wait_until

from garden_py.client import (
    Container,
    ContainerSpec,
    GardenClient,
    GardenError,
    InvalidArgument,
    Limits,
    NotFound,
    PermissionDenied,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def home(garden: GardenClient) -> Container:
    """A container with a user and a home."""
    container = garden.create(ContainerSpec(handle="home"))
    text_of(
        container,
        "echo 'alice:x:1001:1010::/home/alice:/bin/sh' >>/etc/passwd;"
        "mkdir -p /home/alice; chown 1001:1010 /home/alice",
    )
    return container


def tar_of(*members: tuple[str, bytes | None], owner: int = 4711) -> bytes:
    """A tar of files (and directories, whose content is None) that claim to belong to somebody else."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.uid = member.gid = owner
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return packed.getvalue()


def names_in(chunks: Iterator[bytes]) -> list[str]:
    """Member names as they are in a tar stream, with a slash behind directories."""
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        return [member.name + "/" * member.isdir() for member in archive]


def test_files_belong_to_the_user_whatever_the_archive_says(home: Container) -> None:
    """F1: the default user is root."""
    home.stream_in([tar_of(("f", b"x"), ("d", None), ("d/g", b"y"))], path="/tmp/in", user="alice")
    assert text_of(home, "stat -c '%u %g' /tmp/in /tmp/in/f /tmp/in/d/g") == "1001 1010\n" * 3
    home.stream_in([tar_of(("r", b"x"))], path="/tmp/root-in")
    assert text_of(home, "stat -c '%u %g' /tmp/root-in/r") == "0 0\n"


def test_destination_is_made_and_relative_paths_are_the_homes(home: Container) -> None:
    """F2: with parents; "." is the home itself; "/" works."""
    home.stream_in([tar_of(("f", b"1"))], path="new/deep", user="alice")
    assert text_of(home, "stat -c '%U %a' /home/alice/new /home/alice/new/deep") == "alice 755\nalice 755\n"
    home.stream_in([tar_of(("f", b"2"))], path=".", user="alice")
    assert text_of(home, "cat /home/alice/new/deep/f /home/alice/f") == "12"
    home.stream_in([tar_of(("at-root", b"3"))], path="/")
    assert text_of(home, "cat /at-root") == "3"


def test_trailing_slash_packs_the_contents(home: Container) -> None:
    """F5: with it "./…", without it "<base>/…"; relative to the user's home."""
    text_of(home, "mkdir -p /data/sub; echo a >/data/file; echo b >/data/sub/other")
    assert sorted(names_in(home.stream_out("/data"))) == ["data/", "data/file", "data/sub/", "data/sub/other"]
    assert sorted(names_in(home.stream_out("/data/"))) == ["./", "./file", "./sub/", "./sub/other"]
    assert names_in(home.stream_out("/data/file")) == ["file"]
    text_of(home, "echo c >/home/alice/mine; chown alice /home/alice/mine")
    assert names_in(home.stream_out("mine", user="alice")) == ["mine"]


def test_what_goes_in_comes_out(home: Container, tmp_path: Path) -> None:
    """Contents, modes, links, empty files and long names; with the client's copy both ways."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "plain").write_bytes(bytes(range(256)) * 5000)
    (source / "script").write_text("#!/bin/sh\n")
    (source / "script").chmod(0o755)
    (source / "empty").touch()
    (source / "link").symlink_to("plain")
    (source / "sub" / ("n" * 200)).write_text("long")
    home.copy_in(source, "/copies")
    home.copy_out("/copies/source", tmp_path / "back")
    back = tmp_path / "back" / "source"
    assert (back / "plain").read_bytes() == (source / "plain").read_bytes()
    assert (back / "script").stat().st_mode & 0o777 == 0o755
    assert (back / "empty").read_bytes() == b""
    assert (back / "link").readlink() == Path("plain")
    assert (back / "sub" / ("n" * 200)).read_text() == "long"


@pytest.mark.parametrize(
    ("path", "user", "code", "kind"),
    [
        ("/tmp/x", "stranger", "USER_NOT_FOUND", NotFound),
        ("/root/forbidden", "alice", "COPY_FAILED", PermissionDenied),
        ("/etc/passwd/below-a-file", "", "INVALID_REQUEST", InvalidArgument),
        ("", "", "INVALID_REQUEST", InvalidArgument),
        ("/tmp/\0", "", "INVALID_REQUEST", InvalidArgument),
    ],
)
def test_copy_in_fails_with_a_reason(
    home: Container, path: str, user: str, code: str, kind: type[GardenError]
) -> None:
    """F3, F4: unknown users, missing rights, impossible places."""
    with pytest.raises(kind) as refused:
        home.stream_in([tar_of(("f", b"x"))], path=path, user=user)
    assert refused.value.code == code
    assert {field.field for field in refused.value.fields} <= {"path"}


@pytest.mark.parametrize("content", [b"this is no tar" * 1000, tar_of(("f", b"x" * 100_000))[:50_000]])
def test_broken_archive_is_refused(home: Container, content: bytes) -> None:
    """F4: nonsense, and what ends in the middle of a member."""
    with pytest.raises(InvalidArgument) as refused:
        home.stream_in([content], path="/tmp/broken")
    assert refused.value.code == "COPY_FAILED"


@pytest.mark.parametrize(
    ("path", "user", "kind"),
    [
        ("/no/such/file", "", NotFound),
        ("/etc/passwd/", "", GardenError),
        ("/root", "alice", PermissionDenied),
        ("/etc", "stranger", NotFound),
    ],
)
def test_copy_out_fails_with_a_reason(home: Container, path: str, user: str, kind: type[GardenError]) -> None:
    """F6: an error instead of an empty archive, and nothing is created."""
    text_of(home, "chmod 700 /root; touch /root/secret")
    with pytest.raises(kind):
        list(home.stream_out(path, user=user))
    assert code_of(home, "test ! -e /no") == 0


def test_archive_cannot_leave_its_destination(home: Container) -> None:
    """Names with .. or an absolute path, and links that lead out, write nowhere else in the container."""
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w") as archive:
        link = tarfile.TarInfo("way-out")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
        through = tarfile.TarInfo("way-out/through-link")
        through.size = 1
        archive.addfile(through, io.BytesIO(b"x"))
    for content in (tar_of(("../outside", b"x")), hostile.getvalue(), tar_of(("/tmp/absolute-path", b"x"))):
        with suppress(GardenError):  # refused, or unpacked below the destination: both are fine
            home.stream_in([content], path="/confined/deep")
    assert code_of(home, "test ! -e /confined/outside && test ! -e /etc/through-link") == 0
    assert code_of(home, "test ! -e /tmp/absolute-path") == 0


def test_copy_works_where_processes_may_not_run(garden: GardenClient) -> None:
    """F7: in a stopped and in a privileged container, at a task limit that is reached, without tar in the image."""
    with garden.create(ContainerSpec(privileged=True)) as box:
        box.stop()
        box.write_file("/tmp/f", b"content")
        assert box.read_file("/tmp/f") == b"content"
        assert box.info().state.name == "STOPPED"


def test_copy_counts_against_the_containers_memory(garden: GardenClient) -> None:
    """A large file goes through a small container: it is streamed, not gathered."""
    data = bytes(1 << 20) * 48
    with garden.create(ContainerSpec(limits=Limits(memory_bytes=32 << 20))) as box:
        box.write_file("/big", data)
        assert text_of(box, "stat -c %s /big") == f"{len(data)}\n"
        assert box.read_file("/big") == data
        assert box.metrics().oom_kills == 0


def test_leaving_early_leaves_nothing_running(box: Container) -> None:
    """A client that breaks off a copy leaves no helper behind."""
    box.run(sh("dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null")).output()
    chunks = box.stream_out("/big")
    assert next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    wait_until(lambda: box.metrics().pids == 1, "the helper's end")
