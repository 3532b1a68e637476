"""The scope of systemd that a server's containers are in with `--cgroup-driver systemd` (docs/decisions/0023).

    garden.slice                  --cgroup-slice
    └─garden-<tag>.scope          a unit of systemd's; its cgroup is delegated to the server
      ├─@holder                   a process that sleeps: a scope ends with its last process
      └─<handle>/…                as layout.py has it

What systemd sets for the unit it puts back at each daemon-reload, but on the scope's own cgroup alone. Everything
below it is the server's, and so no limit of a container is ever systemd's business.

Source: systemd's CGROUP_DELEGATION.md; systemd.scope(5); systemd.resource-control(5), Delegate=.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from garden_py.backend.cgroup.groups import pass_controllers_on, pids_below
from garden_py.backend.cgroup.layout import Hierarchies, remove_tree
from garden_py.model.errors import HostFault

HOLDER: Final = "@holder"  # no container's handle begins like this
_BOOTED: Final = Path("/run/systemd/system")  # sd_booted(3)
_COMMAND_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10  # of workloads, when systemd ends the scope: at shutdown, or because somebody says so
_PATIENCE_S, _TRY_AGAIN_S = 5.0, 0.1
# It joins the holder's group itself, then lets go of the pipe that its failures would be told through.
_HOLD: Final = (
    '[ -d "$1" ] || mkdir "$1" && echo $$ >"$1/cgroup.procs" && exec sleep infinity >/dev/null 2>&1'
)


def find_obstacle(cgroup_version: int) -> str:
    """Why this host's systemd cannot be asked for scopes; empty if it can."""
    if not _BOOTED.is_dir():
        return f"systemd does not run here (there is no {_BOOTED})"
    if cgroup_version != 2:
        return "it needs cgroup v2, and this host's controllers are in cgroup v1"
    if missing := [name for name in ("systemd-run", "systemctl") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} cannot be found"
    return ""


def slice_path(name: str) -> str:
    """Where the cgroup of a slice is: `a-b.slice` is in `a.slice`, and `-.slice` the root. systemd.slice(5)."""
    words = [word for word in name.removesuffix(".slice").split("-") if word]
    return "/".join(f"{'-'.join(words[: count + 1])}.slice" for count in range(len(words)))


class Scope:
    """The scope of one server. Its verbs start processes and wait for systemd: not for the event loop.

    Attributes:
        unit: its name.
        path: of its cgroup, relative to the mount point.
        directory: of its cgroup.
    """

    def __init__(self, hierarchies: Hierarchies, slice_name: str, tag: str) -> None:
        self._hierarchies = hierarchies
        self._slice = slice_name
        self.unit = f"garden-{tag}.scope"
        self.path = "/".join(filter(None, (slice_path(slice_name), self.unit)))
        self.directory = self._at(self.path)
        self._holder = self.directory / HOLDER

    def __repr__(self) -> str:
        return f"Scope({self.path!r})"

    def _at(self, path: str) -> Path:
        return self._hierarchies.mount_points["memory"] / path

    @property
    def is_held(self) -> bool:
        """Whether it stays without containers, too."""
        try:
            return bool((self._holder / "cgroup.procs").read_text())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: removed between open and read
                raise
            return False

    def find(self) -> str:
        """The cgroup that systemd has for the unit, relative to the mount point; empty if it knows no such unit."""
        told = _run("systemctl", "show", "--property", "ControlGroup", "--value", self.unit)
        return told.strip().lstrip("/")

    def containers(self, path: str) -> list[str]:
        """Names of the groups in a scope besides the holder's; none if it is not there."""
        with suppress(FileNotFoundError):
            entries = os.scandir(self._at(path))
            return [entry.name for entry in entries if entry.is_dir() and entry.name != HOLDER]
        return []

    def hold(self) -> None:
        """Make it, or what holds it, unless both are there.

        Raises:
            HostFault: systemd refuses, or does not answer.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while not self.is_held:
            lives_on = self.find() == self.path and self.containers(self.path)
            failure = self._join() if lives_on else self._start()
            # One that has just ended is in the way until systemd has taken note.
            if failure and time.monotonic() > deadline:
                raise HostFault(f"scope {self.unit}", failure)
            if failure:
                time.sleep(_TRY_AGAIN_S)
        pass_controllers_on(self._hierarchies, self.directory)

    def _start(self) -> str:
        """Have systemd make it of a process that holds it; why that failed."""
        if not pids_below(self.directory):
            # Groups of containers that died with an earlier one would keep every process out (EBUSY, cgroups(7)).
            with suppress(OSError):
                remove_tree(self.directory)
        return self._spawn_holder(
            *("systemd-run", "--scope", "--quiet", "--collect", "--unit", self.unit, "--slice", self._slice),
            *("--description", "containers of a garden server"),
            *("--property", "Delegate=yes", "--property", "TasksMax=infinity"),
            *("--property", f"TimeoutStopSec={_STOP_TIMEOUT_S}s", "--"),
        )

    def _join(self) -> str:
        """Put another holder into one that its containers have kept; why that failed."""
        if failure := self._spawn_holder():
            return failure
        if self.find() == self.path:
            return ""
        self._remove_holder()
        return "it has ended meanwhile"

    def _spawn_holder(self, *wrapper: str) -> str:
        # setsid: it outlives this server, and hears of no Ctrl-C. Its pipe ends when it is in place, or has failed.
        said = _run(
            "setsid", "--fork", *wrapper, "sh", "-c", _HOLD, "sh", str(self._holder), says_errors=True
        )
        return "" if self.is_held else said.strip() or "its holder ended without a word"

    def _remove_holder(self) -> None:
        with suppress(FileNotFoundError):
            (self._holder / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + _PATIENCE_S
        while self._holder.exists():
            try:
                remove_tree(self._holder)
            except OSError as error:  # until the last task has really left (cgroups(7))
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_TRY_AGAIN_S)

    def stop(self, path: str | None = None) -> None:
        """Have systemd end it; not there is fine.

        Args:
            path: where it is, by `find`, if not where it should be.

        Raises:
            OSError: EBUSY, there is a container in it.
            HostFault: systemd refuses, or does not answer.
        """
        path = self.path if path is None else path
        if found := self.containers(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), f"{path}/{found[0]}")
        if self._at(path).is_dir():
            _run("systemctl", "stop", self.unit)


def _run(*argv: str, says_errors: bool = False) -> str:
    """What a command writes on stdout; says_errors: its failures as well, in place of its exit status.

    Raises:
        HostFault: it fails, or takes too long.
    """
    step = f"cgroup driver: {argv[0]}"
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if says_errors else subprocess.PIPE,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostFault(step, str(error)) from error
    if done.returncode != 0 and not says_errors:
        raise HostFault(step, done.stderr.strip() or f"exit status {done.returncode}")
    return done.stdout
