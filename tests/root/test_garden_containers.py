"""Containers, files, limits, network and isolation as Garden specifies them; a test is named after its statement."""

from __future__ import annotations

import io
import socket
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from garden_image import MAKE_SETUID, TRY_SETUID, any_client
from kit.garden_http import GardenClientBase, GardenHttpError
from kit.places import open_to_all

pytestmark = pytest.mark.root
MIB = 1 << 20
__all__ = ["any_client"]  # the fixture `garden`


@pytest.fixture(scope="module")
def box(garden: GardenClientBase) -> Iterator[str]:
    with garden.container() as handle:
        yield handle


@pytest.fixture(scope="module")
def privileged(garden: GardenClientBase) -> Iterator[str]:
    with garden.container(privileged=True) as handle:
        yield handle


# --- lifecycle


@pytest.mark.garden_only("the keys are the Garden protocol's")
def test_L14_L15_info(garden: GardenClientBase, box: str) -> None:
    info = garden.info(box)
    assert info["State"] == "active"
    for key in ("HostIP", "ContainerIP", "ExternalIP", "ContainerPath"):
        assert info[key], key
    assert info["Properties"]["garden.network.container-ip"] == info["ContainerIP"]


def test_L3_handle_can_be_used_again(garden: GardenClientBase) -> None:
    for _ in range(3):
        with garden.container(handle="again"):
            assert "again" in garden.list()


def test_H1_H2_hostname(garden: GardenClientBase) -> None:
    handle = "7132-ec774112a9cd-101f8293-230e-4fa8-4138-e8244e6dcfa1"
    with garden.container(handle=handle):
        name = garden.text_of(handle, "hostname").strip()
        assert name == "ec774112a9cd-101f8293-230e-4fa8-4138-e8244e6dcfa1"
        garden.text_of(handle, f"ping -c 1 -W 20 {garden.info(handle)['ContainerIP']}")
        assert f" {name}" in garden.text_of(handle, "cat /etc/hosts")


def test_GT2_grace_time(garden: GardenClientBase) -> None:
    handle = garden.create(grace_time=500_000_000)
    process = garden.run(handle, "sleep", "1.2")
    assert process.wait() == 0  # an attached client keeps it
    deadline = time.monotonic() + 10
    while handle in garden.list():
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)


def test_I1_I2_I4_pid_1(garden: GardenClientBase, box: str) -> None:
    assert garden.text_of(box, "head -1 /proc/1/status").split() == ["Name:", "garden-init"]
    garden.text_of(box, "(sleep 0.01 &) ; sleep 0.1")
    listed = garden.text_of(box, "ps -a -o comm", user="alice").split()
    assert sorted(listed) == ["COMMAND", "garden-init", "ps"]


# --- files


def pack(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = len(content), 0o644, 4711
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def stream_out(garden: GardenClientBase, handle: str, **query: str) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(garden.stream_out(handle, **query))) as tar:
        return [member.name + "/" * member.isdir() for member in tar]


@pytest.mark.parametrize(("user", "owner"), [("", "root"), ("alice", "alice")])
def test_F1_F2_stream_in(garden: GardenClientBase, box: str, user: str, owner: str) -> None:
    destination = f"/tmp/in-{owner}/deep"
    garden.stream_in(box, pack(file=b"content"), user=user, destination=destination)
    text = garden.text_of(box, f"stat -c '%U %a' {destination} {destination}/file; cat {destination}/file")
    assert text.split() == [owner, "755", owner, "644", "content"]


def test_F2_relative_paths_are_below_the_home(garden: GardenClientBase, box: str) -> None:
    for destination, path in ((".", "/home/alice/f"), ("sub", "/home/alice/sub/f")):
        garden.stream_in(box, pack(f=destination.encode()), user="alice", destination=destination)
        assert garden.text_of(box, f"cat {path}") == destination


@pytest.mark.garden_only("gRPC wants a path")
def test_F2_no_destination_is_the_home(garden: GardenClientBase, box: str) -> None:
    garden.stream_in(box, pack(none=b"content"), user="alice", destination="")
    assert garden.text_of(box, "cat /home/alice/none") == "content"


def test_F3_F4_what_fails(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError):
        garden.stream_in(box, pack(f=b"x"), user="bob", destination="/tmp")
    with pytest.raises(GardenHttpError, match="ermission denied"):
        garden.stream_in(box, pack(f=b"x"), user="alice", destination="/root")
    with pytest.raises(GardenHttpError):
        garden.stream_in(box, pack(f=b"x" * 5000)[:2000], user="", destination="/tmp/cut")


@pytest.mark.garden_only("the words are the Garden protocol's")
def test_F3_clients_look_for_these_words(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError, match=r"error streaming in: .*ermission denied"):
        garden.stream_in(box, pack(f=b"x"), user="alice", destination="/root")
    with pytest.raises(GardenHttpError, match="error streaming in: unexpected end of data"):
        garden.stream_in(box, pack(f=b"x" * 5000)[:2000], user="", destination="/tmp/cut")


