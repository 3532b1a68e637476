"""Starts a server as systemd's socket activation does: the listening socket is somebody else's and outlives it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.server import ServerProcess, running_server

# LISTEN_PID is the server's own pid, so it can only be set between fork and exec: sd_listen_fds(3).
_EXEC = 'exec 3<&"$0"; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=grpc; exec "$@"'


@dataclass
class ActivatedServer(ServerProcess):
    """A server that is given a listening socket as descriptor 3."""

    listener: socket.socket = field(default_factory=socket.socket)

    def spawn(self, argv: list[str], **settings: Any) -> subprocess.Popen[str]:
        fd = self.listener.fileno()
        return subprocess.Popen(["bash", "-c", _EXEC, str(fd), *argv], pass_fds=[fd], **settings)


@contextlib.contextmanager
def running_activated_server(place: Path) -> Iterator[ActivatedServer]:
    """A server behind a socket in `place`; the socket listens for as long as the context is open."""
    path = place / "garden.socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(256)

        def make(where: Path, flags: list[str], _: str) -> ActivatedServer:
            return ActivatedServer(where, flags, f"unix:{path}", listener=listener)

        with running_server(make=make) as server:
            assert isinstance(server, ActivatedServer)
            yield server
