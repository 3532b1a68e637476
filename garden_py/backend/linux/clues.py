"""Where to look when something is wrong with a container of this backend.

Most of it is files of the kernel's, some of which hang when a process does (proc_pid_cmdline(5) takes its memory's
lock): each clue is read in a thread that may be left behind. Nothing here changes anything.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import ContainerCgroup
from garden_py.backend.host.pids import read_start_time
from garden_py.backend.host.threads import in_spare_thread
from garden_py.backend.launcher.client import Launcher
from garden_py.backend.linux.container import ContainerFacts, LinuxContainer
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.rule_listing import pick_elements
from garden_py.backend.linux.site import Site
from garden_py.backend.net.plan import host_link_name
from garden_py.model.errors import HostFault
from garden_py.model.redact import without_secrets
from garden_py.service.ports import Clue

_TAIL_BYTES = 256 << 10
_FILE_MAX_BYTES = 64 << 10
_PROCESSES_MAX = 500
_NET_FILES = ("dev", "route", "tcp", "tcp6", "udp", "udp6", "sockstat", "snmp", "netstat")
# Large, and of no use to people.
_DULL_CGROUP_FILES = frozenset({"memory.kmem.slabinfo", "cgroup.event_control", "tasks"})


class LinuxClues:
    """Clues about the containers of one site."""

    def __init__(self, site: Site, network: LinuxNetwork, launcher: Launcher) -> None:
        self._site = site
        self._network = network
        self._launcher = launcher

    def about(
        self, handle: str, facts: ContainerFacts | None, container: LinuxContainer | None
    ) -> list[Clue]:
        """What there is to look at.

        Args:
            handle: of the container.
            facts: as recorded; None: nothing has been made yet.
            container: None: it is being made or destroyed.
        """
        directory = self._site.depot.directory(handle)
        cgroup = self._site.cgroup(handle, facts)
        clues = [
            _file("oci/config.json", partial(_read_config, directory / "config.json")),
            _file("oci/runtime.log", partial(_read_tail, directory / "runtime.log")),
            _file("agent/agent.log", partial(_read_tail, directory / "agent.log")),
            _file("files.txt", partial(_list_files, directory)),
            _file("cgroup.txt", partial(_read_cgroups, cgroup)),
            _file(
                "processes/status.txt",
                partial(_read_processes, cgroup, ("status", "wchan", "stack", "cgroup")),
            ),
            _file("processes/commands.txt", partial(_read_processes, cgroup, ("cmdline",))),
        ]
        if container is not None:
            clues.append(Clue("agent/agent.json", partial(_describe_agents, container)))
        if facts is not None:
            clues += self._clues_of_facts(facts)
        return clues

    def _clues_of_facts(self, facts: ContainerFacts) -> Iterable[Clue]:
        yield _file("mountinfo.txt", partial(_read_of_pid_1, facts, ("mountinfo",)))
        yield _file(
            "network/namespace.txt", partial(_read_of_pid_1, facts, tuple(f"net/{f}" for f in _NET_FILES))
        )
        address = facts.lease.address
        if address is None:  # no link, so no rules: its namespace is empty, or the host's
            return
        link = host_link_name(self._network.host, address)
        yield _file("network/link.txt", partial(_read_link, Path("/sys/class/net", link)))
        yield Clue("rules/container.nft", partial(self._list_container_rules, facts))
        yield Clue("rules/host.nft", partial(self._list_host_rules, {str(address), link}))

    async def _list_container_rules(self, facts: ContainerFacts) -> bytes:
        fd = await in_spare_thread(partial(_open_namespace, facts))
        try:
            return (await self._list_rules("list ruleset", [fd])).encode()
        finally:
            os.close(fd)

    async def _list_host_rules(self, words: set[str]) -> bytes:
        text = await self._list_rules(f"list table inet {self._network.host.table}", [])
        return pick_elements(text, words).encode()

    async def _list_rules(self, command: str, fds: list[int]) -> str:
        answer = await self._launcher.run("container.list_rules", {"command": command}, fds)
        return str(answer["text"])


def _file(name: str, read: Callable[[], bytes]) -> Clue:
    return Clue(name, partial(in_spare_thread, read))


async def _describe_agents(container: LinuxContainer) -> bytes:
    agents: dict[str, Any] = {"pid_1": container.describe_agent()}
    for process_id, sidecar in container.sidecars.items():
        agents[f"sidecar {process_id}"] = sidecar.describe_agent()
    agents["broken_because"] = container.broken_because
    agents["processes"] = sorted(container.processes)
    agents["starting"] = sorted(container.spawning)
    return json.dumps(agents, indent=2).encode() + b"\n"


# --- reading; in a thread


def _read_config(path: Path) -> bytes:
    return json.dumps(without_secrets(json.loads(path.read_bytes())), indent=2).encode() + b"\n"


def _read_tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read(_TAIL_BYTES)


def _read_start(path: Path) -> bytes:
    """The first bytes of a small file, or why there are none: one of many must not spoil the others."""
    try:
        with path.open("rb") as file:
            return file.read(_FILE_MAX_BYTES)
    except OSError as error:
        return f"({error.strerror})\n".encode()


def _join(files: Iterable[tuple[str, bytes]]) -> bytes:
    """As tail(1) shows several files; NUL, which separates arguments, as a blank."""
    parts = [
        f"==> {name} <==\n".encode() + data.replace(b"\0", b" ").rstrip() + b"\n\n" for name, data in files
    ]
    return b"".join(parts)


def _list_files(directory: Path) -> bytes:
    """Names, modes, owners and sizes; without what processes have written."""
    lines = []
    for parent, names, files in os.walk(directory):
        names[:] = sorted(name for name in names if name not in ("upper", "work"))
        for name in (".", *sorted(files)):
            found = os.lstat(Path(parent, name))
            path = os.path.relpath(Path(parent, name), directory)
            lines.append(
                f"{stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid} {found.st_size} {path}\n"
            )
    if not lines:
        raise FileNotFoundError(2, "there is no such directory", str(directory))
    return "".join(lines).encode(errors="replace")


def _read_cgroups(cgroup: ContainerCgroup) -> bytes:
    text = _join(
        (str(path), _read_start(path))
        for top in cgroup.all_directories()
        for parent, _, names in os.walk(top)
        for path in (Path(parent, name) for name in sorted(names))
        if path.name not in _DULL_CGROUP_FILES and _is_readable(path)
    )
    if not text:
        raise FileNotFoundError(2, "there is no such cgroup", cgroup.path)
    return text


def _is_readable(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o444)
    except FileNotFoundError:  # removed while we looked
        return False


def _read_processes(cgroup: ContainerCgroup, names: tuple[str, ...]) -> bytes:
    pids = groups.pids_in(cgroup)
    if not pids:
        raise HostFault("processes", "none is left")
    shown = sorted(pids)[:_PROCESSES_MAX]
    head = f"{len(pids)} processes, as the host numbers them\n\n".encode()
    return head + _join(_files_of(pid, names) for pid in shown)


def _files_of(pid: int, names: tuple[str, ...]) -> tuple[str, bytes]:
    parts = [_read_start(Path(f"/proc/{pid}", name)).rstrip() for name in names]
    return str(pid), b"\n".join(parts)


def _read_of_pid_1(facts: ContainerFacts, names: tuple[str, ...]) -> bytes:
    place = Path(f"/proc/{_pid_1(facts)}")
    return _join((name, _read_start(place / name)) for name in names)


def _pid_1(facts: ContainerFacts) -> int:
    """PID 1's number, which is not another process's by now. HostFault: it has ended, or was never started."""
    identity = facts.identity
    if identity is None or read_start_time(identity.pid) != identity.start:
        raise HostFault("PID 1", "it has ended, or was never started")
    return identity.pid


def _open_namespace(facts: ContainerFacts) -> int:
    return os.open(f"/proc/{_pid_1(facts)}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _read_link(place: Path) -> bytes:
    if not place.exists():
        raise FileNotFoundError(2, "there is no such link", place.name)
    return _join(_link_files(place))


def _link_files(place: Path) -> Iterator[tuple[str, bytes]]:
    for path in (
        place / "operstate",
        place / "mtu",
        place / "ifalias",
        *sorted((place / "statistics").iterdir()),
    ):
        yield path.name, _read_start(path)
