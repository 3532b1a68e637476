"""The doors of the server: the socket's mode, TCP with mutual TLS, loopback only when said."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import grpc
import pytest
from kit.garden import open_stub
from kit.server import running_server

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import GardenClient, Tls, Unavailable

pytestmark = pytest.mark.root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_unix_socket_is_0660_and_in_the_group_that_was_asked_for(no_trace: None) -> None:
    """Nobody else on the host may ask for containers."""
    with running_server("--socket-group", "nogroup") as server:
        found = Path(server.address.removeprefix("unix:")).stat()
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_gid == 65534
        assert stat.S_IMODE((server.place / "state/journal.db").stat().st_mode) == 0o600
        assert stat.S_IMODE((server.place / "state/containers").stat().st_mode) == 0o700


def test_host_user_outside_the_group_is_refused(no_trace: None) -> None:
    """The kernel refuses the connection."""
    with running_server() as server:
        path = server.address.removeprefix("unix:")
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(path)
                except PermissionError:
                    os._exit(13)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 13


def test_loopback_door_without_tls_when_said(no_trace: None) -> None:
    """For development: only loopback, only with the flag."""
    port = free_port()
    with (
        running_server(
            "--listen", f"127.0.0.1:{port}", "--insecure-loopback", address=f"127.0.0.1:{port}"
        ) as server,
        open_stub(server.address) as stub,
    ):
        assert stub.Ping(pb.PingRequest()).server_version


def openssl(*args: str, cwd: Path) -> None:
    subprocess.run(["openssl", *args], cwd=cwd, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server's and a client's certificate, and a client's of a foreign CA."""
    place = tmp_path_factory.mktemp("keys")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for ca in ("ca", "foreign"):
        openssl(
            "req",
            "-x509",
            *curve,
            "-keyout",
            f"{ca}.key",
            "-out",
            f"{ca}.pem",
            "-subj",
            f"/CN={ca}",
            cwd=place,
        )
    (place / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "foreign")):
        request = [
            "req",
            *curve[:-2],
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        ]
        openssl(*request, cwd=place)
        sign = [
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            f"{ca}.pem",
            "-CAkey",
            f"{ca}.key",
            "-CAcreateserial",
        ]
        openssl(*sign, "-out", f"{name}.pem", "-days", "2", "-extfile", "san", cwd=place)
    return place


def test_tcp_door_takes_only_clients_of_its_ca(no_trace: None, keys: Path) -> None:
    """Mutual TLS: a client without a certificate, or with a stranger's, gets nothing."""
    port = free_port()
    flags = ["--tls-cert", str(keys / "server.pem"), "--tls-key", str(keys / "server.key")]
    flags += ["--tls-client-ca", str(keys / "ca.pem"), "--listen", f"127.0.0.1:{port}"]
    ours = Tls(ca=keys / "ca.pem", cert=keys / "client.pem", key=keys / "client.key")
    strange = Tls(ca=keys / "ca.pem", cert=keys / "stranger.pem", key=keys / "stranger.key")
    address = f"localhost:{port}"
    with running_server(*flags, address="") as server:
        assert server.pid
        with GardenClient(address, tls=ours) as garden:
            assert garden.ping()
        with GardenClient(address, tls=strange) as garden, pytest.raises(Unavailable):
            garden.ping()
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            garden_pb2_grpc.GardenStub(channel).Ping(pb.PingRequest(), timeout=5)
