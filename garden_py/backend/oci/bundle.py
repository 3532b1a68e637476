"""From a request to an OCI `config.json`: every rule in turn changes one aspect of the base configuration. Pure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest
from garden_py.backend.oci.rules import (
    agent,
    apparmor,
    capabilities,
    cgroup,
    devices,
    identity,
    mounts,
    privileges,
    rlimits,
    seccomp,
    sysctls,
)

Config = dict[str, Any]


Rule = Callable[[Config, BundleRequest, HostFacts, RuncConfigData], None]

RULES: Sequence[Rule] = (
    identity.apply,
    mounts.apply,
    cgroup.apply,
    devices.apply,
    capabilities.apply,
    privileges.apply,
    apparmor.apply,
    sysctls.apply,
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
