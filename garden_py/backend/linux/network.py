"""The network of one server: pools of addresses and ports, and the jobs that carry changes out."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import structlog

from garden_py.agent.rtnetlink import Rtnetlink
from garden_py.backend.host.listeners import is_datagram_read_at, is_listened_on
from garden_py.backend.host.threads import in_thread
from garden_py.backend.launcher.client import Launcher
from garden_py.backend.linux.connections import ConnectionLog
from garden_py.backend.linux.explanation import Surroundings, explain
from garden_py.backend.linux.lease import NetworkLease
from garden_py.backend.linux.namespaces import Namespaces
from garden_py.backend.linux.network_notes import NetworkNotes, are_noted, note_rules, spoil_rules
from garden_py.backend.linux.traffic import LinkTraffic, read_host_end
from garden_py.backend.net import firewall, host_firewall
from garden_py.backend.net import host_firewall as hf
from garden_py.backend.net.apply import TABLE_MISSING
from garden_py.backend.net.firewall import DNS_PORT
from garden_py.backend.net.host_firewall import Reach
from garden_py.backend.net.messages import Attachment, Bandwidth, Foreign, HostReport
from garden_py.backend.net.plan import (
    MIN_IPV6_MTU_BYTES,
    HostPlan,
    LinkPlan,
    address_of_link,
    host_link_name,
    plan_link,
)
from garden_py.backend.net.pools import AddressPool, PortPool, Subnets
from garden_py.backend.net.table_probe import TableProbe
from garden_py.backend.rootfs.host_names import read_host_resolv_conf
from garden_py.backend.rootfs.names import build_resolv_conf, find_resolver_problem, read_name_servers
from garden_py.config import Config
from garden_py.model.connection import Connection
from garden_py.model.errors import ContainerBroken, HostFault, InvalidField, PortInUse
from garden_py.model.limits import NETWORK_BURST_RANGE, Limits
from garden_py.model.netrule import (
    AddressRange,
    Decision,
    DefaultAction,
    Destination,
    EgressPolicy,
)
from garden_py.model.network import NetworkMode, SubnetChoice
from garden_py.model.spec import PortMapping, Transport
from garden_py.service.ports import EgressCounts, RuleCount

log = structlog.get_logger()
LOOK_S = 1.0
"""How often it is looked whether the host's table is in force."""
# How long the host's own address is believed: a list of all containers asks once for each.
_ADDRESS_KEPT_S = 2.0
_BURST_FLOOR_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class _Attached:
    """What a container has in the host's table.

    Attributes:
        policy: a privileged container's, whose rules are there; None: the rules are in its own namespace.
    """

    lease: NetworkLease
    policy: EgressPolicy | None


