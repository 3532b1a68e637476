"""Where the container is accounted. Limits are written by backend/cgroup, not by the runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts

if TYPE_CHECKING:
    from garden_py.backend.oci.bundle import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Place the container in its cgroup."""
    config["linux"]["cgroupsPath"] = request.cgroup_path
