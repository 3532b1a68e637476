"""Where the container is accounted. Limits are written by backend/cgroup, not by the runtime."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Place the container in its cgroup."""
    config["linux"]["cgroupsPath"] = request.cgroup_path
