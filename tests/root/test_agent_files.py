"""The built-in tar programs: as the user, without anything of the image, and nowhere but the destination."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.agent_client import AgentClient, AgentError
from kit.agent_process import directory_for_all_users, running_agent

from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> RuntimeBundle:
    return build_runtime_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def place() -> Iterator[Path]:
    with directory_for_all_users() as path:
        yield path


@pytest.fixture
def agent(bundle: RuntimeBundle, place: Path) -> Iterator[AgentClient]:
    with running_agent(bundle, place) as (path, _), AgentClient(path) as client:
        yield client


def entry(name: str, content: bytes | None = None, **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    for key, value in attributes.items():
        setattr(member, key, value)
    if content is not None:
        member.size = len(content)
    return member, content or b""


def directory(name: str, **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, **{"type": tarfile.DIRTYPE, "mode": 0o755, **attributes})


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=kind, linkname=target)


def archive(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpack(agent: AgentClient, path: Path | str, data: bytes, **fields: object) -> tuple[int, str]:
    code, _, err = agent.run(
        "in", [], stdin=data, program="tar-in", program_args={"path": os.fsencode(path)}, **fields
    )
    return code, err.decode()


def pack(agent: AgentClient, path: Path | str, **fields: object) -> tuple[int, bytes, str]:
    code, out, err = agent.run(
        "out", [], program="tar-out", program_args={"path": os.fsencode(path)}, **fields
    )
    return code, out, err.decode()


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def test_files_belong_to_the_user_whatever_the_archive_says(agent: AgentClient, place: Path) -> None:
    """F1, F2: the destination is made, owners are ignored, modes are masked, times are kept."""
    data = archive(
        directory("./"),
        directory("d", mode=0o500, mtime=1_000_000),
        entry("d/f", b"content", uid=0, gid=0, mode=0o6777, mtime=1_000_000),
        link("l", "d/f"),
        link("h", "d/f", tarfile.LNKTYPE),
        entry("pipe", type=tarfile.FIFOTYPE),
        entry("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        entry("no/directory/entry", b"x"),
    )
    target = place / "made/here"
    assert unpack(agent, target, data, user="1001:1002") == (0, "")
    assert {path.lstat().st_uid for path in [target.parent, target, *target.rglob("*")]} == {1001}
    status = (target / "d/f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime, status.st_gid) == (0o755, 1_000_000, 1002)
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o500
    assert (target / "d").stat().st_mtime == 1_000_000
    assert (target / "l").readlink() == Path("d/f")
    assert (target / "h").samefile(target / "d/f")
    assert stat.S_ISFIFO((target / "pipe").stat().st_mode)
    assert not (target / "device").exists()
    assert (target / "no/directory/entry").read_bytes() == b"x"


def test_what_exists_is_replaced_but_directories_stay(agent: AgentClient, place: Path) -> None:
    """A second deployment over the first; `./` of an archive must not change the mode of /tmp."""
    target = place / "t"
    target.mkdir()
    target.chmod(0o1777)
    (target / "f").write_text("old")
    (target / "l").symlink_to("/etc/passwd")
    before = Path("/etc/passwd").read_bytes()
    data = archive(directory("./", mode=0o700), entry("f", b"new"), entry("l", b"no longer a link"))
    assert unpack(agent, target, data) == (0, "")
    assert stat.S_IMODE(target.stat().st_mode) == 0o1777
    assert (target / "f").read_text() == "new"
    assert (target / "l").read_text() == "no longer a link"
    assert Path("/etc/passwd").read_bytes() == before


@pytest.mark.parametrize(
    "hostile",
    [
        [entry("../outside", b"x")],
        [entry("a/../../outside", b"x")],
        [link("l", ".."), entry("l/outside", b"x")],
        [link("l", "LINK_ABSOLUTE"), entry("l/outside", b"x")],
        [link("h", "../secret", tarfile.LNKTYPE)],
        [link("l", ".."), link("h", "l/secret", tarfile.LNKTYPE)],
        [link("l", "l"), entry("l/outside", b"x")],
    ],
    ids=["dotdot", "inner dotdot", "link", "absolute link", "hard link", "hard link by link", "loop"],
)
def test_nothing_leads_out_of_the_destination(
    agent: AgentClient, place: Path, hostile: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    """Even as root: an archive may come from anybody."""
    for member, _ in hostile:
        member.linkname = member.linkname.replace("LINK_ABSOLUTE", str(place))
    (place / "secret").write_text("secret")
    target = place / "t"
    code, err = unpack(agent, target, archive(*hostile))
    assert code == 1
    assert err.split(":")[0] in ("broken_archive", "io_error")
    assert not (place / "outside").exists()
    assert (place / "secret").stat().st_nlink == 1


def test_absolute_names_are_taken_relative(agent: AgentClient, place: Path) -> None:
    """As tar(1) does."""
    assert unpack(agent, place / "t", archive(entry("/etc/f", b"x"))) == (0, "")
    assert (place / "t/etc/f").read_bytes() == b"x"


def test_links_inside_the_destination_may_be_followed(agent: AgentClient, place: Path) -> None:
    """An image's bin -> usr/bin must not break `bin/tool`."""
    (place / "t/usr/bin").mkdir(parents=True)
    (place / "t/bin").symlink_to("usr/bin")
    assert unpack(agent, place / "t", archive(entry("bin/tool", b"x"))) == (0, "")
    assert (place / "t/usr/bin/tool").read_bytes() == b"x"


