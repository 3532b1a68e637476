"""The AppArmor profile of a container."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Confine PID 1; what it starts inherits the profile, unless the profile itself says otherwise."""
    if request.apparmor_profile:
        config["process"]["apparmorProfile"] = request.apparmor_profile
