"""Bind mounts: the agent first, then what the caller asked for, then hosts and resolv.conf."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Append the bind mounts; their flags are on the sources already (backend/rootfs/mounts.py).

    A remount by the runtime inside the user namespace could not keep flags that the source locks there
    (mount_namespaces(7)), so "bind" is the only option given.
    """
    for source, destination in ((request.agent_source, request.agent_target), *request.binds):
        config["mounts"].append(
            {"destination": destination, "type": "bind", "source": source, "options": ["bind"]}
        )