def test_F5_stream_out(garden: GardenClientBase, box: str) -> None:
    garden.text_of(box, "mkdir -p /srv/dir && echo x >/srv/dir/file && mkdir -p -m 700 /srv/secret")
    assert stream_out(garden, box, source="/srv/dir", user="") == ["dir/", "dir/file"]
    assert sorted(stream_out(garden, box, source="/srv/dir/", user="")) == ["./", "./file"]
    assert stream_out(garden, box, source="/srv/dir/file", user="") == ["file"]
    with pytest.raises(GardenHttpError):
        stream_out(garden, box, source="/srv/missing", user="")
    with pytest.raises(GardenHttpError):
        stream_out(garden, box, source="/srv/secret/", user="alice")


# --- limits and metrics


def test_ME2_ME3_memory(garden: GardenClientBase) -> None:
    limits = {"memory_limits": {"limit_in_bytes": 64 * MIB}}
    with garden.container(limits=limits) as handle:
        assert garden.memory_limit(handle) == 64 * MIB
        assert garden.sh(handle, "head -c 58000000 /dev/zero >/dev/shm/small; rm /dev/shm/small")[0] == 0
        assert garden.sh(handle, "head -c 80000000 /dev/zero >/dev/shm/large")[0] != 0


def test_ME4_EV1_out_of_memory_is_told(garden: GardenClientBase) -> None:
    with garden.container(limits={"memory_limits": {"limit_in_bytes": 16 * MIB}}) as handle:
        assert garden.sh(handle, "dd if=/dev/zero of=/dev/null bs=100M count=1")[0] != 0
        deadline = time.monotonic() + 5
        while "Out of memory" not in garden.info(handle)["Events"]:
            assert time.monotonic() < deadline, garden.info(handle)
            time.sleep(0.02)
        assert garden.text_of(handle, "echo alive") == "alive\n"


@pytest.mark.garden_only("gRPC has weights, not shares")
@pytest.mark.parametrize("shares", [100, 50])
def test_CP3_shares_are_read_back(garden: GardenClientBase, shares: int) -> None:
    with garden.container(limits={"cpu_limits": {"limit_in_shares": shares}}) as handle:
        found = garden.json("GET", f"/containers/{handle}/limits/cpu")["limit_in_shares"]
        assert found in (shares, {100: 17, 50: 10}[shares])  # cgroup v1, and v2


def test_OL1_pids(garden: GardenClientBase) -> None:
    with garden.container(limits={"pid_limits": {"max": 50}}) as handle:
        status, _, err = garden.sh(handle, "i=0; while [ $i -lt 60 ]; do sleep 3 & i=$((i+1)); done")
        assert (status, b"fork" in err) == (2, True)
        assert garden.metrics(handle)["PidStat"]["Max"] == 50


def test_BM1_to_BM3_metrics(garden: GardenClientBase, box: str) -> None:
    garden.text_of(box, "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done")
    metrics = garden.metrics(box)
    assert metrics["MemoryStat"]["TotalUsageTowardLimit"] > 0
    assert metrics["PidStat"] == {"Current": metrics["PidStat"]["Current"], "Max": 0}
    assert metrics["PidStat"]["Current"] >= 1
    assert metrics["Age"] > 0
    assert metrics["CPUStat"]["Usage"] > 0


@pytest.mark.garden_only("the keys are the Garden protocol's")
def test_BM1_limits_are_those_in_force(garden: GardenClientBase) -> None:
    limits = {"memory_limits": {"limit_in_bytes": 64 * MIB}}
    with garden.container(limits=limits) as handle:
        stat = garden.metrics(handle)["MemoryStat"]
        if "hierarchical_memory_limit" in stat:  # cgroup v1's
            assert stat["hierarchical_memory_limit"] == 64 * MIB
            assert stat.get("hierarchical_memsw_limit", 64 * MIB) == 64 * MIB


@pytest.mark.garden_only("the keys are the Garden protocol's")
def test_CA1_capacity(garden: GardenClientBase) -> None:
    found = garden.json("GET", "/capacity")
    assert all(
        found[key] > 0
        for key in ("memory_in_bytes", "disk_in_bytes", "schedulable_disk_in_bytes", "max_containers")
    )


# --- isolation


def status_of(garden: GardenClientBase, handle: str, field: str, **spec: str) -> str:
    return garden.text_of(handle, f"grep ^{field}: /proc/self/status", **spec).split()[1]


