"""What of the network's pools a container has. Values only; the journal keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

from garden_py.model.network import NetworkMode
from garden_py.model.spec import PortMapping, Transport


@dataclass(frozen=True, slots=True)
class PluginLease:
    """What a network plugin has made for a container.

    Attributes:
        command: the plugin and its extra arguments.
        properties: that it has told, none before the container was connected.
        ports: that lead to the container.
    """

    command: tuple[str, ...]
    properties: tuple[tuple[str, str], ...] = ()
    ports: tuple[PortMapping, ...] = ()

    def property(self, key: str) -> str:
        """One property; empty if there is none."""
        return dict(self.properties).get(key, "")

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        ports = [[each.host_port, each.container_port] for each in self.ports]
        return {"command": list(self.command), "properties": dict(self.properties), "ports": ports}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PluginLease:
        """From the journal."""
        ports = tuple(PortMapping(host, inner) for host, inner in value["ports"])
        return cls(tuple(value["command"]), tuple(value["properties"].items()), ports)


@dataclass(frozen=True, slots=True)
class NetworkLease:
    """A container's part of the pools.

    Attributes:
        address: None: its network has no link to the host's.
        mappings: of host ports.
        subnet: that its caller has chosen, and its address is in; None: the address is of the server's pool.
        mode: which network it is in.
        address_v6: that goes with the address; None: it has no IPv6.
        plugin: what a network plugin makes in place of all this; None: none does.
    """

    address: IPv4Address | None
    mappings: tuple[PortMapping, ...]
    subnet: IPv4Network | None = None
    mode: NetworkMode = NetworkMode.OWN
    address_v6: IPv6Address | None = None
    plugin: PluginLease | None = None

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        ports = [[m.transport.value, m.host_port, m.container_port] for m in self.mappings]
        subnet = {} if self.subnet is None else {"subnet": str(self.subnet)}
        address_v6 = {} if self.address_v6 is None else {"address_v6": str(self.address_v6)}
        plugin = {} if self.plugin is None else {"plugin": self.plugin.to_json()}
        return {
            "address": self.shown,
            "ports": ports,
            "mode": self.mode.value,
            **subnet,
            **address_v6,
            **plugin,
        }

    @property
    def shown(self) -> str:
        """The address as text; empty for none."""
        return "" if self.address is None else str(self.address)

    @property
    def shown_v6(self) -> str:
        """The IPv6 address as text; empty for none."""
        return "" if self.address_v6 is None else str(self.address_v6)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> NetworkLease:
        """From the journal."""
        mappings = tuple(PortMapping(host, inner, Transport(kind)) for kind, host, inner in value["ports"])
        address, subnet, address_v6 = value["address"], value.get("subnet"), value.get("address_v6")
        return cls(
            IPv4Address(address) if address else None,
            mappings,
            None if subnet is None else IPv4Network(subnet),
            NetworkMode(value.get("mode", "own")),
            None if address_v6 is None else IPv6Address(address_v6),
            PluginLease.from_json(value["plugin"]) if "plugin" in value else None,
        )
