"""Who the container is: hostname, root file system, id mappings."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Name the container and map its ids."""
    config["hostname"] = request.hostname
    config["root"]["path"] = request.rootfs
    if request.uid_base is not None:
        mapping = [{"containerID": 0, "hostID": request.uid_base, "size": request.uid_count}]
        config["linux"]["uidMappings"] = mapping
        config["linux"]["gidMappings"] = mapping
