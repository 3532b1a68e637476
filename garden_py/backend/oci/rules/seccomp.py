"""System calls that an unprivileged container may make."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Filter unprivileged containers, unless their agent does; privileged ones run unfiltered."""
    if not request.privileged and request.agent_filter_fd is None:
        config["linux"]["seccomp"] = seccomp_policy(facts, data)


def seccomp_policy(facts: HostFacts, data: RuncConfigData) -> dict[str, Any]:
    """The `linux.seccomp` of an unprivileged container on this host."""
    policy = dict(data.seccomp)
    policy["architectures"] = _ARCHITECTURES.get(facts.machine, policy["architectures"])
    return policy


_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