def test_a_directory_in_the_place_of_a_file_is_an_error(agent: AgentClient, place: Path) -> None:
    """A tree is not thrown away for a file."""
    (place / "t/f/sub").mkdir(parents=True)
    code, err = unpack(agent, place / "t", archive(entry("f", b"x")))
    assert code == 1
    assert "f: Is a directory" in err


@pytest.mark.parametrize("keep", [0, 1, 700, 1024, 1536])
def test_a_cut_archive_is_an_error(agent: AgentClient, place: Path, keep: int) -> None:
    """F4: wherever it is cut, also between two blocks."""
    data = archive(entry("f", b"x" * 1000))[:keep]
    code, err = unpack(agent, place / "t", data)
    assert (code, err.split(":")[0]) == (1, "broken_archive")


def test_noise_is_an_error(agent: AgentClient, place: Path) -> None:
    """Not a crash with a traceback."""
    code, err = unpack(agent, place / "t", b"\x1f\x8b" + os.urandom(5000))
    assert (code, err.count("\n"), err.split(":")[0]) == (1, 1, "broken_archive")


def test_the_senders_padding_is_read(agent: AgentClient, place: Path) -> None:
    """tar(1) pads to 10 KiB, some senders more; a broken pipe would look like a failure to them."""
    assert unpack(agent, place / "t", archive(entry("f", b"x")) + bytes(1 << 20)) == (0, "")


def test_a_destination_the_user_may_not_write_is_denied(agent: AgentClient, place: Path) -> None:
    """F4: the words clients look for."""
    (place / "t").mkdir()
    code, err = unpack(agent, place / "t", archive(entry("f", b"x")), user="1001:1002")
    assert (code, err) == (1, "permission_denied: f: Permission denied\n")


def test_a_full_file_system_is_told(bundle: RuntimeBundle, place: Path) -> None:
    """The caller can act on it, unlike on an io_error."""
    small = ["sh", "-c", 'mount -t tmpfs -o size=64k none /mnt && exec "$@"', "sh"]
    with running_agent(bundle, place, *small) as (path, _), AgentClient(path) as agent:
        code, err = unpack(agent, "/mnt/t", archive(entry("f", bytes(1 << 20))))
        assert (code, err) == (1, "no_space: f: No space left on device\n")


def test_a_destination_that_finds_no_room_is_told(bundle: RuntimeBundle, place: Path) -> None:
    """The path is not to blame; the caller may try again when there is room."""
    small = ["sh", "-c", 'mount -t tmpfs -o nr_inodes=2 none /mnt && exec "$@"', "sh"]
    with running_agent(bundle, place, *small) as (path, _), AgentClient(path) as agent:
        with pytest.raises(AgentError) as caught:
            unpack(agent, "/mnt/deep/er", b"")
        assert caught.value.code == "no_space"


