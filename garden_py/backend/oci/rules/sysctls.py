"""Kernel parameters of the container's own namespaces."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Set what the server chose (statement SE6): a new network namespace starts from the kernel's defaults.

    Who must not gain privileges cannot use a setuid `ping`, so everybody but group 0 may ping without any
    (statement SE5). icmp(7), ping_group_range: groups of the container's user namespace.
    """
    found = dict(request.sysctls)
    if request.no_new_privileges:
        found["net.ipv4.ping_group_range"] = "1 65535"
    # A network namespace that is entered has them already, and the host's is not ours to change.
    if found and not request.host_network and "network" not in dict(request.joins):
        config["linux"]["sysctl"] = found
