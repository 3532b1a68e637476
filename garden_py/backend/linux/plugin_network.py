"""Containers whose network another program makes: in place of addresses, ports and rules of the server's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from garden_py.backend.linux.lease import NetworkLease, PluginLease
from garden_py.backend.plugin import network as plugin
from garden_py.backend.plugin.caller import PluginCaller
from garden_py.backend.plugin.network import Connected, NetworkPlugin
from garden_py.config import Config
from garden_py.model.errors import NotSupported
from garden_py.model.limits import Limits
from garden_py.model.netrule import DefaultAction, EgressRule, RuleAction
from garden_py.model.network import NetworkMode
from garden_py.model.spec import ContainerSpec, PortMapping, Transport
from garden_py.service.ports import NetworkFacts

# What is told of a container anyway, as it is now; kept as the plugin said it, it would be out of date one day.
_TOLD_ELSEWHERE = frozenset(
    {plugin.CONTAINER_IP, plugin.CONTAINER_IPV6, plugin.HOST_IP, plugin.EXTERNAL_IP, plugin.MAPPED_PORTS}
)


class PluginNetwork:
    """The network plugin of one server, and those of servers before it for the containers that these have left.

    Args:
        config: of the server.
        caller: runs plugins.
    """

    def __init__(self, config: Config, caller: PluginCaller) -> None:
        self._command = (config.network_plugin, *config.network_plugin_extra_arg)
        self._default = DefaultAction(config.default_egress)
        self._timeout_s = config.create_timeout_s
        self._caller = caller

    @property
    def is_used(self) -> bool:
        """Whether new containers get their network from a plugin."""
        return bool(self._command[0])

    def _plugin_of(self, lease: PluginLease) -> NetworkPlugin:
        return NetworkPlugin(self._command if self.is_used else lease.command, self._caller)

    def lease(self, spec: ContainerSpec) -> NetworkLease:
        """What a container has that is to get its network from the plugin: nothing of the server's pools.

        Raises:
            NotSupported: it asks for what a plugin cannot be told.
        """
        if spec.subnet:
            raise NotSupported("spec.subnet: the network plugin chooses containers' addresses")
        self.refuse_bandwidth(spec.limits)
        for mapping in spec.port_mappings:
            self._require_tcp(mapping)
        if spec.egress is not None:
            self._require_opening(spec.egress.rules)
            if spec.egress.default_action is not self._default:
                raise NotSupported("spec.egress: the network plugin decides about what no rule matches")
        return NetworkLease(None, (), mode=NetworkMode.OWN, plugin=PluginLease(self._command))

    @staticmethod
    def refuse_bandwidth(limits: Limits) -> None:
        """Refuse limits that only the maker of a link can put in force.

        Raises:
            NotSupported.
        """
        if limits.states_network:
            raise NotSupported("limits on bandwidth: the network plugin makes the container's link")

    @staticmethod
    def _require_tcp(mapping: PortMapping) -> None:
        if mapping.transport is not Transport.TCP:
            raise NotSupported("port mappings: network plugins know TCP only")

    @staticmethod
    def _require_opening(rules: Sequence[EgressRule]) -> None:
        if any(rule.action is not RuleAction.ALLOW for rule in rules):
            raise NotSupported("egress rules: network plugins know only those that allow")

    async def attach(
        self, pid: int, spec: ContainerSpec, lease: PluginLease, external_ip: str
    ) -> tuple[PluginLease, Connected]:
        """Have a container connected; what is to be kept of that, and what the plugin says.

        Raises:
            HostFault.
        """
        rules = spec.egress.rules if spec.egress is not None else ()
        told = await self._plugin_of(lease).up(
            spec.handle, pid, dict(spec.properties), rules, spec.port_mappings, timeout_s=self._timeout_s
        )
        properties = tuple(
            {plugin.EXTERNAL_IP: external_ip, **dict(told.properties)}.items()
        )  # statement N44
        return replace(lease, properties=properties, ports=told.ports), told

    async def detach(self, handle: str, lease: PluginLease, *, timeout_s: float) -> None:
        """Have a container disconnected; gone is fine. HostFault: the plugin fails."""
        await self._plugin_of(lease).down(handle, timeout_s=timeout_s)

    async def map_port(self, handle: str, lease: PluginLease, wanted: PortMapping) -> PortMapping:
        """Have one more port mapped; with its ports filled in.

        Raises:
            NotSupported, HostFault.
        """
        self._require_tcp(wanted)
        return await self._plugin_of(lease).map_port(
            handle,
            wanted,
            external_ip=lease.property(plugin.EXTERNAL_IP),
            container_ip=lease.property(plugin.CONTAINER_IP),
            timeout_s=self._timeout_s,
        )

    async def open(self, handle: str, lease: PluginLease, rules: Sequence[EgressRule], *, bulk: bool) -> None:
        """Have more destinations allowed.

        Raises:
            NotSupported, HostFault.
        """
        self._require_opening(rules)
        await self._plugin_of(lease).open(
            handle,
            rules,
            container_ip=lease.property(plugin.CONTAINER_IP),
            bulk=bulk,
            timeout_s=self._timeout_s,
        )


def facts_of(lease: PluginLease) -> NetworkFacts:
    """What callers are told of a container's network."""
    return NetworkFacts(
        container_ip=lease.property(plugin.CONTAINER_IP),
        container_ipv6=lease.property(plugin.CONTAINER_IPV6),
        host_ip=lease.property(plugin.HOST_IP),
        external_ip=lease.property(plugin.EXTERNAL_IP),
        mapped_ports=lease.ports,
        properties=tuple(pair for pair in lease.properties if pair[0] not in _TOLD_ELSEWHERE),
    )
