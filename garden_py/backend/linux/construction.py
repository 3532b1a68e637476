"""Making a container. `build` reads like a table of contents; each step is recorded before it is taken."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from garden_py.backend.cgroup import groups
from garden_py.backend.host import apparmor
from garden_py.backend.host.pids import read_start_time
from garden_py.backend.launcher.client import Launcher
from garden_py.backend.linux.container import ContainerFacts, LinuxContainer
from garden_py.backend.linux.network import LinuxNetwork
from garden_py.backend.linux.site import AGENT_TARGET, Site
from garden_py.backend.linux.sysctls import choose_tcp_sysctls
from garden_py.backend.oci.bundle import build_config
from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.oci.request import BundleRequest
from garden_py.backend.rootfs.mounts import BindSource, MountPlan
from garden_py.backend.rootfs.names import build_hosts, build_resolv_conf
from garden_py.backend.runtime.command import AGENT_FILTER_FD
from garden_py.config import UIDS_PER_CONTAINER
from garden_py.model.errors import (
    FieldViolation,
    HostFault,
    ImageNotFound,
    InvalidRequest,
    ProfileNotLoaded,
)
from garden_py.model.handle import hostname_for
from garden_py.model.netrule import DefaultAction, EgressPolicy
from garden_py.model.spec import ContainerSpec, MountMode, image_directory
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point
from garden_py.service.ports import BackendEvents

Record = Callable[[dict[str, Any]], None]


class Construction:
    """How containers are made at one site."""

    def __init__(self, site: Site, launcher: Launcher, network: LinuxNetwork, default_image: Path) -> None:
        self._site = site
        self._launcher = launcher
        self._network = network
        self._default_image = default_image

    def lease(self, spec: ContainerSpec) -> ContainerFacts:
        """Check what the spec points at on the host, then take what the container needs from the pools.

        Raises:
            InvalidRequest, PoolExhausted, PortInUse, ProfileNotLoaded: nothing was taken.
        """
        profile = self._site.config.apparmor
        if profile and not spec.privileged and apparmor.is_known_missing(profile):
            raise ProfileNotLoaded(profile)
        self._image(spec)
        self._site.depot.refuse_foreign(spec.handle)
        _check_bind_sources(spec)
        lease = self._network.lease(spec.port_mappings)
        try:
            slot = -1 if spec.privileged else self._site.uids.allocate()
        except BaseException:
            self._network.release(lease)
            raise
        return ContainerFacts(secrets.token_hex(8), spec.privileged, lease, slot)

    async def build(
        self, spec: ContainerSpec, facts: ContainerFacts, record: Record, events: BackendEvents
    ) -> LinuxContainer:
        """Make the container that facts were leased for.

        Whatever was made when a step fails is found by `demolition` from the facts alone, which were recorded.
        """
        site = self._site
        directory = site.depot.claim(spec.handle)
        container = LinuxContainer(spec.handle, facts, site.cgroup(spec.handle), directory, events)
        plan = self._plan_mounts(spec, facts, directory)
        self._write_directory(spec, facts, directory, plan)
        failpoints.reach(Point.CREATE_DIRECTORY)
        with _listen(site.depot.socket(spec.handle)) as listener:
            failpoints.reach(Point.CREATE_LISTEN)
            fds = [listener.fileno(), *([site.filter_fd] if self._has_filter(spec) else [])]
            facts.pid = await self._launch(facts, directory, plan, fds)
        facts.pid_start = read_start_time(facts.pid) or 0
        record(facts.to_json())
        failpoints.reach(Point.CREATE_PID)
        container.connect(site.depot.socket(spec.handle), patience_s=site.config.agent_patience_s)
        groups.furnish(container.cgroup, facts.pid, spec.limits)
        container.watch(os.pidfd_open(facts.pid))
        failpoints.reach(Point.CREATE_LIMIT)
        async with asyncio.TaskGroup() as steps:
            steps.create_task(self._greet(container))
            steps.create_task(self._connect(spec, facts))
        return container

    async def _greet(self, container: LinuxContainer) -> None:
        await container.greet(timeout_s=self._site.config.create_timeout_s)
        failpoints.reach(Point.CREATE_GREET)

    async def _connect(self, spec: ContainerSpec, facts: ContainerFacts) -> None:
        policy = spec.egress or EgressPolicy(default_action=DefaultAction(self._site.config.default_egress))
        await self._network.attach(spec.handle, facts.pid, facts.lease, policy, privileged=spec.privileged)
        failpoints.reach(Point.CREATE_CONNECT)

    def _image(self, spec: ContainerSpec) -> Path:
        image = Path(image_directory(spec.image)) if spec.image else self._default_image
        if not image.exists():
            raise ImageNotFound("spec.image", f"{image} does not exist")
        if not image.is_dir():
            raise ImageNotFound("spec.image", f"{image} is not a directory")
        return image

    def _plan_mounts(self, spec: ContainerSpec, facts: ContainerFacts, directory: Path) -> MountPlan:
        """Root file system, agent, the caller's binds, hosts and resolv.conf, in this order."""
        etc = directory / "etc"
        binds = [BindSource(str(self._site.agent_dir), "agent", read_only=True, hardened=True)]
        binds += [
            BindSource(m.source, f"bind-{i}", m.mode is MountMode.READ_ONLY, mapped=not spec.privileged)
            for i, m in enumerate(spec.bind_mounts)
        ]
        binds += [BindSource(str(etc / name), name, read_only=False) for name in ("hosts", "resolv.conf")]
        return MountPlan(
            directory=self._site.mount_dir / facts.runtime_id,
            image=str(self._image(spec)),
            upper=str(directory / "upper"),
            work=str(directory / "work"),
            uid_base=None if facts.uid_slot < 0 else self._site.uids.base(facts.uid_slot),
            uid_count=UIDS_PER_CONTAINER,
            binds=tuple(binds),
        )

    def _write_directory(
        self, spec: ContainerSpec, facts: ContainerFacts, directory: Path, plan: MountPlan
    ) -> None:
        owner = plan.uid_base or 0
        hostname = spec.hostname or hostname_for(spec.handle)
        image_facts = os.stat(plan.image)
        for name in ("upper", "work"):
            (directory / name).mkdir()
        # The root directory that processes see is the upper one: it takes mode and (mapped) owner of the image's.
        os.chmod(directory / "upper", image_facts.st_mode & 0o7777)
        ids = (image_facts.st_uid, image_facts.st_gid)
        os.chown(
            directory / "upper", *(owner + number if number < UIDS_PER_CONTAINER else owner for number in ids)
        )
        etc = directory / "etc"
        etc.mkdir()
        gateway = str(self._network.host.gateway)
        host_resolv = Path("/etc/resolv.conf")
        contents = {
            "hosts": build_hosts(str(facts.lease.address), hostname),
            "resolv.conf": build_resolv_conf(
                host_resolv.read_text() if host_resolv.exists() else "", self._site.config.dns_server, gateway
            ),
        }
        for name, content in contents.items():
            (etc / name).write_text(content)
            (etc / name).chmod(0o644)
            os.chown(etc / name, owner, owner)
        request = self._bundle_request(spec, plan, hostname)
        config = build_config(request, self._site.facts, load_runc_config())
        # Not indented, which is four times as fast: only then it is written in C.
        (directory / "config.json").write_text(json.dumps(config))

    def _bundle_request(self, spec: ContainerSpec, plan: MountPlan, hostname: str) -> BundleRequest:
        binds = [(str(plan.directory / f"bind-{i}"), m.destination) for i, m in enumerate(spec.bind_mounts)]
        binds += [(str(plan.directory / name), f"/etc/{name}") for name in ("hosts", "resolv.conf")]
        return BundleRequest(
            handle=spec.handle,
            hostname=hostname,
            privileged=spec.privileged,
            uid_base=plan.uid_base,
            uid_count=plan.uid_count,
            rootfs=str(plan.rootfs),
            cgroup_path=self._site.cgroup(spec.handle).runtime_path,
            agent_argv=tuple(self._site.bundle.argv(AGENT_TARGET)),
            agent_env=tuple(self._site.bundle.env),
            agent_filter_fd=AGENT_FILTER_FD if self._has_filter(spec) else None,
            agent_source=str(plan.directory / "agent"),
            agent_target=AGENT_TARGET,
            binds=tuple(binds),
            no_new_privileges=self._site.config.no_new_privileges and not spec.privileged,
            apparmor_profile="" if spec.privileged else self._site.config.apparmor,
            sysctls=choose_tcp_sysctls(self._site.config),
        )

    def _has_filter(self, spec: ContainerSpec) -> bool:
        return not spec.privileged and self._site.filter_fd >= 0

    async def _launch(self, facts: ContainerFacts, directory: Path, plan: MountPlan, fds: list[int]) -> int:
        params = {
            "plan": _plan_json(plan),
            "id": facts.runtime_id,
            "bundle": str(directory),
            "runtime": self._site.config.runtime,
            "root": str(self._site.runtime_root),
            "log": str(directory / "runtime.log"),
            "agent_log": str(directory / "agent.log"),
            "fail_points": failpoints.hand_over(Point.CREATE_MOUNT, Point.CREATE_RUN),
        }
        try:
            answer = await self._launcher.run("container.launch", params, fds)
        except HostFault:
            # A worker that was killed in the middle has left its mounts in the launcher's namespace.
            await self._launcher.run("container.release_mounts", {"directory": str(plan.directory)})
            raise
        return int(answer["pid"])


def _plan_json(plan: MountPlan) -> dict[str, Any]:
    return {**asdict(plan), "directory": str(plan.directory), "binds": [asdict(bind) for bind in plan.binds]}


def _check_bind_sources(spec: ContainerSpec) -> None:
    found = [
        FieldViolation(f"spec.bind_mounts[{i}].source", f"{mount.source} does not exist on the host")
        for i, mount in enumerate(spec.bind_mounts)
        if not os.path.exists(mount.source)
    ]
    if found:
        raise InvalidRequest(found)


def _listen(path: Path) -> socket.socket:
    """The agent's listening socket. Only the host can reach it by its path; the agent inherits the descriptor."""
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
