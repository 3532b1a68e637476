"""Containers see what is mounted on the host after the server was started, shared or not (mount_namespaces(7))."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from garden_image import make_garden_image
from kit.garden import sh
from kit.patience import FACTOR
from kit.places import open_to_all
from own_server import own_garden, own_server  # noqa: F401 - fixtures

from garden_py.client import BindMount, ContainerSpec, GardenClient, MountMode, ProcessSpec, Sidecar

pytestmark = pytest.mark.root


@contextmanager
def mounted_over(directory: Path) -> Iterator[None]:
    """Another file system at a directory."""
    other = directory.with_name(f"{directory.name}-other")
    other.mkdir(mode=0o755)
    (other / "who").write_text("mounted")
    # A file system of its own, and one that can be shown with mapped ids.
    subprocess.run(["mount", "--bind", other, directory], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True, timeout=20)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    open_to_all(tmp_path)
    found = tmp_path / "source"
    found.mkdir(mode=0o755)
    (found / "who").write_text("below")
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.mkdir()
    return make_garden_image(own)


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("mode", list(MountMode))
def test_of_binds(garden: GardenClient, place: Path, image: Path, privileged: bool, mode: MountMode) -> None:
    bind = BindMount(str(place), "/data", mode)
    sidecar = Sidecar(f"raw://{image}", bind_mounts=(BindMount(str(place), "/side"),))
    with mounted_over(place), garden.create(ContainerSpec(privileged=privileged, bind_mounts=(bind,))) as box:
        assert box.run(["cat", "/data/who"]).output().stdout == b"mounted"
        assert box.run(ProcessSpec("cat", args=("/side/who",), sidecar=sidecar)).output().stdout == b"mounted"


def test_of_a_directory_that_is_an_image(garden: GardenClient, tmp_path: Path, image: Path) -> None:
    """Concourse mounts its volumes so."""
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o755)
    subprocess.run(["mount", "--bind", image, volume], check=True, timeout=20)
    try:
        with garden.create(ContainerSpec(image=f"raw://{volume}")) as box:
            assert box.run(sh("cat /sbin/hello-world")).output().exit.code == 0
    finally:
        subprocess.run(["umount", volume], check=True, timeout=20)


LATE_THREAD = """
import threading, time
from garden_py.backend.host import syscalls
from garden_py.backend.rootfs.host_mounts import HostMounts
mounts = HostMounts()
mounts.remember()
syscalls.unshare(syscalls.CLONE_NEWNS)
mounts.left()
threading.Thread(target=time.sleep, args=(0.2,)).start()
with mounts.entered():
    print("there")
"""


def test_a_thread_that_is_about_to_end_is_waited_for() -> None:
    """Of a worker's last job; found by chaos. The kernel changes the namespace of no process with two threads."""
    done = subprocess.run(
        [sys.executable, "-c", LATE_THREAD], capture_output=True, text=True, timeout=20 * FACTOR
    )
    assert (done.stdout, done.stderr) == ("there\n", "")
