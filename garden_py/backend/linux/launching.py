"""What starting an agent takes, PID 1 and those of sidecars alike: files, a listening socket, a job for a worker."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from garden_py.backend.host.idmap import IdMap
from garden_py.backend.launcher.client import Launcher
from garden_py.backend.linux.isolation import Isolation
from garden_py.backend.linux.site import AGENT_TARGET, Site
from garden_py.backend.linux.sysctls import choose_tcp_sysctls
from garden_py.backend.oci.bundle import build_config
from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.oci.request import BundleRequest
from garden_py.backend.plugin.image import CREATE_STEP
from garden_py.backend.rootfs.mounts import BindSource, MountPlan
from garden_py.backend.runtime.command import AGENT_FILTER_FD
from garden_py.model.device import parse_device_rule
from garden_py.model.errors import FieldViolation, HostFault, InvalidRequest
from garden_py.model.files import BindMount, MountMode, MountOrigin
from garden_py.observe.steps import Step, taken_elsewhere

NAME_FILES = ("hosts", "resolv.conf")


@dataclass(frozen=True, slots=True)
class Launch:
    """One agent to be started.

    Attributes:
        runtime_id: for the OCI runtime.
        directory: its own; bundle and logs are in it.
        layer: directory that its writable layer is in.
        etc: directory with its hosts and resolv.conf.
        host_network: it has no network namespace of its own.
        joins: namespaces of others, by the OCI's names, to the paths they are entered by.
        layers: directories of its image, lowest first.
        image: what to call that in errors.
        field: what the names of the request's fields begin with, for errors.
        fail_points: to be reached in the worker (observe/failpoints.py).
        ready: a root file system that is used as it is, in place of layers.
        first_mounts: of the OCI's runtime-spec, made before all others.
    """

    handle: str
    runtime_id: str
    directory: Path
    layer: Path
    etc: Path
    layers: tuple[Path, ...]
    image: str
    isolation: Isolation
    hostname: str
    cgroup_path: str
    bind_mounts: Sequence[BindMount] = ()
    joins: tuple[tuple[str, str], ...] = ()
    host_network: bool = False
    field: str = "spec."
    fail_points: dict[str, Any] | None = None
    ready: Path | None = None
    first_mounts: tuple[dict[str, Any], ...] = ()


class AgentStarter:
    """How agents are started at one site."""

    def __init__(self, site: Site, launcher: Launcher) -> None:
        self._site = site
        self._launcher = launcher
        self._device_rules = tuple(map(parse_device_rule, site.config.device_cgroup_rule))

    def prepare(self, launch: Launch) -> None:
        """Write what the runtime reads, and the upper layer."""
        plan = self._mounts(launch)
        if launch.ready is None:
            _make_layer(plan, launch.layer)
        config = build_config(self._request(launch, plan), self._site.facts, load_runc_config())
        # Not indented, which is four times as fast: only then it is written in C.
        (launch.directory / "config.json").write_text(json.dumps(config))

    async def start(self, launch: Launch, listener: socket.socket) -> int:
        """Start what was prepared; the agent's pid as the host numbers it."""
        plan = self._mounts(launch)
        directory = launch.directory
        params = {
            "plan": _plan_json(plan),
            "id": launch.runtime_id,
            "bundle": str(directory),
            "runtime": self._site.config.runtime,
            "root": str(self._site.runtime_root),
            "log": str(directory / "runtime.log"),
            "agent_log": str(directory / "agent.log"),
            "fail_points": launch.fail_points or {},
        }
        fds = [listener.fileno(), *([self._site.filter_fd] if self._has_filter(launch) else [])]
        try:
            answer = await self._launcher.run("container.launch", params, fds)
        except HostFault:
            # A worker that was killed in the middle has left its mounts in the launcher's namespace.
            await self._launcher.run("container.release_mounts", {"directory": str(plan.directory)})
            raise
        for name, (began_ns, took_ns) in answer["steps"].items():
            taken_elsewhere(Step(name), began_ns, took_ns)
        return int(answer["pid"])

    def _has_filter(self, launch: Launch) -> bool:
        return not launch.isolation.privileged and self._site.filter_fd >= 0

    def _mounts(self, launch: Launch) -> MountPlan:
        """Root file system, agent, the caller's binds, hosts and resolv.conf, in this order."""
        maps_owners = (
            not launch.isolation.privileged and not launch.isolation.as_reference
        )  # Garden statement BI4
        binds = [BindSource(str(self._site.agent_dir), "agent", read_only=True, hardened=True)]
        binds += [
            BindSource(
                m.source,
                f"bind-{i}",
                m.mode is MountMode.READ_ONLY,
                mapped=maps_owners,
                inside=m.origin is MountOrigin.CONTAINER,
                field=f"{launch.field}bind_mounts[{i}].source",
            )
            for i, m in enumerate(launch.bind_mounts)
        ]
        binds += [BindSource(str(launch.etc / name), name, read_only=False) for name in NAME_FILES]
        id_map = launch.isolation.id_map(self._site.facts.highest_id)
        ready_map = None
        if launch.ready is not None:
            ready_map = map_of_ready(os.stat(launch.ready).st_uid, id_map, self._site.facts.highest_id)
        return MountPlan(
            directory=self._site.mount_dir / launch.runtime_id,
            layers=tuple(map(str, launch.layers)),
            upper=str(launch.layer / "upper"),
            work=str(launch.layer / "work"),
            id_map=id_map,
            binds=tuple(binds),
            image=launch.image,
            ready=str(launch.ready or ""),
            ready_map=ready_map,
        )

    def _request(self, launch: Launch, plan: MountPlan) -> BundleRequest:
        binds = [(str(plan.directory / f"bind-{i}"), m.destination) for i, m in enumerate(launch.bind_mounts)]
        binds += [(str(plan.directory / name), f"/etc/{name}") for name in NAME_FILES]
        return BundleRequest(
            handle=launch.handle,
            hostname=launch.hostname,
            privileged=launch.isolation.privileged,
            id_map=plan.id_map,
            rootfs=str(plan.rootfs),
            cgroup_path=launch.cgroup_path,
            agent_argv=tuple(self._site.bundle.argv(AGENT_TARGET)),
            agent_env=tuple(self._site.bundle.env),
            agent_filter_fd=AGENT_FILTER_FD if self._has_filter(launch) else None,
            agent_source=str(plan.directory / "agent"),
            agent_target=AGENT_TARGET,
            binds=tuple(binds),
            no_new_privileges=launch.isolation.no_new_privileges,
            apparmor_profile=launch.isolation.apparmor,
            sysctls=choose_tcp_sysctls(self._site.config),
            as_reference=launch.isolation.as_reference,
            joins=launch.joins,
            host_network=launch.host_network,
            first_mounts=launch.first_mounts,
            device_rules=self._device_rules if launch.isolation.privileged else (),
        )


