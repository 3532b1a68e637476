"""Statements of Garden that no other file is about, by their numbers."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from garden_image import any_client
from kit.garden_http import GardenClientBase, GardenHttpError
from kit.places import open_to_all

pytestmark = pytest.mark.root

__all__ = ["any_client"]  # the fixture `garden`


@pytest.fixture(scope="module")
def box(garden: GardenClientBase) -> Iterator[str]:
    with garden.container() as handle:
        yield handle


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that containers can reach."""
    open_to_all(tmp_path)
    return tmp_path


def bound(source: Path, **more: Any) -> list[dict[str, Any]]:
    return [{"src_path": str(source), "dst_path": "/bound", **more}]


def test_L5_failed_create_leaves_its_handle_free(garden: GardenClientBase) -> None:
    with pytest.raises(GardenHttpError, match="does not exist"):
        garden.create(handle="free-again", bind_mounts=bound(Path("/no/such/source")))
    with garden.container(handle="free-again") as handle:
        assert handle == "free-again"


def test_T6_E5_nothing_is_added_to_the_environment(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "env", tty={"window_size": {"columns": 80, "rows": 24}})
    assert process.wait() == 0
    names = {line.partition("=")[0] for line in process.stdout.decode().split()}
    assert names == {"PATH", "HOME", "USER"}


@pytest.mark.garden_only("the routes are the Garden protocol's")
def test_ST5_stopped_container_is_used_as_before(garden: GardenClientBase) -> None:
    with garden.container(properties={"a": "b"}) as handle:
        garden.stop(handle, kill=False)
        assert garden.info(handle)["State"] == "stopped"
        assert garden.text_of(handle, "echo still here") == "still here\n"
        assert garden.json("GET", f"/containers/{handle}/properties")["a"] == "b"
        reply = garden.call("GET", f"/containers/{handle}/files?source=/etc/passwd&user=root")
        assert reply.status == 200
        process = garden.run(handle, "sleep", "0.3", id="late")
        assert garden.attach(handle, "late").wait() == 0
        assert process.wait() == 0


@pytest.mark.garden_only("the keys are the Garden protocol's")
def test_PR4_BM4_no_network_metrics_for_health_checks(garden: GardenClientBase, box: str) -> None:
    with garden.container(properties={"network.healthcheck": "true"}) as checked:
        for handle, expected in ((checked, True), (box, False)):
            metrics = garden.json("GET", f"/containers/{handle}/metrics")
            assert (metrics["NetworkStat"] is None) is expected


@pytest.mark.garden_only("gRPC takes limits of 63 bits")
def test_ME5_huge_limit_is_clamped(garden: GardenClientBase) -> None:
    with garden.container(limits={"memory_limits": {"limit_in_bytes": (1 << 64) - 1}}) as handle:
        garden.text_of(handle, "true")


@pytest.mark.garden_only("gRPC states no shares")
def test_CP5_entitlement_grows_with_shares_and_age(garden: GardenClientBase, box: str) -> None:
    assert garden.json("GET", f"/containers/{box}/metrics")["CPUEntitlement"] == 0
    with garden.container(limits={"cpu_limits": {"limit_in_shares": 512}}) as handle:
        first = garden.json("GET", f"/containers/{handle}/metrics")
        time.sleep(0.05)
        second = garden.json("GET", f"/containers/{handle}/metrics")
        assert 0 < first["CPUEntitlement"] < second["CPUEntitlement"]
        ratio = second["CPUEntitlement"] / second["Age"]
        assert ratio == pytest.approx(first["CPUEntitlement"] / first["Age"])


def test_OL5_hierarchies(garden: GardenClientBase, box: str) -> None:
    lines = garden.text_of(box, "cat /proc/self/cgroup").splitlines()
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        assert [line.split(":")[:2] for line in lines] == [["0", ""]]  # v2 has one for all
        return
    found = {name for line in lines for name in line.split(":")[1].split(",")}
    assert {"cpu", "cpuacct", "cpuset", "devices", "memory"} <= found


def test_BI3_sources_that_are_links_or_files(garden: GardenClientBase, place: Path) -> None:
    (place / "real").mkdir()
    (place / "real/file").write_text("content")
    (place / "link").symlink_to(place / "real")
    mounts = [
        {"src_path": str(place / "link"), "dst_path": "/link"},
        {"src_path": str(place / "real/file"), "dst_path": "/one-file"},
    ]
    with garden.container(bind_mounts=mounts) as handle:
        assert garden.text_of(handle, "cat /link/file /one-file") == "contentcontent"


@pytest.mark.garden_only("gRPC has no such field")
def test_BI5_origin_is_ignored(garden: GardenClientBase, place: Path) -> None:
    (place / "file").write_text("of the host")
    with garden.container(bind_mounts=bound(place, origin=1)) as handle:
        assert garden.text_of(handle, "cat /bound/file") == "of the host"


def test_BI6_binds_may_cover_the_image(garden: GardenClientBase, place: Path) -> None:
    (place / "mine").touch()
    mounts = [{"src_path": str(place), "dst_path": "/tmp"}]
    with garden.container(bind_mounts=mounts) as handle:
        assert garden.text_of(handle, "ls /tmp") == "mine\n"
        assert "localhost" in garden.text_of(handle, "cat /etc/hosts")


def test_N20_ports_in_the_create(garden: GardenClientBase) -> None:
    """Through the Garden door as `netin`, over gRPC as port mappings."""
    with garden.container(netin=[{"container_port": 8080}, {"container_port": 9090}]) as handle:
        mapped = garden.info(handle)["MappedPorts"]
        assert [each["ContainerPort"] for each in mapped] == [8080, 9090]
        listener = garden.run(handle, "nc", "-l", "-p", "9090", "-e", "echo", "hello")
        deadline = time.monotonic() + 5
        while ":2382 " not in garden.text_of(handle, "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null; true"):
            assert time.monotonic() < deadline
        with socket.create_connection(("127.0.0.1", mapped[1]["HostPort"]), timeout=5) as connection:
            assert connection.makefile("rb").read() == b"hello\n"
        assert listener.wait() == 0


def test_C3_root_by_a_setuid_program_is_bounded(garden: GardenClientBase) -> None:
    """In a privileged container: it may change owners, and not set the clock (as sudo does it)."""
    with garden.container(privileged=True) as handle:
        garden.text_of(handle, "cp /bin/busybox /bin/busybox.suid; chmod 4755 /bin/busybox.suid")
        bounding = garden.text_of(handle, "grep ^CapBnd /proc/self/status", user="alice").split()[1]
        assert int(bounding, 16) >> 25 & 1 == 0, "CAP_SYS_TIME"
        assert int(bounding, 16) & 1 == 1, "CAP_CHOWN"
