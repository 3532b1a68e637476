"""What an image plugin asks for, before all else; then bind mounts: the agent, the caller's, hosts and resolv.conf."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Put in a plugin's mounts in front (Garden statement MP1), and append the bind mounts.

    The flags of bind mounts are on the sources already (backend/rootfs/mounts.py).

    A remount by the runtime inside the user namespace could not keep flags that the source locks there
    (mount_namespaces(7)), so "bind" is the only option given.
    """
    config["mounts"][:0] = request.first_mounts
    for source, destination in ((request.agent_source, request.agent_target), *request.binds):
        config["mounts"].append(
            {"destination": destination, "type": "bind", "source": source, "options": ["bind"]}
        )
