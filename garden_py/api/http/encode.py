"""From our objects to the Garden protocol's. Source: Garden HTTP protocol §2.6 to §2.9; statements PR3, BM1, CP5."""

from __future__ import annotations

import json
from typing import Any, Final

from garden_py.model.age import age_ns
from garden_py.model.cpu import Entitlement, stated_shares
from garden_py.model.lifecycle import State
from garden_py.model.limits import Limits
from garden_py.service.ports import HostCapacity, NetworkFacts, RunningProcess, Usage
from garden_py.service.registry import Container

_STATE_PROPERTY: Final = "garden.state"
_CREATED: Final = "created"
_MEMORY_KEYS: Final = (
    "active_anon", "active_file", "cache", "hierarchical_memory_limit", "inactive_anon", "inactive_file", "mapped_file",
    "pgfault", "pgmajfault", "pgpgin", "pgpgout", "rss", "total_active_anon", "total_active_file", "total_cache",
    "total_inactive_anon", "total_inactive_file", "total_mapped_file", "total_pgfault", "total_pgmajfault",
    "total_pgpgin", "total_pgpgout", "total_rss", "total_unevictable", "unevictable", "swap",
    "hierarchical_memsw_limit", "total_swap", "anon", "file", "swapcached",
)  # fmt: skip
_STATES: Final = {State.STOPPED: "stopped", State.BROKEN: "broken"}


def properties_of(container: Container, network: NetworkFacts) -> dict[str, str]:
    """What the caller has set, and the server's own words about the container (statement PR3)."""
    own: dict[str, str] = {}
    if container.state is not State.CREATING:
        own[_STATE_PROPERTY] = _CREATED
    if container.spec.grace_time_s:
        own["garden.grace-time"] = str(round(container.spec.grace_time_s * 1e9))
    for name, value in (
        ("host-ip", network.host_ip), ("container-ip", network.container_ip),
        ("container-ipv6", network.container_ipv6), ("external-ip", network.external_ip),
    ):  # fmt: skip
        if value:
            own[f"garden.network.{name}"] = value
    if network.mapped_ports:
        own["garden.network.mapped-ports"] = json.dumps(_ports(network), separators=(",", ":"))
    if container.state is State.STOPPED:
        own["rundmc.state"] = "stopped"
    if container.notable:
        own["rundmc.events"] = ",".join(container.notable)
    return {**own, **dict(container.spec.properties)}


