"""PID 1 is our agent."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Start the agent instead of anything from the image."""
    filtering = [] if request.agent_filter_fd is None else ["filter", str(request.agent_filter_fd)]
    config["process"]["args"] = [*request.agent_argv, *filtering]
    config["process"]["env"] = list(request.agent_env)