def test_a_destination_that_cannot_be_made_is_refused_at_the_start(agent: AgentClient) -> None:
    """Nothing of the stream was read then."""
    with pytest.raises(AgentError) as caught:
        unpack(agent, "/proc/1/none", b"")
    assert caught.value.code == "bad_directory"


def test_relative_paths_begin_at_the_users_home(agent: AgentClient) -> None:
    """F2, F5; daemon's home is /usr/sbin, where it may not write."""
    code, err = unpack(agent, "./", archive(entry("garden-test", b"x")), user="daemon")
    assert (code, err) == (1, "permission_denied: garden-test: Permission denied\n")
    code, _, err = pack(agent, "garden-none", user="daemon")
    assert (code, err) == (1, "no_such_path: garden-none: No such file or directory\n")


def test_an_unknown_user_is_refused_before_anything_is_read(agent: AgentClient, place: Path) -> None:
    """F3."""
    with pytest.raises(AgentError) as caught:
        unpack(agent, place / "t", b"", user="hans")
    assert caught.value.code == "user_not_found"
    assert not (place / "t").exists()


def test_the_slash_decides_the_names_in_the_archive(agent: AgentClient, place: Path) -> None:
    """F5."""
    (place / "src/sub").mkdir(parents=True)
    (place / "src/sub/file").write_text("x")
    assert names(pack(agent, place / "src")[1]) == ["src", "src/sub", "src/sub/file"]
    assert names(pack(agent, f"{place}/src/")[1]) == [".", "./sub", "./sub/file"]
    assert names(pack(agent, place / "src/sub/file")[1]) == ["file"]


def test_a_tree_comes_back_as_it_was(agent: AgentClient, place: Path) -> None:
    """Out and in again: content, links, modes, times, extended attributes, odd names."""
    source = place / "src"
    source.mkdir()
    (source / "plain").write_bytes(os.urandom(3_000_000))
    (source / "empty").write_bytes(b"")
    (source / ("n" * 200)).write_text("long name")
    Path(os.fsdecode(os.fsencode(source) + b"/not-utf8-\xff")).write_text("bytes")
    (source / "deep/er").mkdir(parents=True)
    (source / "deep").chmod(0o700)
    (source / "link").symlink_to("plain")
    os.link(source / "plain", source / "second")
    os.mkfifo(source / "pipe")
    os.setxattr(source / "plain", "user.note", b"\x00\xffbinary\n")
    os.utime(source / "plain", (1, 1_000_000))
    code, data, err = pack(agent, f"{source}/")
    assert (code, err) == (0, "")
    target = place / "copy"
    assert unpack(agent, target, data) == (0, "")
    assert sorted(os.listdir(os.fsencode(target))) == sorted(os.listdir(os.fsencode(source)))
    assert (target / "plain").read_bytes() == (source / "plain").read_bytes()
    assert (target / "plain").stat().st_mtime == 1_000_000
    assert os.getxattr(target / "plain", "user.note") == b"\x00\xffbinary\n"
    assert (target / "second").samefile(target / "plain")
    assert stat.S_IMODE((target / "deep").stat().st_mode) == 0o700
    assert (target / "link").readlink() == Path("plain")
    assert stat.S_ISFIFO((target / "pipe").stat().st_mode)


def test_what_the_user_may_not_read_is_an_error(agent: AgentClient, place: Path) -> None:
    """F5: limited by file permissions, and an archive with a hole must not pass for a whole one."""
    (place / "src").mkdir()
    (place / "src/secret").write_text("x")
    (place / "src/secret").chmod(0o600)
    code, _, err = pack(agent, place / "src", user="1001:1002")
    assert (code, err) == (1, "permission_denied: src/secret: Permission denied\n")
    assert pack(agent, place / "src")[0] == 0


def test_file_capabilities_survive_for_root(agent: AgentClient, place: Path) -> None:
    """F1: ping without setuid."""
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    (place / "src").mkdir()
    (place / "src/tool").write_text("x")
    os.setxattr(place / "src/tool", "security.capability", value)
    data = pack(agent, f"{place}/src/")[1]
    assert unpack(agent, place / "t", data) == (0, "")
    assert os.getxattr(place / "t/tool", "security.capability") == value
