"""Runs the agent as the first process of fresh namespaces on this host's own file system, without runc."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle

_SETUP = (
    "mount --make-rprivate / && mount -t proc proc /proc && "
    'mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts /dev/pts && exec "$@"'
)


@contextmanager
def directory_for_all_users() -> Iterator[Path]:
    """A temporary directory that users other than root can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="garden-agent-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def running_agent(bundle: RuntimeBundle, directory: Path, *prefix: str) -> Iterator[tuple[Path, int]]:
    """An agent that is PID 1 of new pid and mount namespaces; yields its socket and its pid on the host.

    Args:
        bundle: what to run.
        directory: where socket and log go.
        prefix: a command line that executes the rest of its arguments, run inside the namespaces.
    """
    path = directory / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener, (directory / "agent.log").open("wb") as log:
        listener.bind(str(path))
        listener.listen(8)
        command = [
            "unshare", "--pid", "--mount", "--fork", "--kill-child=KILL",
            "bash", "-c", f"exec 3<&{listener.fileno()}; {_SETUP}", "bash",
            *prefix, *bundle.argv(str(bundle.directory.parent)),
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.defpath, **dict(item.split("=", 1) for item in bundle.env)},
        )
    try:
        yield path, process.pid
    finally:
        process.kill()
        process.wait()