class LinuxNetwork:
    """Leases and rules of all containers of one server.

    Args:
        config: of the server.
        launcher: carries changes out.
        uplink_mtu: bytes.
        report: told of connections that rules refuse or log.

    The table on the host is the server's own, but others can remove it (`nft flush ruleset`, a firewall that is
    reloaded). A change that meets no table puts it back first, with all that containers had in it.
    """

    def __init__(
        self,
        config: Config,
        launcher: Launcher,
        uplink_mtu: int,
        report: Callable[[str, Connection], None],
    ) -> None:
        self._config = config
        self._denied = tuple(AddressRange.parse(str(network)) for network in config.deny_network)
        self._chosen_dns = tuple(
            ip_address(text) for text in (*config.dns_server, *config.additional_dns_server)
        )
        self._gateway_is_asked = False
        self._connections = ConnectionLog(report, self._owner_of)
        self._launcher = launcher
        self._mtu = config.mtu or uplink_mtu
        self.addresses = AddressPool(config.network_pool)
        self.subnets = Subnets(config.network_pool)
        self._claiming = asyncio.Lock()
        self._leaving: set[IPv4Address] = set()
        self._ruled: frozenset[IPv4Network] = frozenset()
        self._notes = NetworkNotes(config.state_dir)
        heads = self._notes.read_heads()
        self.ports = {
            kind: PortPool(config.port_pool_start, config.port_pool_size, heads.get(kind.value, 0))
            for kind in Transport
        }
        self.host = HostPlan(config.tag, config.network_pool, self.addresses.gateway, config.network_pool_v6)
        if config.network_pool_v6 is not None and self._mtu < MIN_IPV6_MTU_BYTES:
            problem = (
                f"IPv6 needs an MTU of {MIN_IPV6_MTU_BYTES}, and containers' links would have {self._mtu}"
            )
            raise InvalidField("network_pool_v6", problem)
        self._probe = TableProbe(self.host.table, host_firewall.HOOKED_CHAINS)
        self._attached: dict[str, _Attached] = {}
        self._is_host_up = False
        self._restoring = asyncio.Lock()
        self._restored = 0
        self._looked_at, self._own_address = -math.inf, ""

    @property
    def ports_in_use(self) -> int:
        """Mapped ports, both transports."""
        return sum(pool.in_use for pool in self.ports.values())

    def taken_ports(self) -> set[tuple[str, int]]:
        """(protocol, host port) of those that are taken, now."""
        return {(kind.value, port) for kind, pool in self.ports.items() for port in pool.taken}

    @property
    def _dns(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """Addresses that containers may ask for names where they are the host's."""
        return (*self._chosen_dns, self.host.gateway) if self._gateway_is_asked else self._chosen_dns

    @property
    def external_ip(self) -> str:
        """The address that mapped ports are reported under."""
        now = time.monotonic()
        if now > self._looked_at + _ADDRESS_KEPT_S:
            self._looked_at, self._own_address = now, _own_address()
        return self._config.external_ip or self._own_address or str(self.host.gateway)

    # --- leases

    def lease(
        self,
        wanted: tuple[PortMapping, ...],
        mode: NetworkMode = NetworkMode.OWN,
        choice: SubnetChoice | None = None,
    ) -> NetworkLease:
        """Take an address and host ports.

        Raises:
            PoolExhausted, PortInUse, InvalidField: nothing was taken.
        """
        lease = self._lease_address(mode, choice)
        try:
            for mapping in wanted:
                lease = replace(lease, mappings=(*lease.mappings, self.lease_port(mapping)))
        except BaseException:
            self.release(lease)
            raise
        return lease

    def _lease_address(self, mode: NetworkMode, choice: SubnetChoice | None) -> NetworkLease:
        if mode is not NetworkMode.OWN:
            return NetworkLease(None, (), mode=mode)
        subnet = None if choice is None else choice.network
        address = self.addresses.allocate() if choice is None else self.subnets.lease(choice)
        return NetworkLease(address, (), subnet, address_v6=self.host.address_v6(address))

    def has_ipv6(self, lease: NetworkLease) -> bool:
        """Whether its IPv6 address is of the pool that the server has now: else nobody can reach it there."""
        if lease.address is None or lease.address_v6 is None:
            return False
        return lease.address_v6 == self.host.address_v6(lease.address)

    def lease_port(self, wanted: PortMapping) -> PortMapping:
        """Take one host port: the wanted one, or the next of the pool. Never one that a program of the host has.

        Raises:
            PoolExhausted, PortInUse, InvalidField: nothing was taken.
        """
        pool, transport = self.ports[wanted.transport], wanted.transport
        host_port = wanted.host_port
        if not host_port:
            host_port = pool.allocate(lambda port: is_listened_on(transport, port))
            self._notes.note_heads({kind.value: each.next_offset for kind, each in self.ports.items()})
        else:
            pool.reserve(host_port)
            if is_listened_on(transport, host_port):
                pool.release(host_port)
                raise PortInUse(host_port, by_host=True)
        return PortMapping(host_port, wanted.container_port or host_port, transport)

    def adopt(self, lease: NetworkLease) -> None:
        """Mark a lease from the journal as taken.

        Raises:
            InvalidField, PortInUse: it is not ours to take, e.g. the pool was configured differently then.
        """
        if lease.subnet is not None:
            self.subnets.lease(SubnetChoice(lease.subnet, lease.address))
        elif lease.address is not None:
            self.addresses.reserve(lease.address)
        for mapping in lease.mappings:
            self.ports[mapping.transport].reserve(mapping.host_port)

    def remember(
        self, handle: str, lease: NetworkLease, policy: EgressPolicy | None, *, privileged: bool
    ) -> None:
        """Take down what a container has in the table: of one that an earlier server has attached."""
        if lease.address is None:
            return
        self._attached[handle] = _Attached(lease, self._complete(policy) if privileged else None)

    def _complete(self, policy: EgressPolicy | None) -> EgressPolicy:
        return policy or EgressPolicy(default_action=DefaultAction(self._config.default_egress))

    def release(self, lease: NetworkLease) -> None:
        """Give a lease back; the kernel has forgotten it."""
        if lease.address is not None and lease.subnet is not None:
            self.subnets.release(lease.subnet, lease.address)
            self._leaving.discard(lease.address)
        elif lease.address is not None:
            self.addresses.release(lease.address)
        for mapping in lease.mappings:
            self.ports[mapping.transport].release(mapping.host_port)

    def release_port(self, mapping: PortMapping) -> None:
        """Give one port back."""
        self.ports[mapping.transport].release(mapping.host_port)

    # --- acts

    async def job(self, op: str, params: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        """Do a job of net/jobs.py in the launcher; HostFault and what else it raises."""
        restored = self._restored
        try:
            return await self._job(op, params, fds)
        except HostFault as fault:
            if fault.step != TABLE_MISSING:
                raise
        async with self._restoring:
            if restored == self._restored:  # else somebody has put it back meanwhile
                log.warning("network.table_missing", table=self.host.table, containers=len(self._attached))
                await self._restore()
        return await self._job(op, params, fds)

    async def _job(self, op: str, params: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
        return await self._launcher.run(f"net.{op}", {"host": self.host.to_json(), **params}, fds)

    @property
    def is_needed(self) -> bool:
        """Whether the host is to have its part: not if a plugin connects containers, and none of before is left.

        Source: Garden behaviour, statement N44.
        """
        return not self._config.network_plugin or bool(self._attached) or self._is_host_up

    async def ensure_host(self, *, has_containers: bool) -> None:
        """Make or repair what all containers share, and what each has in the table, when the server starts.

        Args:
            has_containers: of before, which are not to be kept from coming back by what somebody else has put into the
                pools meanwhile.

        Raises:
            InvalidField: a pool overlaps a network of the host.
            HostFault: the kernel refused a step.
        """
        if not self.is_needed:
            return
        self._is_host_up = True
        self._look_at_names()
        former_v6 = await self._change_pool()
        tolerated = [str(self.host.pool)] if has_containers else []
        if has_containers and former_v6 is not None and former_v6 == self.host.pool_v6:
            tolerated.append(str(former_v6))
        denied = self._config.deny_network
        if self.host.pool_v6 is not None and denied and all(each.version == 4 for each in denied):
            log.warning("network.denied_networks_have_no_ipv6", deny_network=[str(each) for each in denied])
        try:
            answer = await self._job("ensure_host", {**self._shared(), "tolerated": tolerated})
        except InvalidField:
            self._notes.note_pool_v6(None)  # it is somebody else's, and must not be given up as ours one day
            raise
        except HostFault as fault:
            if not self._attached:  # a server that does not start leaves nothing
                try:
                    await self._job("remove_host", {})
                except HostFault as error:
                    fault.add_note(f"undoing it failed too: {error}")
            raise
        self._avoid(HostReport.from_json(answer).foreign)
        await self._connections.watch_host(host_firewall.log_target(self.host).group)

    def _avoid(self, foreign: Sequence[Foreign]) -> None:
        """Give out no address that somebody else has on the host by now."""
        covered: list[IPv4Network] = []
        for each in foreign:
            log.warning("network.pool_overlaps", found=each.what, avoided=each.network)
            network = ip_network(each.network)
            in_v4 = self.host.network_v4(network) if isinstance(network, IPv6Network) else network
            covered += [] if in_v4 is None else [in_v4]
        self.addresses.avoid(covered)

    def _look_at_names(self) -> None:
        """Whether containers are told to ask the gateway; and warn if they find no names."""
        config, gateway = self._config, self.host.gateway
        told = build_resolv_conf(
            read_host_resolv_conf(), config.dns_server, str(gateway), config.additional_dns_server
        )
        self._gateway_is_asked = str(gateway) in read_name_servers(told)
        problem, remedy = find_resolver_problem(
            told,
            str(gateway),
            gateway_answers=is_datagram_read_at(gateway, DNS_PORT),
            has_ipv6=self.host.pool_v6 is not None,
        )
        if problem and not config.network_plugin:
            log.warning("network.no_resolver", problem=problem, remedy=remedy)

    async def serve_names(self, resolv_conf: str) -> None:
        """Let containers ask the gateway for names if one is told to: the host's own file may have changed.

        Raises:
            HostFault: the kernel refused.
        """
        if str(self.host.gateway) not in read_name_servers(resolv_conf):
            return
        async with self._claiming:
            if self._gateway_is_asked:
                return
            self._gateway_is_asked = True
            try:
                await self.restore_host()
            except BaseException:
                self._gateway_is_asked = False
                raise

    async def _change_pool(self) -> IPv6Network | None:
        """Give up the IPv6 pool that a server before this one had, if this one has another or none; that pool."""
        pool = self.host.pool_v6
        former = self._notes.read_pool_v6()
        if former is not None and former != pool:
            await self._job("forget_pool", {"pool_v6": str(former)})
        self._notes.note_pool_v6(pool)
        return former

    async def wait_for_loss(self) -> None:
        """Return when somebody has taken the table or its rules away; noticed within LOOK_S."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._is_host_up and not self._probe.is_whole():
                    return
            except OSError as error:
                log.warning("network.table_not_seen", error=str(error))

    async def restore_host(self) -> None:
        """Repair it at any other time."""
        async with self._restoring:
            await self._restore()

    async def _restore(self) -> None:
        ruled = frozenset(self.subnets.networks)
        await self._job("restore_host", self._shared())
        self._ruled = ruled
        self._restored += 1

    def _shared(self) -> dict[str, Any]:
        elements = "".join(self._elements_of(handle, each) for handle, each in self._attached.items())
        return {
            "host_access": self._config.allow_host_access,
            "dns_servers": [str(server) for server in self._dns],
            "reach": self._config.container_access,
            "subnets": [str(subnet) for subnet in self.subnets.networks],
            "elements": elements,
        }

    def _elements_of(self, handle: str, attached: _Attached) -> str:
        link = self._link(attached.lease, handle)
        rules = host_firewall.compile_attach(
            self.host, link, host_side_policy=attached.policy, denied=self._denied
        )
        mappings = self._mappings(attached.lease)
        return rules + "".join(host_firewall.compile_map_port(self.host, each) for each in mappings)

    async def remove_host(self) -> None:
        """Remove it, after the last container."""
        if not self.is_needed:
            return
        await self.job("remove_host", {})
        self._notes.note_pool_v6(None)

    def _link(self, lease: NetworkLease, handle: str) -> LinkPlan:
        assert lease.address is not None  # those without are asked for nothing that needs a link
        address_v6 = self._address_v6(lease)
        return plan_link(self.host, lease.address, handle=handle, mtu_bytes=self._mtu, address_v6=address_v6)

    def _address_v6(self, lease: NetworkLease) -> IPv6Address | None:
        return lease.address_v6 if self.has_ipv6(lease) else None

    def _mappings(self, lease: NetworkLease) -> list[hf.PortMapping]:
        address, address_v6 = lease.address, self._address_v6(lease)
        if address is None:
            return []
        return [
            hf.PortMapping(
                hf.PortProtocol(m.transport.value), m.host_port, address, m.container_port, address_v6
            )
            for m in lease.mappings
        ]

    async def attach(
        self,
        handle: str,
        pid: int,
        lease: NetworkLease,
        policy: EgressPolicy,
        limits: Limits,
        directory: Path,
        *,
        privileged: bool,
    ) -> None:
        """Connect a container, with its policy and its limits in force before its first packet.

        Raises:
            InvalidField: its subnet is in use on the host (field `subnet`).
            HostFault: the kernel refused a step.
        """
        if lease.mode is NetworkMode.HOST:
            return
        if lease.address is None:
            with Namespaces("", pid, privileged=privileged) as fds:
                await self.job("isolate", {}, fds)
            return
        if lease.subnet is not None:
            await self._claim(lease.subnet)
        link = self._link(lease, handle)
        host_rules = host_firewall.compile_attach(
            self.host, link, host_side_policy=policy if privileged else None, denied=self._denied
        )
        container_rules = "" if privileged else self.container_rules(lease, policy)
        params = {
            "attachment": Attachment(link, host_rules, container_rules).to_json(),
            "mappings": [mapping.to_json() for mapping in self._mappings(lease)],
            "bandwidth": _bandwidth(limits).to_json() if limits.states_network else None,
        }
        with Namespaces("", pid, privileged=privileged) as fds:
            await self.job("attach", params, fds)
        if not privileged:
            note_rules(directory, container_rules)
        self._attached[handle] = _Attached(lease, policy if privileged else None)
        if not privileged:
            await self.watch(handle, pid, policy)

    async def detach(self, handle: str, lease: NetworkLease, *, privileged: bool) -> None:
        """Disconnect a container and its ports; what is gone already is fine."""
        if lease.address is None:
            return
        self._connections.unwatch(handle)
        self._attached.pop(handle, None)
        async with self._restoring:
            # A repair that had begun knows of this container still: what it puts back is to go as well.
            pass
        # Its IPv6 address may be of a pool that the server had before; what stands for it goes all the same.
        link = replace(self._link(lease, handle), address_v6=lease.shown_v6)
        mappings = [replace(each, address_v6=lease.address_v6) for each in self._mappings(lease)]
        rules = host_firewall.compile_detach(
            self.host, link, mappings=mappings, has_host_side_policy=privileged
        )
        params = {"link": link.to_json(), "rules": rules, "had_ports": bool(lease.mappings)}
        await self.job("detach", params)
        if lease.subnet is not None:
            await self._disclaim(lease.subnet, lease.address)

    async def _claim(self, subnet: IPv4Network) -> None:
        async with self._claiming:
            await self.job("claim_subnet", {"subnet": str(subnet)})
            if self._config.container_access == Reach.SUBNET.value and subnet not in self._ruled:
                await self.restore_host()

    async def _disclaim(self, subnet: IPv4Network, address: IPv4Address) -> None:
        """Give up a subnet with the last container in it; one that has just come claims it again."""
        async with self._claiming:
            self._leaving.add(address)  # its lease is given back later, and two may leave at once
            if not self.subnets.others(subnet, self._leaving):
                await self.job("release_subnet", {"subnet": str(subnet)})

    async def map_port(self, handle: str, lease: NetworkLease, mapping: PortMapping) -> None:
        """Put one more mapping in force; the lease names it already."""
        (element,) = self._mappings(replace(lease, mappings=(mapping,)))
        await self.job("map_port", {"mapping": element.to_json()})
        if (attached := self._attached.get(handle)) is not None:
            self._attached[handle] = replace(attached, lease=lease)

    async def set_egress(
        self,
        handle: str,
        pid: int,
        lease: NetworkLease,
        policy: EgressPolicy,
        directory: Path,
        *,
        privileged: bool,
        renews: bool = False,
    ) -> None:
        """Replace a container's whole policy in one transaction; renews: its routes may be of an earlier release."""
        if privileged:
            rules = host_firewall.compile_host_side_policy(
                self.host, self._link(lease, handle), policy, denied=self._denied
            )
            restored = self._restored
            await self.job("set_egress", {"host_side": True, "rules": rules})
            self._attached[handle] = _Attached(lease, policy)
            async with self._restoring:  # a repair that had begun has put the former policy back
                repaired = restored != self._restored
            if repaired:
                await self.job("set_egress", {"host_side": True, "rules": rules})
            return
        with Namespaces(handle, pid, privileged=False) as fds:
            rules = self.container_rules(lease, policy)
            await self.watch(handle, pid, policy)
            link = {"link": self._link(lease, handle).to_json()} if renews else {}
            # A server that dies in between must not take the former ones for those in force.
            spoil_rules(directory)
            await self.job("set_egress", {"host_side": False, "rules": rules, **link}, fds)
            note_rules(directory, rules)

    async def set_bandwidth(
        self, handle: str, pid: int, lease: NetworkLease, limits: Limits, *, privileged: bool
    ) -> None:
        """Put the limits on bandwidth in force, all of them."""
        params = {"link": self._link(lease, handle).to_json(), "bandwidth": _bandwidth(limits).to_json()}
        with Namespaces(handle, pid, privileged=privileged) as fds:
            await self.job("set_bandwidth", params, fds)

    async def bandwidth(
        self, handle: str, pid: int, lease: NetworkLease, stated: Limits, *, privileged: bool
    ) -> Limits:
        """The limits on bandwidth as the kernel has them. The burst is as stated: the kernel keeps it as a time."""
        with Namespaces(handle, pid, privileged=privileged) as fds:
            answer = await self.job("bandwidth", {"link": self._link(lease, handle).to_json()}, fds)
        found = Bandwidth.from_json(answer)
        return Limits(
            network_rx_bytes_per_s=found.rx_bytes_per_s,
            network_tx_bytes_per_s=found.tx_bytes_per_s,
            network_burst_bytes=stated.network_burst_bytes or 0,
        )

    async def egress_counts(
        self, handle: str, pid: int, lease: NetworkLease, rules: int, *, privileged: bool
    ) -> EgressCounts:
        """What each of a policy's rules has decided."""
        params = {"host_side": privileged, "link": self._link(lease, handle).to_json()}
        with Namespaces(handle, pid, privileged=privileged) as fds:
            answer = await self.job("egress_counters", params, fds)
        counts = {c["rule"]: RuleCount(c["packets"], c["bytes"]) for c in answer["counters"]}
        per_rule = tuple(counts.get(index, RuleCount()) for index in range(rules))
        return EgressCounts(
            per_rule, counts.get("default", RuleCount()), counts.get("denied_network", RuleCount())
        )

    def container_rules(self, lease: NetworkLease, policy: EgressPolicy) -> str:
        """An unprivileged container's own table."""
        has_ipv6 = self.has_ipv6(lease)
        return firewall.compile_container_ruleset(policy, denied=self._denied, has_ipv6=has_ipv6)

    def has_rules(self, directory: Path, lease: NetworkLease, policy: EgressPolicy) -> bool:
        """Whether these are: not if another release of this program, or other settings of the server, made them."""
        return are_noted(directory, self.container_rules(lease, policy))

    # --- connections

    async def watch(self, handle: str, pid: int, policy: EgressPolicy) -> None:
        """Report what an unprivileged container's own rules refuse or log.

        Raises:
            ContainerBroken: its PID 1 has ended.
            HostFault: the kernel refused.
        """
        try:
            await self._connections.watch(handle, f"/proc/{pid}/ns/net", policy, self._denied)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ContainerBroken(handle, "its PID 1 has ended") from error
        except OSError as error:
            raise HostFault("network.watch", str(error)) from error
        if handle not in self._attached:  # destroyed meanwhile, and the socket would keep its namespace
            self._connections.unwatch(handle)

    def close(self) -> None:
        """Stop reporting; nothing on the host changes."""
        self._connections.close()

    def _owner_of(self, link: str) -> str:
        address = address_of_link(self.host, link)
        owners = (h for h, each in self._attached.items() if each.lease.address == address)
        return next(owners, "") if address is not None else ""

    async def explain(self, lease: NetworkLease, policy: EgressPolicy, destination: Destination) -> Decision:
        """What would become of a new connection of a container."""
        surroundings = Surroundings(
            host=self.host,
            denied=self._denied,
            dns_servers=self._dns,
            host_access=self._config.allow_host_access,
            reach=Reach(self._config.container_access),
            host_addresses=await in_thread(_host_addresses),
            subnets=self.subnets.networks,
            containers=self.addresses.taken | self.subnets.taken | self._taken_v6(),
            mapped_ports={(4, *port) for port in self.taken_ports()} | self._mapped_v6(),
        )
        own = replace(lease, address_v6=self._address_v6(lease))
        return explain(surroundings, own, policy, destination)

    def _mapped_v6(self) -> set[tuple[int, str, int]]:
        leases = [each.lease for each in self._attached.values() if self.has_ipv6(each.lease)]
        return {(6, port.transport.value, port.host_port) for lease in leases for port in lease.mappings}

    def _taken_v6(self) -> frozenset[IPv6Address]:
        found = (self._address_v6(each.lease) for each in self._attached.values())
        return frozenset(address for address in found if address is not None)

    def read_traffic(self, lease: NetworkLease) -> LinkTraffic:
        """Traffic of a container's link. OSError: it is gone."""
        if lease.address is None:
            return LinkTraffic()
        return read_host_end(host_link_name(self.host, lease.address))


def _own_address() -> str:
    """The host's address towards the outside; no packet is sent. connect(2) on a datagram socket only routes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _bandwidth(limits: Limits) -> Bandwidth:
    rx, tx = limits.network_rx_bytes_per_s or 0, limits.network_tx_bytes_per_s or 0
    burst = limits.network_burst_bytes or 0
    return Bandwidth(rx, tx, burst or _burst_of(rx), burst or _burst_of(tx))


def _burst_of(bytes_per_s: int) -> int:
    """20 ms' worth: enough for the kernel's timers, too little to be noticed in a rate."""
    return min(max(bytes_per_s // 50, _BURST_FLOOR_BYTES), NETWORK_BURST_RANGE[1])


def _host_addresses() -> set[IPv4Address | IPv6Address]:
    with Rtnetlink() as netlink:
        held = [*netlink.addresses(), *netlink.addresses(socket.AF_INET6)]
    found = {each.address for each in held}
    # A router answers to the first address of each of its IPv6 networks, too (RFC 4291 §2.6.1).
    networks = (ip_network((each.address, each.prefix_length), strict=False) for each in held)
    return found | {each.network_address for each in networks if each.version == 6 and each.prefixlen < 127}


def check_dns_servers(config: Config) -> None:
    """Refuse DNS servers that containers cannot reach."""
    for name in ("dns_server", "additional_dns_server"):
        for text in getattr(config, name):
            if ip_address(text).version == 6 and config.network_pool_v6 is None:
                problem = f"containers have no IPv6 to ask {text} by; give them some with --network-pool-v6"
                raise InvalidField(name, problem)
