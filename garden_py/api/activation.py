"""A listening socket given by systemd, or by anybody who does as systemd does, and the relay that serves it.

Source: sd_listen_fds(3): descriptors from 3 on, $LISTEN_FDS of them, meant for $LISTEN_PID, named by $LISTEN_FDNAMES.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path

import structlog

from garden_py.api import relay
from garden_py.model.errors import InvalidField

log = structlog.get_logger()
_FIRST_FD = 3
_NAME = "grpc"
_END_TIMEOUT_S = 1.0


def take_inherited_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The listening unix socket that this process was started with; None if there is none.

    The variables are removed: they are not for processes that are started from here.

    Raises:
        InvalidField: what was given is not one listening unix stream socket (among several: named `grpc`).
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit() or count == "0":
        return None
    fds = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    named = [fd for fd, name in zip(fds, names, strict=False) if name == _NAME]
    chosen = named if len(fds) > 1 else fds
    if len(chosen) != 1:
        raise InvalidField(
            "listen", f"{count} sockets were inherited; name the one to use {_NAME} (FileDescriptorName=)"
        )
    try:
        inherited = socket.socket(fileno=chosen[0])
        listens = inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise InvalidField("listen", f"the inherited descriptor {chosen[0]}: {error.strerror}") from error
    if not listens or (inherited.family, inherited.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        raise InvalidField("listen", "the inherited socket is not a listening unix stream socket")
    return inherited


class RelayProcess:
    """Keeps a relay running between an inherited listener and the server's own socket.

    Args:
        listener: stays open here, for the next relay should one die.
        path: of the server's own socket, which must listen already.
    """

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self._listener = listener
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start it, and again whenever it ends by itself."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        argv = [sys.executable, "-I", "-S", relay.__file__]
        argv += [str(self._listener.fileno()), str(theirs.fileno()), str(self._path)]
        with theirs:
            self._process = (
                subprocess.Popen(  # by vfork, safe beside grpc's threads (see the launcher's client)
                    argv,
                    pass_fds=[self._listener.fileno(), theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._ended)

    def _ended(self) -> None:
        assert self._control is not None
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        status = self._process.wait()  # it has closed its end of the control by ending
        log.error("relay.restarted", pid=self._process.pid, status=status)
        self.start()

    def stop_accepting(self) -> None:
        """Leave new connections and new calls to the next server; calls under way go on."""
        if self._control is None:
            return
        asyncio.get_running_loop().remove_reader(self._control)
        try:
            self._control.send(b"stop")
        except OSError as error:
            log.warning("relay.stop_failed", error=str(error))

    async def wait_for_end(self, timeout_s: float) -> bool:
        """Wait until every connection has ended after `stop_accepting`; False after timeout_s seconds."""
        if self._process is None:
            return True
        try:
            await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    async def close(self) -> None:
        """Wait a moment for the last bytes of ended connections, then let it go; it ends by itself."""
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        if not await self.wait_for_end(_END_TIMEOUT_S):
            log.info("relay.still_flushing", pid=self._process.pid if self._process else None)
        self._process = None
        self._listener.close()
