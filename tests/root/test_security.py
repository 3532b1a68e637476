"""What a process in a container may try, and what stops it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import code_of, sh, text_of
from kit.server import ServerProcess

from garden_py.client import Container, ContainerSpec, GardenClient, Tty

pytestmark = pytest.mark.root

UNPRIVILEGED = 0xA80425FB  # Garden statement C1
PRIVILEGED_NON_ROOT = 0xA82425FB  # C2


@pytest.fixture(scope="module")
def privileged_box(garden: GardenClient) -> Iterator[Container]:
    """A privileged container."""
    with garden.create(ContainerSpec(privileged=True)) as container:
        yield container


def capabilities(container: Container, user: str) -> dict[str, int]:
    lines = text_of(container, "grep ^Cap /proc/self/status", user=user).splitlines()
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines}


def host_bounding_set() -> int:
    return int(
        next(x.split()[1] for x in Path("/proc/self/status").read_text().splitlines() if "CapBnd" in x), 16
    )


def test_capability_sets_of_the_four_cases(shared_box: Container, privileged_box: Container) -> None:
    """As Garden's table says, never inheritable, never ambient, never more than the host has."""
    host = host_bounding_set()
    for container, user, held, bounding in (
        (shared_box, "root", UNPRIVILEGED, UNPRIVILEGED),
        (shared_box, "1000", 0, UNPRIVILEGED),
        (privileged_box, "root", host, host),
        (privileged_box, "1000", 0, PRIVILEGED_NON_ROOT & host),
    ):
        found = capabilities(container, user)
        assert found["CapInh"] == found["CapAmb"] == 0
        assert found["CapPrm"] == found["CapEff"] == held & host
        assert found["CapBnd"] == bounding & host


def test_seccomp_filters_unprivileged_containers_only(
    shared_box: Container, privileged_box: Container
) -> None:
    """Mode 2 is a filter, 0 is none."""
    assert text_of(shared_box, "grep ^Seccomp: /proc/self/status").split()[1] == "2"
    assert text_of(privileged_box, "grep ^Seccomp: /proc/self/status").split()[1] == "0"


@pytest.mark.parametrize(
    "attempt",
    [
        "unshare -U true",
        "unshare -m true",
        "mount -t tmpfs none /mnt",
        "echo b > /proc/sysrq-trigger",
        "echo 1 > /proc/sys/kernel/panic",
        "mkdir /sys/fs/cgroup/memory/mine",
        "echo 0 > /sys/fs/cgroup/pids/cgroup.procs",
        "hostname other",
        "ip addr add 10.9.9.9/32 dev eth0",
        "ip link set eth0 down",
        "mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk",
        "cat /proc/kcore | head -c 1 | grep -q .",
        "cat /proc/1/environ",
        "readlink /proc/1/fd/3",
        "cat < /proc/1/fd/3",
        "readlink /proc/1/exe",
        "ls /proc/1/root/",
        "echo x > /dev/.garden/x",
        "rm -rf /dev/.garden/*",
        "kill -TRAP 1 && false",
    ],
)
def test_attempt_of_container_root_fails(shared_box: Container, attempt: str) -> None:
    """Root in the container is nobody outside of it."""
    assert code_of(shared_box, attempt) != 0


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_pid_1_survives_signals_from_inside(shared_box: Container, number: int) -> None:
    """The kernel drops what PID 1 has no handler for (pid_namespaces(7))."""
    code_of(shared_box, f"kill -{int(number)} 1; kill -{int(number)} -1; true")
    assert text_of(shared_box, "echo still here") == "still here\n"


def test_processes_see_themselves_and_pid_1_only(shared_box: Container) -> None:
    """A pid namespace of its own, and a telling name for PID 1."""
    lines = text_of(shared_box, "ps -o pid,comm").splitlines()[1:]
    assert lines[0].split() == ["1", "garden-init"]
    assert {line.split()[1] for line in lines} <= {"garden-init", "sh", "ps"}


