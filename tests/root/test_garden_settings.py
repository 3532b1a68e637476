"""Settings of the server that Garden's statements name, on real containers through the Garden door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from garden_image import MAKE_SETUID, TRY_SETUID, garden_door_of, garden_server_with
from kit.garden_http import GardenHttp, GardenHttpError
from kit.server import ServerProcess

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