def matches(properties: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether a list with these filters shows a container (statements L8, L9)."""
    wanted = {_STATE_PROPERTY: _CREATED, **wanted}
    if wanted[_STATE_PROPERTY] == "all":
        del wanted[_STATE_PROPERTY]
    return all(properties.get(key, "") == value for key, value in wanted.items())


def info_json(container: Container, network: NetworkFacts, directory: str) -> dict[str, Any]:
    """Container info, always all ten keys."""
    return {
        "State": _STATES.get(container.state, "active"),
        "Events": list(container.notable),
        "HostIP": network.host_ip,
        "ContainerIP": network.container_ip,
        "ContainerIPv6": network.container_ipv6,
        "ExternalIP": network.external_ip,
        "ContainerPath": directory,
        "ProcessIDs": [
            entry.process.id for entry in container.processes.values() if entry.process.exit is None
        ],
        "Properties": properties_of(container, network),
        "MappedPorts": _ports(network),
    }


EMPTY_INFO: Final = {
    "State": "", "Events": None, "HostIP": "", "ContainerIP": "", "ContainerIPv6": "", "ExternalIP": "",
    "ContainerPath": "", "ProcessIDs": None, "Properties": None, "MappedPorts": None,
}  # fmt: skip


def _ports(network: NetworkFacts) -> list[dict[str, int]]:
    return [{"HostPort": m.host_port, "ContainerPort": m.container_port} for m in network.mapped_ports]


def metrics_json(container: Container, usage: Usage, entitlement: Entitlement) -> dict[str, Any]:
    """Metrics of a running container; times in nanoseconds."""
    age = max(1, age_ns(container.created_ns))
    network: dict[str, int] | None = {"RxBytes": usage.network_rx_bytes, "TxBytes": usage.network_tx_bytes}
    if dict(container.spec.properties).get("network.healthcheck") == "true":
        network = None
    return {
        **_usage_json(usage),
        "DiskStat": _disk_json(usage),
        "NetworkStat": network,
        "Age": age,
        "CPUEntitlement": entitlement.entitled_ns(stated_shares(container.spec.limits), age),
    }


def _disk_json(usage: Usage) -> dict[str, int]:
    """Inodes are always 0 (statement D7)."""
    return {
        **_NO_DISK,
        "TotalBytesUsed": usage.disk_total_bytes,
        "ExclusiveBytesUsed": usage.disk_exclusive_bytes,
    }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "MemoryStat": {
            **{key: usage.memory_stat.get(key, 0) for key in _MEMORY_KEYS},
            "TotalUsageTowardLimit": _usage_toward_limit(usage.memory_stat),
        },
        "CPUStat": {"Usage": usage.cpu_usage_ns, "User": usage.cpu_user_ns, "System": usage.cpu_system_ns},
        "PidStat": {"Current": usage.pids, "Max": usage.pids_limit},
    }


def sidecar_metrics_json(process: RunningProcess, usage: Usage) -> dict[str, Any]:
    """Metrics of a sidecar, asked for by its process id (BM6, PE14): without network and entitlement."""
    return {
        **EMPTY_METRICS,
        **_usage_json(usage),
        "DiskStat": _disk_json(usage),
        "Age": max(1, age_ns(process.started_ns)),
    }


_NO_DISK: Final = {
    "TotalBytesUsed": 0,
    "TotalInodesUsed": 0,
    "ExclusiveBytesUsed": 0,
    "ExclusiveInodesUsed": 0,
}
EMPTY_METRICS: Final[dict[str, Any]] = {
    "MemoryStat": dict.fromkeys((*_MEMORY_KEYS, "TotalUsageTowardLimit"), 0),
    "CPUStat": {"Usage": 0, "User": 0, "System": 0},
    "DiskStat": _NO_DISK,
    "NetworkStat": None,
    "PidStat": {"Current": 0, "Max": 0},
    "Age": 0,
    "CPUEntitlement": 0,
}


def _usage_toward_limit(stat: dict[str, int]) -> int:
    """What of a container's memory counts against its limit, without what the kernel can take back (statement BM1)."""
    if "total_rss" in stat:
        used = stat["total_rss"] + stat.get("total_cache", 0) + stat.get("total_swap", 0)
        return max(0, used - stat.get("total_inactive_file", 0))
    used = stat.get("file", 0) + stat.get("anon", 0) + stat.get("swapcached", 0)
    return max(0, used - stat.get("inactive_file", 0))


def capacity_json(host: HostCapacity, most: int) -> dict[str, int]:
    """Capacity; what is zero is left out."""
    found = {
        "memory_in_bytes": host.memory_bytes,
        "disk_in_bytes": host.disk_bytes,
        "schedulable_disk_in_bytes": host.schedulable_disk_bytes,
        "max_containers": most,
    }
    return {key: value for key, value in found.items() if value}


def cpu_limits_json(asked: Limits, in_force: Limits) -> dict[str, int]:
    """`limit_in_shares` as it is in force: shares on cgroup v1, the weight on v2 (statement CP3)."""
    if asked.cpu_shares is None and asked.cpu_weight is None:
        return {}
    return {"limit_in_shares": in_force.cpu_shares or in_force.cpu_weight or 0}


def bandwidth_limits_json(in_force: Limits) -> dict[str, Any]:
    """Garden knows one rate for both directions: the lower one."""
    rates = [rate for rate in (in_force.network_rx_bytes_per_s, in_force.network_tx_bytes_per_s) if rate]
    if not rates:
        return {}
    burst = {"burst": in_force.network_burst_bytes} if in_force.network_burst_bytes else {}
    return {"rate": min(rates), **burst}


def memory_limits_json(in_force: Limits) -> dict[str, int]:
    """`limit_in_bytes`, if there is one."""
    return {"limit_in_bytes": in_force.memory_bytes} if in_force.memory_bytes else {}
