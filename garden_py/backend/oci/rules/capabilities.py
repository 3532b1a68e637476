"""What root in the container may do."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Give PID 1 its sets: inheritable only as the reference does it, never ambient, never more than the host has.

    Inheritable capabilities would survive an exec by a non-root user of a file with matching inheritable
    file capabilities (CVE-2022-29162).

    The agent's own one keeps processes of the container from tracing it; it takes it out of the bounding set before
    anything else runs (agent/syscalls.py, prepare_capabilities). So it does with what installing a filter takes.
    """
    sets = {"bounding", "effective", "permitted"}
    if request.as_reference:
        # Garden statement C, whose table has no room for the agent's own.
        sets.add("inheritable")
        wanted = data.capability_mask("privileged_reference" if request.privileged else "unprivileged")
    else:
        wanted = data.capability_mask("unprivileged") | data.capability_mask("agent")
        wanted = facts.bounding_capabilities if request.privileged else wanted
    if request.agent_filter_fd is not None:
        wanted |= data.capability_mask("agent_filter")
    names = data.capability_names(wanted & facts.bounding_capabilities)
    config["process"]["capabilities"] = dict.fromkeys(sorted(sets), names)
