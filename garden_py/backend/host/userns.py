"""User namespaces that exist only to describe a mapping of ids, as id-mapped mounts take it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from garden_py.backend.host import syscalls
from garden_py.backend.host.idmap import IdMap


def make_userns(id_map: IdMap) -> int:
    """A user namespace with this mapping, held by nothing but the returned descriptor.

    Raises:
        OSError: the kernel makes none, or refuses the mapping.

    Source:
        user_namespaces(7).
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            theirs.send(b"1")
            theirs.recv(1)  # until we are killed, or the end of the one who forked us
        finally:
            os._exit(1)
    theirs.close()
    try:
        if ours.recv(1) != b"1":
            raise OSError(
                "user namespaces are not available; see user.max_user_namespaces and `garden doctor`"
            )
        for kind in ("uid", "gid"):
            Path(f"/proc/{pid}/{kind}_map").write_text(id_map.text())
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
