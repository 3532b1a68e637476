"""Routes of somebody else into the addresses of containers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv6Network

import pytest
from kit.server import ServerProcess, running_server

from garden_py.client import GardenClient

pytestmark = pytest.mark.root

PREFIX_V6 = "fd67:6472:f0e1::/64"


@contextlib.contextmanager
def route(destination: str) -> Iterator[None]:
    """A route on a link that is not the server's."""
    version = "-6" if ":" in destination else "-4"
    subprocess.run(["ip", version, "route", "add", destination, "dev", "lo"], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["ip", version, "route", "delete", destination, "dev", "lo"], check=True, timeout=20)


def doctor(server: ServerProcess) -> str:
    state_dir, pool = server.flags[1], server.flags[5]
    argv = [sys.executable, "-m", "garden_py", "doctor", "--state-dir", state_dir, "--network-pool", pool]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.mark.parametrize("version", [4, 6])
def test_containers_come_back_beside_a_foreign_route(no_trace: None, version: int) -> None:
    """Nobody else can get them back; what the route covers is given to no new one."""
    with running_server("--network-pool-v6", PREFIX_V6) as server, GardenClient(server.address) as garden:
        boxes = [garden.create(), garden.create()]
        first = boxes[0].info()
        pool = first.container_ip.rpartition(".")[0]
        number = int.from_bytes(bytes(map(int, f"{pool}.4".split("."))), "big")
        covered = f"{pool}.4/31" if version == 4 else f"{IPv6Network(PREFIX_V6)[number]}/127"
        assert doctor(server).count("address pool") == 1
        assert f"{pool}.0/24 is free" in doctor(server), "its own routes are no foreign ones"
        server.kill()
        with route(covered):
            server.start()
            assert [box.info().container_ip for box in boxes] == [f"{pool}.2", f"{pool}.3"]
            boxes += [garden.create(), garden.create()]
            assert [box.info().container_ip for box in boxes[2:]] == [f"{pool}.6", f"{pool}.7"]
            assert f'"found": "route {covered} of link lo"' in server.log()
            if version == 4:
                assert f"overlaps with {covered} on lo" in doctor(server)
            for box in boxes:
                box.destroy()


def test_first_server_beside_a_foreign_route_is_refused(no_trace: None) -> None:
    """Another pool costs nothing then."""
    with running_server() as server:
        server.stop()
        covered = server.flags[5].replace(".0/24", ".8/29")
        with route(covered), pytest.raises(AssertionError, match="choose another with --network-pool"):
            server.start()
        server.start()
