"""From a request to an OCI `config.json`: every rule in turn changes one aspect of the base configuration. Pure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.rules import agent, capabilities, cgroup, identity, mounts, rlimits, seccomp

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What the rules need to know of a container.

    Attributes:
        uid_base: first host id of its user namespace; None: privileged, no user namespace.
        uid_count: ids in that range.
        rootfs: where the launcher has mounted its root file system.
        cgroup_path: absolute within the hierarchies.
        agent_argv: command line of PID 1.
        agent_source: host directory with the agent's runtime bundles.
        agent_target: where that directory appears in the container.
        binds: (host path, path in the container), already read-only where asked for.
    """

    handle: str
    hostname: str
    privileged: bool
    uid_base: int | None
    uid_count: int
    rootfs: str
    cgroup_path: str
    agent_argv: tuple[str, ...]
    agent_env: tuple[str, ...]
    agent_source: str
    agent_target: str
    binds: tuple[tuple[str, str], ...] = ()


Rule = Callable[[Config, BundleRequest, HostFacts, RuncConfigData], None]

RULES: Sequence[Rule] = (
    identity.apply,
    mounts.apply,
    cgroup.apply,
    capabilities.apply,
    rlimits.apply,
    seccomp.apply,
    agent.apply,
)


def build_config(request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> Config:
    """The OCI configuration of one container.

    Source: OCI runtime-spec 1.0.2, config.md and config-linux.md.
    """
    config = copy.deepcopy(data.privileged if request.privileged else data.unprivileged)
    for rule in RULES:
        rule(config, request, facts, data)
    return config
