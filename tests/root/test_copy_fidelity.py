"""What a copy keeps on real containers: attributes, holes, links, names; and what a process cannot make of it."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import code_of, text_of
from kit.server import ServerProcess

from garden_py.client import Container, GardenError, PermissionDenied, ResourceExhausted

pytestmark = pytest.mark.root

FAR = 256 << 20  # beyond what would be stored by mistake and not noticed
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # net_raw, linux/capability.h


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Everything a copy could lose."""
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    with (source / "holes").open("wb") as file:
        for at in (0, 5 << 20, FAR):
            file.seek(at)
            file.write(b"data at %d" % at)
        file.truncate(FAR + (8 << 20))
    (source / "one").write_bytes(b"linked")
    os.link(source / "one", source / "sub" / "two")
    os.setxattr(source / "one", "user.note", b"\0\xff\n")
    os.setxattr(source / "sub", "user.dir", b"1")
    (source / "tool").write_bytes(b"#!/bin/true\n")
    os.setxattr(source / "tool", "security.capability", CAPABILITY)
    with open(os.fsencode(source) + b"/odd\xff\xfe\nname", "wb") as file:
        file.write(b"odd")
    return source


def assert_same(copy: Path, tree: Path) -> None:
    """Names, contents, links, holes and the users' attributes."""
    subprocess.run(["diff", "-r", "--no-dereference", tree, copy], check=True, timeout=120)
    assert (copy / "one").stat().st_ino == (copy / "sub" / "two").stat().st_ino
    assert os.getxattr(copy / "one", "user.note") == b"\0\xff\n"
    assert os.getxattr(copy / "sub", "user.dir") == b"1"
    assert (copy / "holes").stat().st_blocks * 512 < 1 << 20
    assert b"odd\xff\xfe\nname" in os.listdir(os.fsencode(copy))


def test_a_tree_comes_back_with_all_that_it_had(box: Container, tree: Path, tmp_path: Path) -> None:
    """In and out again. Of its holes nothing is sent or stored."""
    box.copy_in(tree, "/copies")
    inside = text_of(
        box, "cd /copies/tree; stat -c '%s %b' holes; stat -c %h one; [ one -ef sub/two ] && echo linked"
    )
    size, blocks, links, linked = inside.split()
    assert (int(size), links, linked) == (FAR + (8 << 20), "2", "linked")
    assert int(blocks) < 2048
    box.copy_out("/copies/tree", tmp_path / "back")
    back = tmp_path / "back" / "tree"
    assert_same(back, tree)
    # A container's capabilities must not become the host's, no more than its setuid bits.
    assert os.listxattr(back / "tool") == []


def test_file_capabilities_go_in_for_root_alone(box: Container, tree: Path) -> None:
    """As seen in the stream that comes out: a user's copy is complete but for them."""
    box.copy_in(tree / "tool", "/for-root")
    text_of(box, "mkdir -m 777 /for-user")
    box.copy_in(tree / "tool", "/for-user", user="1000:1000")
    found = {}
    for place in ("/for-root/tool", "/for-user/tool"):
        with tarfile.open(fileobj=io.BytesIO(b"".join(box.stream_out(place)))) as archive:
            found[place] = "SCHILY.xattr.security.capability" in archive.getmembers()[0].pax_headers
    assert found == {"/for-root/tool": True, "/for-user/tool": False}


def test_the_archive_is_read_by_tar(box: Container, tree: Path, tmp_path: Path) -> None:
    """GNU tar takes holes, links and names of any bytes out of what a container sends."""
    box.copy_in(tree, "/copies")
    target = tmp_path / "tar"
    target.mkdir()
    with (tmp_path / "packed").open("wb") as file:
        for chunk in box.stream_out("/copies/tree/"):
            file.write(chunk)
    assert (tmp_path / "packed").stat().st_size < 1 << 20
    command = ["tar", "--xattrs", "-C", target, "-xf", tmp_path / "packed"]
    subprocess.run(command, check=True, timeout=60)
    assert_same(target, tree)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_what_tar_packs_goes_in(box: Container, tree: Path, tmp_path: Path, form: str) -> None:
    """Both of GNU tar's forms, sparse members included."""
    packed = tmp_path / "packed"
    command = ["tar", f"--format={form}", "--sparse", "-C", tree, "-cf", packed, "."]
    subprocess.run(command, check=True, timeout=60)
    box.stream_in([packed.read_bytes()], path="/copies")
    assert text_of(box, "cd /copies; [ one -ef sub/two ] && stat -c %s holes") == f"{FAR + (8 << 20)}\n"
    box.copy_out("/copies/", tmp_path / "back")
    subprocess.run(["diff", "-r", tree, tmp_path / "back"], check=True, timeout=120)


