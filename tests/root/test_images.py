"""The agent runs in any root file system: busybox, a Debian, and one that holds a single static program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import code_of, text_of
from kit.images import debian_image, make_hello_image, parse_apt_source
from kit.server import ServerProcess, running_server

from garden_py.client import (
    Container,
    ContainerSpec,
    ContainerState,
    GardenClient,
    Limits,
    NotFound,
    Tty,
)

pytestmark = [pytest.mark.root, pytest.mark.host]


@pytest.fixture(scope="module")
def debian(garden: GardenClient) -> Iterator[Container]:
    """A container of a Debian image."""
    spec = ContainerSpec(handle="debian", image=str(debian_image()), limits=Limits(memory_bytes=256 << 20))
    with garden.create(spec) as container:
        yield container


@pytest.fixture(scope="module")
def hello_image(garden_server: ServerProcess) -> Path:
    image = garden_server.place / "hello"
    make_hello_image(image)
    return image


def test_debian_runs_its_own_programs(debian: Container) -> None:
    """Its shell, its libc, its package database: as root and as one of its users."""
    assert "Debian" in text_of(debian, ". /etc/os-release; echo $NAME")
    assert text_of(debian, "dpkg -s libc6 | grep -c '^Status: install ok installed'") == "1\n"
    assert text_of(debian, "id -un; pwd; echo $PATH", user="daemon") == (
        "daemon\n/usr/sbin\n/usr/local/bin:/usr/bin:/bin\n"
    )
    assert text_of(debian, "bash -c 'echo ${BASH_VERSINFO[0]}'").strip().isdigit()


def test_debian_is_written_without_the_image_noticing(debian: Container) -> None:
    """A user is added, files are installed and removed; the shared directory stays as it was."""
    text_of(debian, "useradd -m -s /bin/bash walker && rm /etc/motd && dpkg-divert --list >/dev/null")
    assert (
        text_of(debian, "id -un; pwd; touch file; stat -c %U file", user="walker")
        == "walker\n/home/walker\nwalker\n"
    )
    image = debian_image()
    assert "walker" not in (image / "etc" / "passwd").read_text()
    assert (image / "etc" / "motd").exists()
    assert text_of(debian, "stat -c %u /etc/passwd /usr/bin/env") == "0\n0\n"


def test_debian_setuid_works_inside(debian: Container) -> None:
    """Owners of the image are the container's, so a setuid program is root there, and there only."""
    assert text_of(debian, "stat -c '%U %a' /bin/su") == "root 4755\n"
    assert code_of(debian, "su root -c true </dev/null", user="daemon") != 0
    assert text_of(debian, "su daemon -s /bin/sh -c 'id -un'") == "daemon\n"


def test_debian_terminal(debian: Container) -> None:
    """A login shell on a terminal of the asked-for size."""
    done = debian.run(["bash", "-lc", "tty; stty size"], tty=Tty(33, 77)).output()
    assert done.stdout == b"/dev/pts/0\r\n33 77\r\n"


def test_image_of_one_static_program(garden: GardenClient, hello_image: Path) -> None:
    """No libc, no shell, no /etc, no /tmp, no /proc in the image: it runs, is fed, and is told apart from others."""
    with garden.create(ContainerSpec(image=str(hello_image))) as box:
        assert box.info().state is ContainerState.ACTIVE
        done = box.run(["/hello"]).output()
        assert (done.stdout, done.exit.code) == (b"hello from pid 1, uid 0\n", 0)
        done = box.run(["/hello", "x"], user="1234:5678", dir="/made/for/it").output()
        assert (done.stdout, done.exit.code) == (b"hello from pid 1, uid 1234\n", 7)
        process = box.run(["/hello", "cat"])
        process.stdin.write(b"through " * 10_000)
        process.stdin.close()
        assert process.output().stdout == b"through " * 10_000
        with pytest.raises(NotFound) as refused:
            box.run(["sh"])
        assert refused.value.code == "EXECUTABLE_NOT_FOUND"
        with pytest.raises(NotFound):
            box.run(["/hello"], user="somebody")
    assert [path.name for path in hello_image.iterdir()] == ["hello"]


def test_copy_and_limits_need_nothing_of_the_image(garden: GardenClient, hello_image: Path) -> None:
    """Files go in and out, and signals arrive, though there is no tar, no kill and no directory."""
    spec = ContainerSpec(image=str(hello_image), limits=Limits(memory_bytes=16 << 20, pids=5))
    with garden.create(spec) as box:
        box.write_file("/new/place/file", b"content")
        assert box.read_file("/new/place/file") == b"content"
        process = box.run(["/hello", "cat"])
        process.signal("TERM")
        assert process.output().exit.signal == 15


def test_many_containers_share_one_image(garden: GardenClient, debian: Container) -> None:
    """Each sees its own changes only; owners are right under different id ranges at the same time."""
    image = str(debian_image())
    with (
        garden.create(ContainerSpec(image=image)) as one,
        garden.create(ContainerSpec(image=f"raw://{image}")) as two,
        garden.create(ContainerSpec(image=image, privileged=True)) as three,
    ):
        for n, box in enumerate((one, two, three)):
            text_of(box, f"echo {n} >/etc/mine; chown daemon /etc/mine")
        for n, box in enumerate((one, two, three)):
            assert text_of(box, "cat /etc/mine; stat -c %U /etc/mine /etc/passwd") == f"{n}\ndaemon\nroot\n"
    assert not (debian_image() / "etc" / "mine").exists()


def test_default_image_can_be_chosen(hello_image: Path) -> None:
    """--default-rootfs serves containers that name no image."""
    with (
        running_server("--default-rootfs", str(hello_image)) as server,
        GardenClient(server.address) as garden,
        garden.create() as box,
    ):
        assert box.run(["/hello"]).output().exit.code == 0


def test_apt_sources_are_read_in_both_formats(tmp_path: Path) -> None:
    """The Debian image comes from the machine's own archive, however it is configured."""
    (tmp_path / "sources.list").write_text(
        "# deb x y\ndeb [arch=amd64 signed-by=/k] http://one/debian stable main\n"
    )
    assert parse_apt_source(tmp_path) == ("http://one/debian", "stable")
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "Types: deb\n# comment\nURIs: http://two/debian\nSuites: bookworm updates\nComponents: main\n"
    )
    assert parse_apt_source(tmp_path) == ("http://two/debian", "bookworm")
