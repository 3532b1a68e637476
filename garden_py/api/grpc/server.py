"""The gRPC server: its address, its credentials, its services."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from garden_py.api._pb import garden_pb2, garden_pb2_grpc
from garden_py.api.activation import RelayProcess
from garden_py.api.address import check_listen
from garden_py.api.grpc.drain import Drain
from garden_py.api.grpc.interceptor import ErrorInterceptor
from garden_py.api.grpc.servicer import GardenServicer
from garden_py.api.unix_socket import socket_file
from garden_py.config import Config
from garden_py.model.errors import HostFault, InvalidField
from garden_py.service.core import Core

# How long a stop lets calls go on: those that follow a process or events, and those that end by themselves.
_LASTING_GRACE_S = 0.2
_STOP_GRACE_S = 2.0
_REFUSING_S = 0.1
_CANCEL_GRACE_S = 0.2
_PRIVATE_SOCKET = "door.sock"


class GrpcDoor:
    """One listening gRPC server over a Core.

    Args:
        inherited: a listening unix socket to serve instead of binding one; grpc cannot take it over, so a relay does.
    """

    def __init__(self, core: Core, config: Config, inherited: socket.socket | None = None) -> None:
        self._config = config
        self._inherited = inherited
        self._relay: RelayProcess | None = None
        self._bound_path: Path | None = None
        self._drain = Drain()
        most = config.max_message_bytes
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(core.recovery.wait_for, self._drain, core.metrics)],
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", most),
                ("grpc.so_reuseport", 0),
                # Clients keep quiet streams alive through proxies; core's default answers "too many pings".
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        garden_pb2_grpc.add_GardenServicer_to_server(GardenServicer(core), self._server)  # type: ignore[no-untyped-call]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        name = garden_pb2.DESCRIPTOR.services_by_name["Garden"].full_name
        names = (name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._names = ("", name)

    async def start(self) -> str:
        """Bind and serve; the address.

        Raises:
            InvalidField: the address or its credentials are not acceptable.
            HostFault: it cannot be bound.
        """
        address = self._config.listen_address
        if self._inherited is not None:
            address = f"unix:{self._inherited.getsockname()}"
            private = self._config.run_dir / _PRIVATE_SOCKET
            self._bind_unix(private, mode=0o600, group="")
            self._relay = RelayProcess(self._inherited, private)
        elif address.startswith("unix:"):
            mode = int(self._config.socket_mode, 8)
            self._bind_unix(Path(address.removeprefix("unix:")), mode=mode, group=self._config.socket_group)
        else:
            self._bind_tcp(address)
        await self._server.start()
        if self._relay is not None:
            self._relay.start()
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return address

    def _bind_unix(self, path: Path, *, mode: int, group: str) -> None:
        try:
            with socket_file(path, mode=mode, group=group, fields=("listen", "socket_group")):
                self._server.add_insecure_port(f"unix:{path}")
        except (RuntimeError, OSError) as error:
            raise HostFault("listen", f"cannot bind {path}") from error
        self._bound_path = path

    def _bind_tcp(self, address: str) -> None:
        check_listen(self._config)
        try:
            if self._config.tls_cert:
                bound = self._server.add_secure_port(address, _credentials(self._config))
            else:
                bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise HostFault("listen", f"cannot bind {address}") from error
        if not bound:
            raise HostFault("listen", f"cannot bind {address}")

    async def stop(self) -> None:
        """Take no new calls, give running ones a moment, then end them with a status that says why."""
        if self._relay is not None:
            self._relay.stop_accepting()
            idle: asyncio.Future[Any] = asyncio.ensure_future(
                self._relay.wait_for_end(_LASTING_GRACE_S + _STOP_GRACE_S)
            )
        else:
            # grpc cancels the calls that have come in and were not looked at yet when it is told to stop; so those are
            # answered first: "shutting down". Behind a relay there are none: clients have been told to go elsewhere.
            self._drain.refuse()
            idle = asyncio.ensure_future(self._drain.wait_until_idle(and_then_s=_REFUSING_S))
        await self._health.enter_graceful_shutdown()
        await asyncio.wait([idle], timeout=_LASTING_GRACE_S)
        self._drain.end_lasting()
        await asyncio.wait([idle], timeout=_STOP_GRACE_S)
        self._drain.end_all()
        await self._server.stop(_CANCEL_GRACE_S)
        idle.cancel()
        await asyncio.wait([idle])
        if self._relay is not None:
            await self._relay.close()
        if self._bound_path is not None:
            self._bound_path.unlink(missing_ok=True)


def _credentials(config: Config) -> grpc.ServerCredentials:
    assert config.tls_cert is not None
    assert config.tls_key is not None
    assert config.tls_client_ca is not None
    contents: dict[str, bytes] = {}
    for field in ("tls_cert", "tls_key", "tls_client_ca"):
        path: Path = getattr(config, field)
        try:
            contents[field] = path.read_bytes()
        except OSError as error:
            raise InvalidField(field, f"{path}: {error.strerror}") from error
    return grpc.ssl_server_credentials(
        [(contents["tls_key"], contents["tls_cert"])],
        root_certificates=contents["tls_client_ca"],
        require_client_auth=True,
    )
