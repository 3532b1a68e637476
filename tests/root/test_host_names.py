"""Names in containers on a host that asks only itself for names."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kit.garden import code_of, text_of
from kit.server import ServerProcess, running_server

from garden_py.client import (
    Container,
    ContainerSpec,
    Destination,
    EgressAction,
    EgressProtocol,
    GardenClient,
    NetworkMode,
)

pytestmark = pytest.mark.root

STUB = "# managed by man:systemd-resolved(8)\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n"


class _WithNames(ServerProcess):
    """A server that sees other files with DNS servers than the host's, in a mount namespace of its own."""

    def __init__(self, files: dict[Path, Path], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._binds = " && ".join(f"mount --bind {ours} {theirs}" for theirs, ours in files.items())

    def spawn(self, argv: list[str], **settings: Any) -> subprocess.Popen[str]:
        wrapped = ["unshare", "--mount", "sh", "-c", f'{self._binds} && exec "$@"', "sh", *argv]
        return subprocess.Popen(wrapped, **settings)


@contextlib.contextmanager
def server_with(text: str, place: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server on a host with this resolv.conf."""
    (place / "resolv.conf").write_text(text)
    files = {Path("/etc/resolv.conf"): place / "resolv.conf"}
    with running_server(*flags, make=partial(_WithNames, files)) as server:
        yield server


def asks(box: Container, gateway: str, patience_s: float = 20) -> bool:
    """Whether a datagram to port 53 of the gateway comes in there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind((gateway, 53))
        resolver.settimeout(patience_s)
        box.start(["nslookup", "name.test", gateway])
        with contextlib.suppress(TimeoutError):
            return b"test" in resolver.recv(512)
    return False


def test_host_with_a_stub_sends_containers_to_the_gateway(no_trace: None, tmp_path: Path) -> None:
    """Statement N31, and it may be asked there, if only on port 53; that nobody listens there is in the log."""
    with server_with(STUB, tmp_path) as server, GardenClient(server.address) as garden:
        with garden.create() as box:
            gateway = box.info().host_ip
            expected = f"nameserver {gateway}\noptions edns0 trust-ad\nsearch .\n"
            assert text_of(box, "cat /etc/resolv.conf") == expected
            assert asks(box, gateway)
            found = [
                box.explain_egress(Destination(kind, gateway, port)).action
                for kind, port in (
                    (EgressProtocol.UDP, 53),
                    (EgressProtocol.TCP, 53),
                    (EgressProtocol.TCP, 54),
                )
            ]
            assert found == [EgressAction.ALLOW, EgressAction.ALLOW, EgressAction.DENY]
        assert '"event": "network.no_resolver"' in server.log()
        assert f"DNSStubListenerExtra={gateway}" in server.log()


def test_gateway_is_open_for_names_only_where_it_is_asked(no_trace: None, tmp_path: Path) -> None:
    """Neither where others are asked, nor where the server was told whom to ask; and the host may change its mind."""
    other = "nameserver 192.0.2.53\n"
    with server_with(other, tmp_path) as server, GardenClient(server.address) as garden:
        with garden.create() as box:
            gateway = box.info().host_ip
            assert not asks(box, gateway, 2)
            assert (
                box.explain_egress(Destination(EgressProtocol.UDP, gateway, 53)).action is EgressAction.DENY
            )
            (tmp_path / "resolv.conf").write_text(STUB)
            with garden.create() as later:
                assert asks(later, gateway)
                assert (
                    later.explain_egress(Destination(EgressProtocol.UDP, gateway, 53)).action
                    is EgressAction.ALLOW
                )
        assert "network.no_resolver" not in server.log()
    with (
        server_with(STUB, tmp_path, "--dns-server", "192.0.2.53") as server,
        GardenClient(server.address) as garden,
    ):
        with garden.create() as box:
            assert text_of(box, "cat /etc/resolv.conf") == other
            assert not asks(box, box.info().host_ip, 2)
        assert "network.no_resolver" not in server.log()


@pytest.mark.parametrize("mode", NetworkMode)
def test_every_container_finds_itself_by_name(no_trace: None, mode: NetworkMode) -> None:
    """Statement H2, whatever its network is; the host's own file stays as it is."""
    before = Path("/etc/hosts").read_bytes()
    with running_server() as server, GardenClient(server.address) as garden:
        spec = ContainerSpec(handle="myself", network_mode=mode, privileged=mode is NetworkMode.HOST)
        with garden.create(spec) as box:
            assert code_of(box, "ping -c 1 -w 5 $(hostname)") == 0
            hosts = text_of(box, "cat /etc/hosts")
            assert hosts.splitlines()[-1] == f"{box.info().container_ip or '127.0.0.1'} myself"
            if mode is NetworkMode.HOST:
                assert hosts.encode().startswith(before)
    assert Path("/etc/hosts").read_bytes() == before
