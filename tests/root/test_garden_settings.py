"""Settings of the server that Garden's statements name, on real containers through the Garden door."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from garden_image import MAKE_SETUID, TRY_SETUID, garden_door_of, garden_server_with
from kit.garden_http import GardenHttp, GardenHttpError
from kit.server import ServerProcess, running_server

from garden_py.backend.host import apparmor
from garden_py.client import ContainerSpec, GardenClient, PermissionDenied

pytestmark = pytest.mark.root
TCP = (
    ("tcp-keepalive-time", "111", "tcp_keepalive_time"),
    ("tcp-keepalive-interval", "22", "tcp_keepalive_intvl"),
    ("tcp-keepalive-probes", "7", "tcp_keepalive_probes"),
    ("tcp-retries1", "4", "tcp_retries1"),
    ("tcp-retries2", "11", "tcp_retries2"),
)


@pytest.fixture(scope="module")
def server(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that allows less than others do, and has its own view of TCP."""
    flags = ("--disable-privileged-containers", "--no-new-privileges")
    flags += tuple(f"--{setting}={value}" for setting, value, _ in TCP)
    with garden_server_with(tmp_path_factory.mktemp("garden"), *flags) as server:
        yield server


@pytest.fixture(scope="module")
def garden(server: ServerProcess) -> GardenHttp:
    return GardenHttp(garden_door_of(server))


def test_L6_privileged_containers_are_disabled(garden: GardenHttp, server: ServerProcess) -> None:
    """In the reference's words at its door, and with a reason of its own over gRPC."""
    with pytest.raises(GardenHttpError, match="privileged container creation is disabled"):
        garden.create(privileged=True, handle="box")
    with GardenClient(server.address) as client, pytest.raises(PermissionDenied) as caught:
        client.create(ContainerSpec(handle="box", privileged=True))
    assert caught.value.code == "PRIVILEGED_DISABLED"
    with garden.container(handle="box"):
        assert garden.list() == ["box"]


def test_SE5_nothing_gains_privileges(garden: GardenHttp) -> None:
    """PID 1 and all that it starts, terminals and copies included; the agent and its filter work as ever."""
    with garden.container() as handle:
        for pid in ("1", "self"):
            lines = garden.text_of(handle, f"grep -E '^(NoNewPrivs|Seccomp):' /proc/{pid}/status").split()
            assert lines == ["NoNewPrivs:", "1", "Seccomp:", "2"]
        garden.text_of(handle, MAKE_SETUID)
        assert b"must be suid" in garden.sh(handle, TRY_SETUID, user="alice")[2]
        assert garden.text_of(handle, "cat /proc/sys/net/ipv4/ping_group_range").split() == ["1", "65535"]


def test_SE6_tcp_parameters(garden: GardenHttp) -> None:
    """As set; what is not set is the host's (tests/unit/test_sysctls.py)."""
    with garden.container() as handle:
        found = [garden.text_of(handle, f"cat /proc/sys/net/ipv4/{name}").strip() for _, _, name in TCP]
    assert found == [value for _, value, _ in TCP]


@pytest.mark.skipif(not apparmor.find_obstacle(), reason="this host has AppArmor")
def test_SE4_server_refuses_a_profile_that_nothing_enforces(tmp_path: Path) -> None:
    """It does not start, and says which setting is why."""
    argv = [sys.executable, "-m", "garden_py", "server", "--apparmor", "some-profile"]
    argv += ["--state-dir", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"garden server: --apparmor: {apparmor.find_obstacle()}" in done.stderr


PROFILE = """\
profile {name} flags=(attach_disconnected, mediate_deleted) {{
  capability,
  file,
  network,
  signal,
  unix,
  deny /etc/forbidden rw,
}}
"""


@pytest.mark.skipif(bool(apparmor.find_obstacle()), reason="this host has no AppArmor")
def test_SE4_processes_are_confined(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """PID 1 and all that it starts, in unprivileged containers; a create while the profile is not loaded fails."""
    place, name = tmp_path_factory.mktemp("garden"), "garden-test-profile"

    def parser(option: str) -> None:
        text = PROFILE.format(name=name)
        subprocess.run(["apparmor_parser", option], input=text, text=True, timeout=60, check=True)

    with garden_server_with(place, "--apparmor", name) as server:
        garden = GardenHttp(garden_door_of(server))
        with pytest.raises(
            GardenHttpError, match=f"'{name}', the server's setting --apparmor, is not loaded"
        ):
            garden.create(handle="box")
        parser("--replace")
        try:
            with garden.container(handle="box"), garden.container(handle="strong", privileged=True):
                for pid in ("1", "self"):
                    assert garden.text_of("box", f"cat /proc/{pid}/attr/current").split()[0] == name
                assert garden.text_of("box", "cat /proc/self/attr/current", user="alice").split()[0] == name
                assert garden.sh("box", "touch /etc/allowed && touch /etc/forbidden")[0] != 0
                assert "unconfined" in garden.text_of("strong", "cat /proc/self/attr/current")
        finally:
            parser("--remove")


def test_O_SR5_flags_of_the_reference(no_trace: None, tmp_path: Path) -> None:
    """Its names for both doors, and a start that leaves nothing of what was there, crashed or not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        debug = probe.getsockname()
    flags = [
        "--bind-socket",
        f"{tmp_path}/garden.sock",
        "--default-grace-time",
        "5m",
        "--read-header-timeout",
        "9s",
    ]
    flags += [
        "--debug-bind-ip",
        debug[0],
        "--debug-bind-port",
        str(debug[1]),
        "--destroy-containers-on-startup",
    ]
    garden = GardenHttp(f"unix:{tmp_path}/garden.sock")
    with running_server(*flags) as server:
        assert GardenHttp(f"127.0.0.1:{debug[1]}").json("GET", "/debug/vars")["memstats"]["Alloc"] > 0
        for end in (server.kill, server.stop):
            garden.create(handle="left")
            process = garden.run("left", "sleep", "1000")
            end()
            process.wait_for_sides()
            process.leave()
            server.start()
            assert garden.list("?garden.state=all") == []
            with garden.container(handle="left"):
                assert garden.text_of("left", "echo new") == "new\n"


def test_DV3_rules_for_devices(no_trace: None, tmp_path: Path) -> None:
    """A privileged container may open what the server's rules say; an unprivileged one cannot even make it."""
    make = "mknod /tmp/kmsg c 1 11"
    with garden_server_with(tmp_path, "--device-cgroup-rule", "c 1:11 r") as server:
        garden = GardenHttp(garden_door_of(server))
        with garden.container(privileged=True) as handle:
            garden.text_of(handle, f"{make} && exec 3</tmp/kmsg")
            for script in ("exec 3>/tmp/kmsg", "mknod /tmp/mem c 1 1 && exec 3</tmp/mem"):
                status, _, err = garden.sh(handle, script)
                assert status != 0
                assert b"not permitted" in err
        with garden.container() as handle:
            assert garden.sh(handle, make)[0] != 0
