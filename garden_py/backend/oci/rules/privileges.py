"""Whether a program that is executed may have more privileges than whoever executes it."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Set no_new_privs for PID 1, from which every process inherits it and none can lose it. prctl(2)."""
    config["process"]["noNewPrivileges"] = request.no_new_privileges
