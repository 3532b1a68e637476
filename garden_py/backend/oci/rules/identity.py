"""Who the container is: namespaces, hostname, root file system, id mappings."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Name the container and map its ids.

    A user namespace that is entered is described all the same: runc before 1.2 asks for it, and later ones compare.
    """
    paths = dict(request.joins)
    for namespace in config["linux"]["namespaces"]:
        if (path := paths.get(namespace["type"])) is not None:
            namespace["path"] = path
    if "uts" not in paths:
        config["hostname"] = request.hostname
    config["root"]["path"] = request.rootfs
    if request.as_reference:  # Garden statement NS1
        namespaces = config["linux"]["namespaces"]
        config["linux"]["namespaces"] = [each for each in namespaces if each["type"] != "cgroup"]
    if request.host_network:
        namespaces = config["linux"]["namespaces"]
        config["linux"]["namespaces"] = [each for each in namespaces if each["type"] != "network"]
    if request.id_map is not None:
        mapping = [
            {"containerID": first, "hostID": host, "size": count}
            for first, host, count in request.id_map.ranges
        ]
        config["linux"]["uidMappings"] = mapping
        config["linux"]["gidMappings"] = mapping
