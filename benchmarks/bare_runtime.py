"""Containers made by `runc` or `crun` alone, of the same bundle as the server's: the peer of create, run and destroy.

The configuration is the very config.json that the server wrote for a container of its own, with as little changed
as makes it run elsewhere: the root file system is a plain copy of the image owned by the container's root (the
server's is mounted in its launcher's private mount namespace only), bind sources are the plain files, and the cgroup
has another name. Namespaces, mounts, capabilities and the agent as PID 1 stay. The seccomp policy is the runtime's to
compile, as in everybody else's bundles; under the server, the agent installs what was compiled once.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch, running_stopwatch

from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.oci.facts import probe_host_facts
from garden_py.backend.oci.rules.seccomp import seccomp_policy

CGROUP = f"garden-bench-{os.getpid()}"
_BUSY_TIMEOUT_S = 5.0
_numbers = itertools.count()

# crun refuses a hybrid host whose v2 hierarchy holds a controller ("cgroups in hybrid mode not supported"). The
# server's launcher hides that hierarchy from it in a private mount namespace, so the peer gets the same.
_WITHOUT_HYBRID = (
    "unshare", "--mount", "bash", "-c",
    'if mountpoint -q /sys/fs/cgroup/unified; then umount -l /sys/fs/cgroup/unified; fi; exec "$@"', "bash",
)  # fmt: skip


def prepare_bundle(bundle: Path, *, server_config: Path, image: Path, agents: Path) -> None:
    """Make a bundle that any OCI runtime can run, from one of the server's.

    Args:
        bundle: directory to make.
        server_config: config.json of a container of the server.
        image: root file system to copy.
        agents: the server's directory of agent bundles.
    """
    config = json.loads(server_config.read_text())
    uid = config["linux"]["uidMappings"][0]["hostID"]
    bundle.mkdir()
    _copy_owned(image, bundle / "rootfs", uid)
    for name, content in (("hosts", "127.0.0.1 localhost\n"), ("resolv.conf", "")):
        (bundle / name).write_text(content)
    config["root"]["path"] = str(bundle / "rootfs")
    sources = {
        "/dev/.garden": agents,
        "/etc/hosts": bundle / "hosts",
        "/etc/resolv.conf": bundle / "resolv.conf",
    }
    for mount in config["mounts"]:
        if mount["type"] == "bind":
            mount["source"] = str(sources[mount["destination"]])
    _let_runtime_filter(config)
    _write_config(bundle, config)


def _let_runtime_filter(config: dict[str, Any]) -> None:
    process = config["process"]
    if process["args"][-2] == "filter":
        del process["args"][-2:]
        for names in process["capabilities"].values():
            names.remove("CAP_SYS_ADMIN")
        config["linux"]["seccomp"] = seccomp_policy(probe_host_facts(), load_runc_config())


def _copy_owned(image: Path, target: Path, uid: int) -> None:
    shutil.copytree(image, target, symlinks=True)
    for path in (target, *target.rglob("*")):
        mode = path.lstat().st_mode
        os.chown(path, uid, uid, follow_symlinks=False)
        if not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode))  # chown(2) clears setuid bits


def _write_config(bundle: Path, config: dict[str, Any]) -> None:
    (bundle / "config.json").write_text(json.dumps(config, indent=1))


@dataclass
class BareRuntime:
    """One runtime with a state directory and bundles of its own."""

    program: str
    place: Path
    bundle: Path
    stopwatch: Stopwatch

    def run_argv(self, container_id: str) -> list[str]:
        """Start a container in a cgroup of its own; a bundle directory each, since the config names the cgroup."""
        directory = self.place / container_id
        directory.mkdir()
        config = json.loads((self.bundle / "config.json").read_text())
        config["linux"]["cgroupsPath"] = f"/{CGROUP}/{container_id}"
        _write_config(directory, config)
        return [
            *self._head(),
            "run",
            "--detach",
            "--preserve-fds",
            "1",
            "--bundle",
            str(directory),
            container_id,
        ]

    def exec_argv(self, container_id: str, *command: str) -> list[str]:
        """Run a process in a container to its end."""
        return [*self._head(), "exec", container_id, *command]

    def delete_argv(self, container_id: str) -> list[str]:
        """Kill and remove a container."""
        return [*self._head(), "delete", "--force", container_id]

    def _head(self) -> list[str]:
        return [self.program, "--root", str(self.place / "root")]

    def new_id(self) -> str:
        """A name no other container has."""
        return f"bench-{os.getpid()}-{next(_numbers)}"

    def run_ms(self, container_id: str) -> float:
        """Start a container; how long the command took."""
        return self._time(self.run_argv(container_id), listener=str(self.place / "agent.sock"))["ms"]

    def run_until_hello_ms(self, container_id: str) -> float:
        """Start a container; how long until its agent answered hello, counted from the command's start."""
        argv = self.run_argv(container_id)
        return self._time(argv, listener=str(self.place / "agent.sock"), hello=True)["hello_ms"]

    def exec_ms(self, container_id: str, *command: str) -> float:
        """Run a process; how long the command took."""
        return self._time(self.exec_argv(container_id, *command))["ms"]

    def delete_ms(self, container_id: str) -> float:
        """Remove a container; how long the command took."""
        return self._time(self.delete_argv(container_id))["ms"]

    def cycles_ms(self, count: int, in_flight: int) -> float:
        """Start a container, run `true`, delete it, count times, some of them at the same time."""
        ids = [self.new_id() for _ in range(count)]
        cycles = [[self.run_argv(i), self.exec_argv(i, "/bin/true"), self.delete_argv(i)] for i in ids]
        listener = str(self.place / "agent.sock")
        answer = self.stopwatch.ask(
            op="cycles", cycles=cycles, in_flight=in_flight, log=self._log, listener=listener
        )
        return float(answer["ms"])

    def _time(self, argv: list[str], **more: Any) -> dict[str, float]:
        return self.stopwatch.ask(op="time", argv=argv, log=self._log, **more)

    @property
    def _log(self) -> str:
        return str(self.place / "log")

    def delete_all(self) -> None:
        """Remove whatever a failed or interrupted run has left."""
        self.stopwatch.finish()
        root = self.place / "root"
        for directory in sorted(root.iterdir()) if root.exists() else ():
            self.delete_ms(directory.name)


@contextmanager
def bare_runtime(program: str, place: Path, bundle: Path) -> Iterator[BareRuntime]:
    """A runtime, in a mount namespace of its own if it is crun; at the end its containers are gone."""
    home = place / f"bare-{program}"
    home.mkdir()
    with running_stopwatch(*(_WITHOUT_HYBRID if program == "crun" else ())) as stopwatch:
        runtime = BareRuntime(program, home, bundle, stopwatch)
        try:
            yield runtime
        finally:
            runtime.delete_all()


def remove_cgroups() -> None:
    """The runtimes remove their containers' cgroups, not the one above them.

    rmdir answers EBUSY until the last task below has really left, cgroups(7).
    """
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    for parent in cgroups():
        while True:
            try:
                parent.rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def cgroups() -> list[Path]:
    """This run's cgroup in every hierarchy: v1 has one each, v2 one in all."""
    root = Path("/sys/fs/cgroup")
    return [*root.glob(f"*/{CGROUP}"), *root.glob(CGROUP)]
