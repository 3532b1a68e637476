"""What all of one server's containers share: places, facts, pools. Built once by `open_site`."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from garden_py.backend.cgroup.layout import (
    BAD,
    GOOD,
    ContainerCgroup,
    Hierarchies,
    parent_of,
    probe_hierarchies,
    throttled_parent_of,
)
from garden_py.backend.depot import Depot
from garden_py.backend.disk.store import LoopStore
from garden_py.backend.disk.volumes import Volumes, find_driver
from garden_py.backend.host import apparmor
from garden_py.backend.linux.block_io import BlockIo
from garden_py.backend.linux.cgroup_driver import CgroupDriver, check_cgroup_driver
from garden_py.backend.linux.container import ContainerFacts
from garden_py.backend.linux.isolation import Isolation, choose_isolation
from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.oci.facts import HostFacts, probe_host_facts
from garden_py.backend.oci.rules.seccomp import seccomp_policy
from garden_py.backend.oci.seccomp_filter import NoFilter, compile_filter
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle
from garden_py.config import UIDS_PER_CONTAINER, Config
from garden_py.model.errors import InvalidField, PoolExhausted
from garden_py.model.limits import SWAP_UNLIMITED

log = structlog.get_logger()
AGENT_TARGET = "/dev/.garden"
NO_SLOT = -1  # instead of a range of the uid pool
_CAP_SYS_ADMIN = 21  # linux/capability.h
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class UidPool:
    """Ranges of 65536 host ids, the lowest free first."""

    def __init__(self, start: int, size: int) -> None:
        self._start = start
        self.size = size
        self._taken: set[int] = set()
        self._next = 0

    def allocate(self) -> int:
        """Take a range; its slot number.

        Raises:
            PoolExhausted: none is free.
        """
        while self._next in self._taken:
            self._next += 1
        if self._next >= self.size:
            raise PoolExhausted("uid ranges", self.size, "--uid-pool-size")
        slot = self._next
        self.reserve(slot)
        return slot

    def reserve(self, slot: int) -> None:
        """Mark a slot from the journal as taken; NO_SLOT is none."""
        if slot >= 0:
            self._taken.add(slot)

    def release(self, slot: int) -> None:
        """Give a slot back; twice is fine."""
        self._taken.discard(slot)
        if 0 <= slot < self._next:
            self._next = slot

    @property
    def taken(self) -> frozenset[int]:
        """The slots that are taken, now."""
        return frozenset(self._taken)

    def base(self, slot: int) -> int:
        """First host id of a slot."""
        return self._start + slot * UIDS_PER_CONTAINER


@dataclass(frozen=True, slots=True)
class Site:
    """The places and facts that creating and destroying need.

    Attributes:
        store_root: where images and volumes are.
        mount_dir: where the launcher mounts; exists only in its mount namespace.
        agent_dir: runtime bundles of the agent, by version.
        filter_fd: of a sealed memfd with the program that filters unprivileged containers' system calls; -1: this host
            cannot compile it, and the runtime does for each container.
        block_io: limits on transfers with the device that store_root is on.
        driver: of the cgroup that containers are made in.
    """

    config: Config
    facts: HostFacts
    hierarchies: Hierarchies
    depot: Depot
    volumes: Volumes
    store_root: Path
    uids: UidPool
    bundle: RuntimeBundle
    mount_dir: Path
    agent_dir: Path
    filter_fd: int
    block_io: BlockIo
    driver: CgroupDriver

    @property
    def runtime_root(self) -> Path:
        """The runtime's own state directory."""
        return self.config.run_dir / Path(self.config.runtime).name

    def isolation(self, *, privileged: bool, slot: int) -> Isolation:
        """How a container with this slot of the uid pool is walled off now."""
        base = None if slot == NO_SLOT else self.uids.base(slot)
        return choose_isolation(self.config, privileged=privileged, id_base=base)

    def cgroup(self, handle: str, facts: ContainerFacts | None) -> ContainerCgroup:
        """The cgroups of a container.

        Args:
            handle: of the container.
            facts: None: it has none yet, so there are no cgroups either.
        """
        if facts is not None and facts.scope:
            return ContainerCgroup(self.hierarchies, f"{facts.scope}/{handle}")
        if facts is not None and facts.throttleable:
            parent = throttled_parent_of(self.config.tag)
            return ContainerCgroup(self.hierarchies, f"{parent}/{GOOD}/{handle}", f"{parent}/{BAD}/{handle}")
        return ContainerCgroup(self.hierarchies, f"{parent_of(self.config.tag)}/{handle}")


