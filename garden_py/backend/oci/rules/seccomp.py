"""System calls that an unprivileged container may make."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Filter unprivileged containers; privileged ones run unfiltered."""
    if request.privileged:
        return
    policy = dict(data.seccomp)
    policy["architectures"] = _ARCHITECTURES.get(facts.machine, policy["architectures"])
    config["linux"]["seccomp"] = policy


_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}
