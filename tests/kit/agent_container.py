"""Runs the agent as PID 1 of a real runc container with its own user namespace."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle

FIRST_UID = 300_000
MOUNTED_AT = "/.garden"
_CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_SETFCAP", "CAP_WAKE_ALARM",
]  # fmt: skip


def make_busybox_rootfs(rootfs: Path) -> None:
    """Busybox and its links, users alice and root; owned by the container's root."""
    (rootfs / "bin").mkdir(parents=True)
    (rootfs / "etc").mkdir()
    (rootfs / "home").mkdir()
    busybox = shutil.which("busybox")
    assert busybox, "apt-get install busybox-static"
    shutil.copy(busybox, rootfs / "bin/busybox")
    for applet in (
        "sh",
        "true",
        "echo",
        "cat",
        "id",
        "ls",
        "ps",
        "sleep",
        "kill",
        "pwd",
        "env",
        "stty",
        "tty",
        "grep",
    ):
        (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nalice:x:1001:1010::/home/alice:/bin/sh\n")
    (rootfs / "etc/group").write_text(
        "root:x:0:\ntty:x:5:\nwheel:x:10:root\nalice:x:1010:\nextra:x:1011:alice\n"
    )
    give_to_container(rootfs)


def give_to_container(rootfs: Path) -> None:
    for path in [rootfs, *rootfs.rglob("*")]:
        os.chown(path, FIRST_UID, FIRST_UID, follow_symlinks=False)


@contextmanager
def running_container(bundle: RuntimeBundle, directory: Path, rootfs: Path, name: str) -> Iterator[Path]:
    """A container whose PID 1 is the agent; yields the agent's socket on the host."""
    runc = ["runc", "--root", str(directory / "runc")]
    path = directory / "agent.sock"
    subprocess.run(["runc", "spec", "--bundle", str(directory)], check=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(_adapt(config, bundle, rootfs)))
    with socket.socket(socket.AF_UNIX) as listener, (directory / "agent.log").open("wb") as log:
        listener.bind(str(path))
        listener.listen(8)
        command = [*runc, "run", "-d", "--preserve-fds", "1", "--bundle", str(directory), name]
        try:
            subprocess.run(
                ["bash", "-c", f'exec 3<&{listener.fileno()}; exec "$@"', "bash", *command],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=60,
                check=True,
            )
            yield path
        finally:
            subprocess.run([*runc, "delete", "--force", name], check=True, timeout=60, capture_output=True)


def _adapt(config: dict[str, Any], bundle: RuntimeBundle, rootfs: Path) -> dict[str, Any]:
    config["process"].update(
        terminal=False,
        args=bundle.argv(MOUNTED_AT),
        env=list(bundle.env),
        cwd="/",
        noNewPrivileges=False,
        rlimits=[],
        capabilities=dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
    )
    config["root"] = {"path": str(rootfs), "readonly": False}
    config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/sys/fs/cgroup"]
    source, options = str(bundle.directory.parent), ["bind", "ro", "nosuid", "nodev"]
    config["mounts"].append({"destination": MOUNTED_AT, "type": "bind", "source": source, "options": options})
    config["linux"]["namespaces"].append({"type": "user"})
    mapping = [{"containerID": 0, "hostID": FIRST_UID, "size": 65536}]
    config["linux"].update(uidMappings=mapping, gidMappings=mapping)
    return config
