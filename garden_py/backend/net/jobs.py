"""The network jobs a launcher worker can do: wire values in, `apply` called, wire values out."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from garden_py.backend.net.apply import HostNetwork
from garden_py.backend.net.host_firewall import Access, HostPolicy, PortMapping, Reach
from garden_py.backend.net.messages import Attachment, Bandwidth
from garden_py.backend.net.plan import HostPlan, LinkPlan


class NetBench:
    """The HostNetwork of a worker: its sockets and library stay open between jobs."""

    def __init__(self) -> None:
        self._networks: dict[HostPlan, HostNetwork] = {}

    def network(self, params: dict[str, Any]) -> HostNetwork:
        """The network that the job's `host` plan describes."""
        plan = HostPlan.from_json(params["host"])
        if plan not in self._networks:
            self._networks[plan] = HostNetwork(plan)
        return self._networks[plan]

    def close_rested(self) -> bool:
        """See HostNetwork."""
        still = [network.close_rested() for network in self._networks.values()]
        return any(still)


def _namespaces(fds: list[int]) -> tuple[int, int | None]:
    """Descriptors of a job: the network namespace, then the user namespace unless privileged."""
    return fds[0], fds[1] if len(fds) > 1 else None


def ensure_host(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Make or repair what all containers share; at the start of a server."""
    tolerated = [ip_network(text) for text in params["tolerated"]]
    return net.ensure_host(_policy(params), params["elements"], tolerated=tolerated).to_json()


def restore_host(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Repair it while containers come and go."""
    net.restore_host(_policy(params), params["elements"])
    return {}


def _policy(params: dict[str, Any]) -> HostPolicy:
    servers = tuple(ip_address(text) for text in params["dns_servers"])
    return HostPolicy(
        host_access=Access.ALLOW if params["host_access"] else Access.DENY,
        reach=Reach(params["reach"]),
        subnets=tuple(IPv4Network(text) for text in params["subnets"]),
        dns_servers=servers,
    )


def remove_host(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Remove it; nothing may be attached any more."""
    net.remove_host()
    return {}


def forget_pool(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Give up an IPv6 pool that the server had."""
    net.forget_pool(IPv6Network(params["pool_v6"]))
    return {}


def attach(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Connect a container, then map its ports."""
    netns_fd, userns_fd = _namespaces(fds)
    net.attach_container(Attachment.from_json(params["attachment"]), netns_fd, userns_fd)
    if params["bandwidth"] is not None:
        link = LinkPlan.from_json(params["attachment"]["link"])
        net.set_bandwidth(link, Bandwidth.from_json(params["bandwidth"]), netns_fd, userns_fd)
    for mapping in params["mappings"]:
        net.map_port(PortMapping.from_json(mapping))
    return {}


def set_bandwidth(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Limit what passes a container's link."""
    link, wanted = LinkPlan.from_json(params["link"]), Bandwidth.from_json(params["bandwidth"])
    net.set_bandwidth(link, wanted, *_namespaces(fds))
    return {}


def bandwidth(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """What it is limited to."""
    return net.read_bandwidth(LinkPlan.from_json(params["link"]), *_namespaces(fds)).to_json()


def isolate(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Give a container a network without any way out."""
    netns_fd, userns_fd = _namespaces(fds)
    net.isolate_container(netns_fd, userns_fd)
    return {}


def claim_subnet(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Take a subnet that a caller has chosen."""
    net.claim_subnet(IPv4Network(params["subnet"]))
    return {}


def release_subnet(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Give it up."""
    net.release_subnet(IPv4Network(params["subnet"]))
    return {}


def detach(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Disconnect a container, its mapped ports included."""
    link = LinkPlan.from_json(params["link"])
    net.detach_container(link, params["rules"], had_ports=params["had_ports"])
    return {}


def set_egress(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Replace a container's policy: in its namespace, or on the host for a privileged one."""
    if params["host_side"]:
        net.replace_host_side_egress(params["rules"])
    else:
        netns_fd, userns_fd = _namespaces(fds)
        link = params.get("link")
        net.replace_egress(
            params["rules"], netns_fd, userns_fd, None if link is None else LinkPlan.from_json(link)
        )
    return {}


def egress_counters(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """What each rule of a container has decided."""
    if params["host_side"]:
        counters = net.read_host_side_counters(LinkPlan.from_json(params["link"]))
    else:
        netns_fd, userns_fd = _namespaces(fds)
        counters = net.read_egress_counters(netns_fd, userns_fd)
    return {"counters": [{"rule": c.rule, "packets": c.packets, "bytes": c.bytes} for c in counters]}


def map_port(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Add one mapping."""
    net.map_port(PortMapping.from_json(params["mapping"]))
    return {}


def survey(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """What of the server is on the host."""
    return net.survey().to_json()


def remove_link(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Remove a container's link that nobody claims."""
    net.remove_link(params["link"])
    return {}


def forget(net: HostNetwork, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Remove from the table what nobody claims."""
    net.forget(params["rules"])
    return {}


NetJob = Callable[[HostNetwork, dict[str, Any], list[int]], dict[str, Any]]

JOBS: dict[str, NetJob] = {
    "net.ensure_host": ensure_host,
    "net.restore_host": restore_host,
    "net.remove_host": remove_host,
    "net.forget_pool": forget_pool,
    "net.attach": attach,
    "net.set_bandwidth": set_bandwidth,
    "net.bandwidth": bandwidth,
    "net.isolate": isolate,
    "net.claim_subnet": claim_subnet,
    "net.release_subnet": release_subnet,
    "net.detach": detach,
    "net.set_egress": set_egress,
    "net.egress_counters": egress_counters,
    "net.map_port": map_port,
    "net.survey": survey,
    "net.remove_link": remove_link,
    "net.forget": forget,
}
