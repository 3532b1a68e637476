"""Resource limits that PID 1 starts with and processes inherit unless they state their own."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Let the container open as many files as the host allows: the agent holds three for each process.

    Those that the launcher has lifted for itself are the server's again.
    """
    wanted = [("nofile", facts.nofile_hard, facts.nofile_hard), *facts.rlimits]
    config["process"]["rlimits"] = [
        {"type": f"RLIMIT_{name.upper()}", "hard": hard, "soft": soft} for name, soft, hard in wanted
    ]