def _plan_json(plan: MountPlan) -> dict[str, Any]:
    return {
        **asdict(plan),
        "directory": str(plan.directory),
        "layers": list(plan.layers),
        "binds": [asdict(bind) for bind in plan.binds],
        "id_map": _id_map_json(plan.id_map),
        "ready_map": _id_map_json(plan.ready_map),
    }


def _id_map_json(id_map: IdMap | None) -> list[list[int]] | None:
    return None if id_map is None else [list(each) for each in id_map.ranges]


def map_of_ready(owner: int, id_map: IdMap | None, highest_id: int) -> IdMap | None:
    """What shows the owners of a root file system that an image plugin has made in a container's ids.

    Args:
        owner: of its root directory, which belongs to root in the container.
        id_map: of the container; None for a privileged one.
        highest_id: of the host's user namespace.

    Returns:
        None: they are the container's already.

    Raises:
        HostFault: they are nobody's.
    """
    if id_map is None or owner == id_map.host_id(0):
        return None
    if owner == 0:  # as in the image
        return id_map
    if owner == highest_id:  # as the reference maps them, Garden statement NS2
        return IdMap(((highest_id, id_map.host_id(0), 1), (1, id_map.host_id(1), id_map.size - 1)))
    raise HostFault(
        CREATE_STEP,
        f"the root file system belongs to the host's user {owner}; it is to be 0, or {id_map.host_id(0)}, or "
        f"{highest_id}, as the Garden reference maps root",
    )


def _make_layer(plan: MountPlan, directory: Path) -> None:
    for name in ("upper", "work"):
        (directory / name).mkdir()
    image = os.stat(plan.layers[-1])
    # The root directory that processes see is the upper one: it takes mode and (mapped) owner of the image's.
    os.chmod(directory / "upper", image.st_mode & 0o7777)
    owners = (image.st_uid, image.st_gid)
    os.chown(directory / "upper", *(map(plan.id_map.host_id, owners) if plan.id_map else owners))


def check_bind_sources(mounts: Sequence[BindMount], field: str) -> None:
    """Refuse bind mounts of what is not there.

    Raises:
        InvalidRequest: with one violation per source.
    """
    found = [
        FieldViolation(f"{field}[{i}].source", f"{mount.source} does not exist on the host")
        for i, mount in enumerate(mounts)
        if mount.origin is MountOrigin.HOST and not os.path.exists(mount.source)
    ]
    if found:
        raise InvalidRequest(found)


def listen(path: Path) -> AbstractContextManager[socket.socket]:
    """An agent's listening socket. Only the host can reach it by its path; the agent inherits the descriptor."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise HostFault("agent socket", str(error)) from error
    return listener