def make_mount_dir(config: Config) -> Path:
    """Where the launcher will mount."""
    mount_dir = config.run_dir / "mnt"
    config.run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    mount_dir.mkdir(mode=0o711, exist_ok=True)
    return mount_dir


def open_store(config: Config) -> LoopStore | None:
    """The store of the server's own, mounted, if there is to be one. Before the launcher starts: it must see the mount.

    Raises:
        InvalidField, NotSupported, HostFault.
    """
    store = LoopStore(config.state_dir)
    if not config.store_size and not store.exists:
        return None
    containers = config.state_dir / "containers"
    if not store.exists and containers.is_dir() and any(containers.iterdir()):
        raise InvalidField("store_size", "cannot be turned on while there are containers: destroy them first")
    store.open(config.store_size)
    return store


def open_site(config: Config, store: LoopStore | None = None) -> Site:
    """Probe the host and make the server's directories.

    Raises:
        InvalidField: there is no such runtime, and no container either that could do without.
        NotSupported, HostFault.
    """
    _allow_many_files()
    depot = Depot(config.state_dir, config.run_dir, store.root if store else None)
    _look_for_runtime(config.runtime, needed=not (depot.containers.is_dir() and depot.handles()))
    root = store.root if store else config.state_dir
    config.state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    facts = probe_host_facts()
    mount_dir, agent_dir = make_mount_dir(config), config.state_dir / "agent"
    config.state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    agent_dir.mkdir(mode=0o755, exist_ok=True)
    check_cgroup_driver(config, facts.cgroup_version)
    hierarchies = probe_hierarchies(facts.cgroup_version)
    if config.disable_swap_limit:
        hierarchies = replace(hierarchies, unstated_swap=SWAP_UNLIMITED)
    driver = CgroupDriver(config, hierarchies)
    return Site(
        config=config,
        facts=facts,
        hierarchies=hierarchies,
        block_io=BlockIo(hierarchies, driver.parent, root, config),
        driver=driver,
        depot=depot,
        volumes=Volumes(root, find_driver(root), depot.throw_away),
        store_root=root,
        uids=UidPool(config.uid_pool_start, config.uid_pool_size),
        bundle=build_runtime_bundle(agent_dir),
        mount_dir=mount_dir,
        agent_dir=agent_dir,
        filter_fd=_open_filter(facts),
    )


def check_apparmor(profile: str) -> None:
    """Refuse a profile where no process can be confined: containers would run without it.

    Raises:
        InvalidField: says why. Whether the profile is loaded is asked at each create; it may come later.
    """
    if profile and (obstacle := apparmor.find_obstacle()):
        raise InvalidField("apparmor", f"{obstacle}, so no container can be confined by profile {profile!r}")


def _open_filter(facts: HostFacts) -> int:
    if not facts.bounding_capabilities >> _CAP_SYS_ADMIN & 1:
        log.info(
            "seccomp.by_runtime", reason="the server lacks CAP_SYS_ADMIN, so no agent can install a filter"
        )
        return -1
    try:
        program = compile_filter(seccomp_policy(facts, load_runc_config()), without_xdp=True)
    except NoFilter as error:
        log.info("seccomp.by_runtime", reason=str(error))
        return -1
    fd = os.memfd_create("garden-seccomp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, program)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def _look_for_runtime(program: str, *, needed: bool) -> None:
    """A mistyped setting is refused; a package that is just being replaced keeps nobody from their containers."""
    if shutil.which(program) is None:
        if needed:
            raise InvalidField("runtime", f"{program!r} is not installed, or no program")
        log.error("runtime.missing", runtime=program, cost="no container can be made")


def _allow_many_files() -> None:
    """Raise the soft limit of open files to the hard one: each process takes up to three here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def disk_of(path: Path) -> tuple[int, int]:
    """(size, free) of the file system that holds path, in bytes. statvfs(3)."""
    found = os.statvfs(path)
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
