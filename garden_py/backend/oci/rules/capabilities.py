"""What root in the container may do."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Give PID 1 its sets: never inheritable, never ambient, never more than the host has.

    Inheritable capabilities would survive an exec by a non-root user of a file with matching inheritable
    file capabilities (CVE-2022-29162).

    The agent's own one keeps processes of the container from tracing it; it takes it out of the bounding set before
    anything else runs (agent/syscalls.py, prepare_capabilities). So it does with what installing a filter takes.
    """
    unprivileged = data.capability_mask("unprivileged") | data.capability_mask("agent")
    if request.agent_filter_fd is not None:
        unprivileged |= data.capability_mask("agent_filter")
    wanted = facts.bounding_capabilities if request.privileged else unprivileged
    names = data.capability_names(wanted & facts.bounding_capabilities)
    config["process"]["capabilities"] = {"bounding": names, "effective": names, "permitted": names}