def test_C1_capabilities_of_an_unprivileged_container(garden: GardenClientBase, box: str) -> None:
    """As in the table, but with empty inheritable sets."""
    root = [status_of(garden, box, f"Cap{name}") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")]
    alice = [
        status_of(garden, box, f"Cap{name}", user="alice") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    ]
    low = "00000000a80425fb"
    assert root == ["0" * 16, low, low, low, "0" * 16]
    assert alice == ["0" * 16, "0" * 16, "0" * 16, low, "0" * 16]


def test_C2_capabilities_of_a_privileged_container(garden: GardenClientBase, privileged: str) -> None:
    assert int(status_of(garden, privileged, "CapBnd", user="alice"), 16) == 0xA82425FB


def test_SE1_SE2_seccomp(garden: GardenClientBase, box: str, privileged: str) -> None:
    assert (status_of(garden, box, "Seccomp"), status_of(garden, privileged, "Seccomp")) == ("2", "0")
    status, _, err = garden.sh(box, "unshare --user true")
    assert status != 0
    assert b"Operation not permitted" in err


def test_SE5_SE6_without_settings(garden: GardenClientBase, box: str, privileged: str) -> None:
    """A setuid program gains what it always did, and TCP is tuned as the host's is."""
    garden.text_of(box, MAKE_SETUID)
    assert b"unknown user" in garden.sh(box, TRY_SETUID, user="alice")[2]
    names = ("keepalive_time", "keepalive_intvl", "keepalive_probes", "retries1", "retries2")
    paths = [f"/proc/sys/net/ipv4/tcp_{name}" for name in names]
    for handle in (box, privileged):
        assert garden.text_of(handle, f"cat {' '.join(paths)}") == "".join(Path(p).read_text() for p in paths)


def test_NS3_nothing_of_the_host_can_be_written(garden: GardenClientBase, box: str) -> None:
    assert garden.sh(box, "echo b >/proc/sysrq-trigger")[0] != 0


def test_MO_mounts(garden: GardenClientBase, box: str, privileged: str) -> None:
    for handle in (box, privileged):
        mounts = garden.text_of(handle, "cat /proc/mounts")
        assert "sysfs /sys sysfs ro" in mounts
        shm = next(line for line in mounts.splitlines() if " /dev/shm " in line)
        assert shm.split()[3].startswith("rw,nosuid,nodev,noexec,relatime")
        assert garden.text_of(handle, "stat -c %a /tmp").strip() == "1777"
    assert "cgroup" not in garden.text_of(privileged, "cat /proc/mounts")


def test_DV1_DV2_devices(garden: GardenClientBase, box: str, privileged: str) -> None:
    script = "for d in tty random urandom null zero full pts/ptmx; do stat -c '%n %t,%T' /dev/$d; done"
    expected = ["tty 5,0", "random 1,8", "urandom 1,9", "null 1,3", "zero 1,5", "full 1,7", "pts/ptmx 5,2"]
    assert garden.text_of(box, script).splitlines() == [f"/dev/{line}" for line in expected]
    assert garden.text_of(privileged, "stat -c '%t,%T %a' /dev/fuse").split() == ["a,e5", "666"]
    links = garden.text_of(box, "for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done").split()
    assert links == ["/proc/self/fd", *(f"/proc/self/fd/{n}" for n in range(3)), "pts/ptmx"]


def test_BI1_BI4_bind_mounts(garden: GardenClientBase, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("bind")
    open_to_all(source)
    (source / "file").write_text("shared")
    mounts = [
        {"src_path": str(source), "dst_path": "/ro"},
        {"src_path": str(source), "dst_path": "/rw/deep", "mode": 1},
    ]
    with garden.container(bind_mounts=mounts) as handle:
        assert garden.text_of(handle, "cat /ro/file /rw/deep/file") == "sharedshared"
        status, _, err = garden.sh(handle, "touch /ro/new")
        assert (status != 0, b"Read-only file system" in err) == (True, True)
        garden.text_of(handle, "touch /rw/deep/new")
    assert (source / "new").exists()


# --- network


def test_N14_N15_net_in(garden: GardenClientBase, box: str) -> None:
    host_port, container_port = garden.map_port(box, 8080)
    assert container_port == 8080
    listener = garden.run(box, "nc", "-l", "-p", "8080", "-e", "echo", "hello")
    deadline = time.monotonic() + 5
    while ":1F90 " not in garden.text_of(box, "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null; true"):
        assert time.monotonic() < deadline
    with socket.create_connection(("127.0.0.1", host_port), timeout=5) as connection:
        assert connection.makefile("rb").read() == b"hello\n"
    assert listener.wait() == 0
    assert {"HostPort": host_port, "ContainerPort": 8080} in garden.info(box)["MappedPorts"]


def test_N30_to_N33_name_files(garden: GardenClientBase, box: str) -> None:
    hosts = garden.text_of(box, "cat /etc/hosts")
    assert "127.0.0.1 localhost" in hosts.replace("\t", " ")
    for path in ("/etc/hosts", "/etc/resolv.conf"):
        status, _, err = garden.sh(box, f"echo x >>{path}", user="alice")
        assert (status, b"Permission denied" in err) == (1, True)
        garden.text_of(box, f"echo '# mine' >>{path}")
