"""Names that are not text: tasks of containers and mounts of the host are called what others want."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from kit.garden import PATIENCE, sh, text_of
from kit.server import running_server

from garden_py.client import ContainerSpec, GardenClient, Limits

pytestmark = pytest.mark.root

# A task is called as its program's file: 0xFF is in no UTF-8, and Python takes 0x0B for the end of a line.
SCRIPT = r"""
for name in "$(printf 'busybox\377')" "$(printf 'busybox\vNSpid:')"; do
  cp /bin/busybox "/tmp/$name"
  "/tmp/$name" sh -c 'trap : TERM; while :; do sleep 1000; done' &
done
echo running
wait
"""


@pytest.mark.parametrize("privileged", [False, True])
def test_tasks_whose_names_are_no_text(no_trace: None, privileged: bool) -> None:
    """Their limits change, they are shown, and they outlive the server and are stopped as all others are."""
    with running_server() as server, GardenClient(server.address) as garden:
        box = garden.create(ContainerSpec(handle="box", privileged=privileged))
        process = box.start(sh(SCRIPT))
        next(box.read_output(process.id, follow=True))
        assert box.update_limits(Limits(rlimits={"nofile": 100})).rlimits == {"nofile": 100}
        assert b"busybox\xff" in b"".join(box.diagnose())
        server.kill()
        server.start()
        assert box.update_limits(Limits(rlimits={"nofile": 90})).rlimits == {"nofile": 90}
        box.stop(grace=timedelta(milliseconds=100))
        ended = box.wait(process.id, PATIENCE)
        assert ended is not None
        assert ended.signal
        box.destroy()


def test_groups_whose_names_are_no_text(no_trace: None) -> None:
    """A privileged container's root makes them below its own, with processes in them."""
    script = r"""
mkdir /tmp/groups
mount -t cgroup -o memory none /tmp/groups || mount -t cgroup2 none /tmp/groups
group="/tmp/groups/$(printf 'x\377\v')"
mkdir "$group"
sleep 1000 >/dev/null 2>&1 &
echo $! > "$group/cgroup.procs" && echo made
"""
    with running_server() as server, GardenClient(server.address) as garden:
        box = garden.create(ContainerSpec(handle="box", privileged=True))
        assert "made" in text_of(box, script)
        assert (
            box.update_limits(Limits(memory_bytes=100 << 20, rlimits={"nofile": 100})).memory_bytes
            == 100 << 20
        )
        assert b"x\xff" in b"".join(box.diagnose())
        assert garden.check_leaks() == []
        server.kill()
        server.start()
        assert box.metrics().pids > 1
        assert garden.check_leaks() == []
        box.stop(kill=True)
        box.destroy()


def test_mount_of_the_host_whose_name_is_no_text(no_trace: None, tmp_path: Path) -> None:
    """A server and the doctor look for their own mounts among it."""
    place = os.fsencode(tmp_path) + b"/\xff \x0b\xc2\x85 - x"
    os.mkdir(place)
    subprocess.run([b"mount", b"-t", b"tmpfs", b"none", place], check=True, timeout=20)
    try:
        with running_server() as server, GardenClient(server.address) as garden, garden.create() as box:
            assert text_of(box, "echo hello") == "hello\n"
            assert garden.check_leaks() == []
    finally:
        subprocess.run([b"umount", place], check=True, timeout=20)
