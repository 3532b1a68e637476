"""The agent in real containers, with a user namespace, in root file systems that hold next to nothing."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.agent_client import AgentClient, AgentError
from kit.agent_container import FIRST_UID, give_to_container, make_busybox_rootfs, running_container
from kit.agent_process import directory_for_all_users

from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def bundle() -> Iterator[RuntimeBundle]:
    with directory_for_all_users() as path:
        yield build_runtime_bundle(path / "runtime")


@pytest.fixture
def place() -> Iterator[Path]:
    with directory_for_all_users() as path:
        yield path


@pytest.fixture
def agent(bundle: RuntimeBundle, place: Path) -> Iterator[AgentClient]:
    make_busybox_rootfs(place / "rootfs")
    with (
        running_container(bundle, place, place / "rootfs", f"agent-test-{os.getpid()}") as path,
        AgentClient(path) as client,
    ):
        yield client
    assert (place / "agent.log").read_text() == ""


def sh(script: str) -> list[bytes]:
    return [b"sh", b"-c", script.encode()]


def test_a_process_in_a_busybox_image(agent: AgentClient) -> None:
    """Users, home, streams, groups: the whole path in a user namespace."""
    code, out, err = agent.run(
        "p", sh("id -u; id -G; pwd; echo $USER; cat; cat /proc/1/comm"), b"in\n", user="alice"
    )
    assert (code, err) == (0, b"")
    assert out.split(b"\n")[:-1] == [b"1001", b"1010 1011", b"/home/alice", b"alice", b"in", b"garden-init"]
    assert agent.run("p", sh("id -G"))[1] == b"0 10\n"
    assert agent.run("p", sh("echo x > /dev/stdout"), user="alice")[:2] == (0, b"x\n")


def test_a_terminal_in_a_user_namespace(agent: AgentClient) -> None:
    """The slave is handed to the user, which needs mapped ids."""
    out = agent.run("p", sh("tty; ls -ln $(tty); stty size"), user="alice", tty={"rows": 5, "columns": 0})[1]
    name, listing, size = out.split(b"\r\n")[:3]
    assert name.startswith(b"/dev/pts/")
    assert listing.split()[:4] == [b"crw--w----", b"1", b"1001", b"5"]
    assert size == b"5 80"


def test_only_pid_1_and_processes_are_there(agent: AgentClient) -> None:
    """I4."""
    out = agent.run("p", [b"ps", b"-o", b"comm"])[1]
    assert out.split() == [b"COMMAND", b"garden-init", b"ps"]


def test_root_of_the_container_cannot_reach_into_pid_1(agent: AgentClient) -> None:
    """Its memory, its descriptors, its program and the bundle (CVE-2019-5736)."""
    read = "cat /proc/1/fd/3; cat /proc/1/mem; cat /proc/1/environ"
    write = "echo x > /.garden/x; echo x > /proc/1/exe; kill -9 1"
    code, out, err = agent.run("p", sh(f"{read}; {write}; echo still here"))
    assert (code, out) == (0, b"still here\n")
    assert err.count(b"Permission denied") >= 3
    assert b"Read-only file system" in err
    agent.hello()


def test_files_go_in_and_out_of_an_image_without_tar(agent: AgentClient, place: Path) -> None:
    """F7; owners seen from the host are the mapped ones."""
    path = {"path": b"app"}
    code, _, err = agent.run("in", [], small_archive(), user="alice", program="tar-in", program_args=path)
    assert (code, err) == (0, b"")
    status = (place / "rootfs/home/alice/app/hello").stat()
    assert (status.st_uid, status.st_gid) == (FIRST_UID + 1001, FIRST_UID + 1010)
    code, out, err = agent.run("out", [], user="alice", program="tar-out", program_args=path)
    assert (code, err) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(out)) as archive:
        assert archive.getnames() == ["app", "app/hello"]


def small_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("hello")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    return buffer.getvalue()


def test_stop_all_and_bounding_set(agent: AgentClient) -> None:
    """What the server uses for stop, and for privileged users."""
    streams = agent.spawn("p", [b"sleep", b"60"], user="alice", bounding=1)
    assert agent.request("signal_all", signal=9) == {"delivered": True}
    assert os.waitstatus_to_exitcode(agent.wait_exit("p")) == -9
    streams.close()


def test_an_image_of_one_static_binary(bundle: RuntimeBundle, place: Path) -> None:
    """No passwd, no shell, no directory but the binary's own."""
    rootfs = place / "rootfs"
    rootfs.mkdir()
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, rootfs / "busybox-only")
    give_to_container(rootfs)
    with (
        running_container(bundle, place, rootfs, f"agent-only-{os.getpid()}") as path,
        AgentClient(path) as agent,
    ):
        assert agent.run("p", [b"/busybox-only", b"echo", b"hello"])[:2] == (0, b"hello\n")
        assert agent.run("p", [b"/busybox-only", b"id", b"-u"], user="7:8", dir=b"/made/here")[:2] == (
            0,
            b"7\n",
        )
        with pytest.raises(AgentError) as caught:
            agent.spawn("p", [b"sh"])
        assert caught.value.code == "executable_not_found"
    status = (rootfs / "made/here").stat()
    assert (status.st_uid, status.st_gid) == (FIRST_UID + 7, FIRST_UID + 8)


def test_an_image_cannot_get_into_or_hold_up_pid_1(bundle: RuntimeBundle, place: Path) -> None:
    """Files that the C library or Python would read at start: a FIFO blocks, a library is code."""
    rootfs = place / "rootfs"
    make_busybox_rootfs(rootfs)
    (rootfs / "etc/ld.so.preload").write_text("/lib/evil.so\n")
    os.mkfifo(rootfs / "etc/localtime")
    os.mkfifo(rootfs / "etc/ld.so.cache")
    for name in (f"usr/lib/locale/C.{spelling}/LC_CTYPE" for spelling in ("utf8", "UTF-8")):
        (rootfs / name).parent.mkdir(parents=True)
        os.mkfifo(rootfs / name)
    (rootfs / "lib").mkdir()
    with zipfile.ZipFile(
        rootfs / f"lib/python{sys.version_info[0]}{sys.version_info[1]}.zip", "w"
    ) as archive:
        archive.writestr("encodings/__init__.py", "raise SystemExit('code of the image')")
    (rootfs / "pyvenv.cfg").write_text("home = /evil\n")
    give_to_container(rootfs)
    with (
        running_container(bundle, place, rootfs, f"agent-evil-{os.getpid()}") as path,
        AgentClient(path) as agent,
    ):
        assert agent.run("p", [b"echo", b"fine"])[:2] == (0, b"fine\n")
    assert (place / "agent.log").read_text() == ""
