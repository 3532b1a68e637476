"""What the rules are told about a container."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from garden_py.backend.host.idmap import IdMap
from garden_py.model.device import DeviceRule


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What the rules need to know of a container.

    Attributes:
        id_map: of its user namespace; None: privileged, no user namespace.
        rootfs: where the launcher has mounted its root file system.
        cgroup_path: absolute within the hierarchies.
        agent_argv: command line of PID 1.
        agent_filter_fd: descriptor of the program with which the agent filters system calls; None: the runtime filters.
        agent_source: host directory with the agent's runtime bundles.
        agent_target: where that directory appears in the container.
        binds: (host path, path in the container), already read-only where asked for.
        no_new_privileges: nothing in it may gain privileges, e.g. by a setuid program.
        apparmor_profile: that confines its processes; empty: none.
        sysctls: (name, value) of parameters of its namespaces.
        as_reference: less strict, as the Garden reference is: inheritable capabilities, the host's cgroup namespace.
        host_network: it has no network namespace of its own, but the host's.
        device_rules: of devices that may be opened beyond those of every container.
        first_mounts: of the runtime-spec, made before all others.
        joins: (type, path) of namespaces that are not made but entered; a uts namespace among them has its name.
    """

    handle: str
    hostname: str
    privileged: bool
    id_map: IdMap | None
    rootfs: str
    cgroup_path: str
    agent_argv: tuple[str, ...]
    agent_env: tuple[str, ...]
    agent_filter_fd: int | None
    agent_source: str
    agent_target: str
    binds: tuple[tuple[str, str], ...] = ()
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    sysctls: tuple[tuple[str, str], ...] = ()
    as_reference: bool = False
    joins: tuple[tuple[str, str], ...] = ()
    host_network: bool = False
    device_rules: tuple[DeviceRule, ...] = ()
    first_mounts: tuple[dict[str, Any], ...] = ()