def test_only_standard_descriptors_are_open(shared_box: Container) -> None:
    """No descriptor of the agent, the runtime or the server leaks into a process (CVE-2024-21626)."""
    assert text_of(shared_box, "ls /proc/self/fd").split() == ["0", "1", "2", "3"]  # 3 is ls's own
    output = shared_box.run(["readlink", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2"]).output()
    assert all(line.startswith("pipe:") for line in output.stdout.decode().split())


def test_agents_socket_is_nowhere_inside(shared_box: Container, garden_server: ServerProcess) -> None:
    """Neither as a path nor as a listening socket that the container's network shows."""
    assert code_of(shared_box, f"ls {garden_server.place}") != 0
    assert text_of(shared_box, "grep -c sock /proc/net/unix || true").strip() == "0"
    assert code_of(shared_box, "find / -xdev -type s | grep -q .") != 0


def test_mounts_are_as_specified(shared_box: Container, privileged_box: Container) -> None:
    """Garden's table of mounts; the agent's bundle is read-only and without setuid."""
    table = {}
    for line in text_of(shared_box, "cat /proc/mounts").splitlines():
        _, target, fstype, options, *_ = line.split()
        table[target] = (fstype, set(options.split(",")))
    assert table["/sys"][0] == "sysfs"
    assert "ro" in table["/sys"][1]
    assert table["/proc"][1] >= {"rw", "nosuid", "nodev", "noexec"}
    assert table["/dev/shm"][1] >= {"rw", "nosuid", "nodev", "noexec"}
    assert table["/dev/pts"][1] >= {"rw", "nosuid", "noexec", "mode=620", "ptmxmode=666"}
    assert table["/dev/.garden"][1] >= {"ro", "nosuid", "nodev"}
    assert table["/"][0] == "overlay"
    assert "cgroup" not in text_of(privileged_box, "cat /proc/mounts").replace("securityfs", "")


def test_devices_are_as_specified(shared_box: Container, privileged_box: Container) -> None:
    """The few devices that programs expect, with the right numbers, and no disk."""
    wanted = {
        "null": (1, 3),
        "zero": (1, 5),
        "full": (1, 7),
        "random": (1, 8),
        "urandom": (1, 9),
        "tty": (5, 0),
    }
    for name, (major, minor) in wanted.items():
        assert text_of(shared_box, f"stat -c '%t %T' /dev/{name}").split() == [f"{major:x}", f"{minor:x}"]
    assert text_of(shared_box, "readlink /dev/ptmx; readlink /dev/fd; readlink /dev/stdin").split() == [
        "pts/ptmx",
        "/proc/self/fd",
        "/proc/self/fd/0",
    ]
    assert text_of(shared_box, "find /dev -type b | wc -l").strip() == "0"
    assert text_of(privileged_box, "stat -c '%t %T %a' /dev/fuse").split() == ["a", "e5", "666"]


def test_masked_paths_are_empty(shared_box: Container) -> None:
    """What the kernel tells of the host is covered."""
    for path in ("/proc/keys", "/proc/latency_stats", "/proc/timer_list"):
        assert code_of(shared_box, f"[ ! -e {path} ] || ! grep -q . {path}") == 0
    assert text_of(shared_box, "ls /sys/firmware | wc -l").strip() == "0"


def test_every_container_has_host_ids_of_its_own(garden: GardenClient) -> None:
    """Root of one container is nobody in another, and nobody on the host."""
    with garden.create() as first, garden.create() as second:
        owners = [os.stat(f"/proc/{box.info().pid}").st_uid for box in (first, second)]
        maps = [Path(f"/proc/{box.info().pid}/uid_map").read_text().split() for box in (first, second)]
        assert [int(m[0]) for m in maps] == [0, 0]
        assert [int(m[2]) for m in maps] == [65_536, 65_536]
        assert abs(int(maps[0][1]) - int(maps[1][1])) >= 65_536
        assert 0 not in {int(m[1]) for m in maps}
        assert owners  # readable: the processes exist


def test_image_is_shared_and_never_written(garden: GardenClient) -> None:
    """What one container writes, deletes or chowns, no other sees."""
    with garden.create() as first, garden.create() as second:
        text_of(first, "echo mine > /etc/passwd; rm /etc/group; chown 1000 /bin/busybox; chmod 700 /etc")
        assert text_of(second, "head -c 4 /etc/passwd; ls /etc/group; stat -c %u /bin/busybox") == (
            "root/etc/group\n0\n"
        )


def test_files_of_the_image_belong_to_container_root(shared_box: Container) -> None:
    """Id-mapped, not nobody; and setuid of the image acts inside only."""
    assert text_of(shared_box, "stat -c %u:%g / /bin/busybox /etc/passwd").split() == ["0:0"] * 3
    assert text_of(shared_box, "touch /root/f && stat -c %u /root/f").strip() == "0"


def test_hosts_and_resolv_conf_are_private_and_of_root(shared_box: Container, garden: GardenClient) -> None:
    """Root may change them, others may not, and no other container sees it (statements N30, N33)."""
    assert code_of(shared_box, "echo x >> /etc/hosts", user="1000") == 1
    text_of(shared_box, "echo 10.1.2.3 mine >> /etc/hosts")
    with garden.create() as other:
        assert "mine" not in text_of(other, "cat /etc/hosts")
        own = text_of(other, "hostname").strip()
        assert text_of(other, "cat /etc/hosts").split()[:2] == ["127.0.0.1", "localhost"]
        assert own in text_of(other, "cat /etc/hosts")
        assert "nameserver 127." not in text_of(other, "cat /etc/resolv.conf")


def test_attached_terminal_is_the_containers_own(shared_box: Container) -> None:
    """The pty comes from the container's devpts, so no terminal of the host is reachable (CVE-2016-9962 class)."""
    process = shared_box.run(sh("tty; stat -c %u $(tty)"), tty=Tty(24, 80))
    assert process.output().stdout.replace(b"\r", b"").split() == [b"/dev/pts/0", b"0"]