def test_a_full_disk_has_an_error_of_its_own(box: Container, tmp_path: Path) -> None:
    """The caller may make room and try again; /dev is a small file system."""
    (tmp_path / "large").write_bytes(bytes(100 << 20))
    room = int(text_of(box, "df -k /dev | tail -1").split()[1]) * 1024
    assert room < 100 << 20
    with pytest.raises(ResourceExhausted) as refused:
        box.copy_in(tmp_path / "large", "/dev")
    assert refused.value.code == "COPY_FAILED"
    assert "No space left on device" in str(refused.value)


SWAP = """
cd /home/evil; i=0
while [ ! -e /tmp/stop ]; do
    mkdir d; mv d x$i; ln -s {target} d; mv d y$i; i=$((i + 1))
done 2>/dev/null
exit 0
"""


@pytest.fixture
def swapper(box: Container, request: pytest.FixtureRequest) -> Iterator[str]:
    """A process of another user that makes a directory a link and a directory again, without a pause."""
    target = str(request.param)
    text_of(
        box,
        "mkdir -p /home/evil /home/victim; chown 1666:1666 /home/evil; chmod 700 /home/victim; touch /etc/kept",
    )
    process = box.run(["sh", "-c", SWAP.format(target=target)], user="1666:1666")
    yield target
    text_of(box, "touch /tmp/stop")
    assert process.wait().code == 0
    process.close()


@pytest.mark.parametrize("swapper", ["/etc", "../victim", "/home/victim", "/proc/1/cwd/etc"], indirect=True)
@pytest.mark.parametrize("destination", ["/", "/home", "/home/evil"])
def test_who_swaps_links_during_a_copy_gains_nothing(box: Container, swapper: str, destination: str) -> None:
    """Root copies where an attacker has a directory: it lands there or fails, and never where he cannot write."""
    below = "/home/evil/d".removeprefix(destination).strip("/")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number in range(50):
            member = tarfile.TarInfo(f"{below}/planted{number}")
            archive.addfile(member, io.BytesIO())
    outcomes = set()
    for _ in range(20):
        try:
            box.stream_in([packed.getvalue()], path=destination)
            outcomes.add("done")
        except GardenError as error:
            outcomes.add(error.code)
    # Another user's link, or a directory that went between two entries; nothing else fails.
    assert outcomes <= {"done", "COPY_FAILED"}
    assert text_of(box, "find /etc /home/victim /proc/1/cwd/etc -name 'planted*' | wc -l") == "0\n"


def test_links_of_root_and_ones_own_are_followed(box: Container) -> None:
    """An image's bin -> usr/bin, and what the user has laid out himself; another user's link ends the copy."""
    text_of(
        box,
        "mkdir -p /usr/place /home/bob/own; chown -R 1001:1001 /home/bob; ln -s usr/place /shortcut;"
        "ln -s own /home/bob/l; chown -h 1001:1001 /home/bob/l",
    )
    packed = lambda name: [tar_of(name)]  # noqa: E731
    box.stream_in(packed("shortcut/f"), path="/")
    box.stream_in(packed("l/f"), path="/home/bob", user="1001:1001")
    assert code_of(box, "test -e /usr/place/f && test -e /home/bob/own/f") == 0
    with pytest.raises(PermissionDenied, match="another user's link"):
        box.stream_in(packed("l/g"), path="/home/bob")
    assert code_of(box, "test -e /home/bob/own/g") == 1


def tar_of(name: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return packed.getvalue()


def test_many_files_cost_no_memory(box: Container, garden_server: ServerProcess) -> None:
    """Twenty thousand out and in again: neither archiver keeps what has passed. Its memory is the container's."""
    text_of(
        box,
        "mkdir /dev/many; cd /dev/many; for d in 0 1 2 3; do mkdir $d; (cd $d; seq 5000 | xargs touch); done",
    )
    peaks: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    fields = dict(
                        line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
                    )
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if "VmHWM" in fields:  # not of one that has ended and waits for its parent
                    name = fields["Name"]
                    peaks[name] = max(peaks.get(name, 0), int(fields["VmHWM"].split()[0]) << 10)
            done.wait(0.05)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        packed = b"".join(box.stream_out("/dev/many/"))
        box.stream_in([packed], path="/dev/again")
    finally:
        done.set()
        watching.join()
    assert text_of(box, "find /dev/again -type f | wc -l") == "20000\n"
    assert 0 < peaks["tar-in"] < 15 << 20
    assert 0 < peaks["tar-out"] < 15 << 20
