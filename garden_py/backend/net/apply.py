"""Carry the network's plans out on the host. Thin and synchronous, for one single-threaded root process.

Everything here may be repeated: what is there already is repaired, what is gone already is no error. Nothing
here decides; names, addresses and rules come from `plan`, `firewall` and `host_firewall`.

Arguments and results are the dataclasses of `messages`; namespace descriptors travel beside them.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from garden_py.agent.netrules import NetrulesError, end_children, inject, load_tools, pack_batch
from garden_py.agent.nft import Nft, NftError, is_missing, is_taken, read_counters
from garden_py.agent.rtnetlink import RTN_UNREACHABLE, Link, Rate, Rtnetlink, RtnetlinkError, VethEnd
from garden_py.backend.net import host_firewall
from garden_py.backend.net.conntrack import Side, forget_connections, forget_datagrams, probe
from garden_py.backend.net.host_firewall import HostPolicy, PortMapping, PortProtocol
from garden_py.backend.net.messages import Attachment, Bandwidth, Foreign, HostReport, RuleCounter
from garden_py.backend.net.plan import HostPlan, LinkPlan, address_of_link, choose_mtu, parse_mac
from garden_py.backend.net.rule_socket import RuleSockets, encode_rules
from garden_py.backend.net.survey import Survey, is_in_force, read_chains, read_elements
from garden_py.model.errors import HostFault, InvalidField, PortInUse

T = TypeVar("T")

# The step of the HostFault that says: not this change is at fault, somebody has removed the server's table.
TABLE_MISSING = "network.table_missing"

# What the kernel may take to start a new link's queue, which it mostly has done by the first look.
_LINK_S = 10.0

_SYSCTL = Path("/proc/sys/net")


class HostNetwork:
    """One server instance's network on the host: its links, routes and table.

    Holds netlink sockets of the network namespace it was made in. Close it, or use it in a `with`
    statement; what it made on the host stays until `remove_host`.
    """

    def __init__(self, plan: HostPlan) -> None:
        self._plan = plan
        self._tools = load_tools()
        self._netlink = Rtnetlink()
        self._nft = Nft(self._tools.libnftables)
        self._rule_sockets = RuleSockets()

    def __enter__(self) -> HostNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets and collect the last children; safe to call twice."""
        self._netlink.close()
        self._nft.close()
        self._rule_sockets.close()
        end_children(self._tools)

    def close_rested(self) -> bool:
        """Close sockets that have not been used for a while; whether others are to be asked for later."""
        self._rule_sockets.close_rested()
        return self._rule_sockets.has_resting

    # --- the host ---

    def ensure_host(
        self,
        policy: HostPolicy,
        elements: str = "",
        *,
        tolerated: Sequence[IPv4Network | IPv6Network] = (),
    ) -> HostReport:
        """Make, or repair, what all containers share: anchor link, gateway address, forwarding, table.

        Members, mappings and privileged containers' chains that are there already stay. For a server that starts: the
        check of the pool needs a host on which no container is being attached.

        Args:
            policy: what holds for all containers.
            elements: rules that put back what containers have in the table, for the same transaction.
            tolerated: pools whose overlaps are reported instead, since containers are in them already.

        Raises:
            InvalidField: another pool overlaps a network that the host uses otherwise, or the kernel has no IPv6 (field
                `network_pool` or `network_pool_v6`).
            HostFault: the kernel refused a step.
        """
        if self._plan.pool_v6 is not None and not (_SYSCTL / "ipv6").exists():
            raise InvalidField("network_pool_v6", "this kernel has no IPv6, or it is off (ipv6.disable=1)")
        foreign: list[Foreign] = []
        for pool in self._pools():
            if pool in tolerated:
                foreign += self._find_foreign(pool)
            else:
                self._refuse_overlap(pool, "network_pool" if pool.version == 4 else "network_pool_v6")
        _step("network.ctnetlink", probe)
        # Nobody is being attached: what is known is all there is. A former pool of IPv6 must not be in force any more.
        forgotten = host_firewall.compile_forget_v6(self._plan)
        turned_on = self.restore_host(policy, elements, forgotten=forgotten)
        uplink = self._find_uplink({link.index: link for link in self._netlink.links()})
        return HostReport(
            ip_forward_turned_on=turned_on,
            uplink=uplink.name if uplink else "",
            mtu_bytes=choose_mtu(uplink.mtu if uplink else None),
            foreign=tuple(foreign),
        )

    def restore_host(self, policy: HostPolicy, elements: str, *, forgotten: str = "") -> bool:
        """Make again what of it is missing, at any time; whether forwarding had been off.

        Args:
            policy: what holds for all containers.
            elements: rules that put back what containers have in the table.
            forgotten: rules that forget something before that, in the same transaction.

        Raises:
            HostFault: the kernel refused a step.
        """
        _step("network.anchor", self._ensure_anchor)
        turned_on = _step("network.ip_forward", _ensure_forwarding)
        if self._plan.pool_v6 is not None:
            _step("network.ipv6_forward", _ensure_forwarding_v6)
        text = host_firewall.compile_host_base(self._plan, policy) + forgotten + elements
        try:
            self._nft.run(text)
        except NftError as error:  # never TABLE_MISSING, which asks for what has just failed
            raise HostFault("network.table", error.message) from error
        return turned_on

    def remove_host(self) -> None:
        """Remove all that this server instance has on the host, containers' links included.

        `ip_forward` stays as it is: somebody else may rely on it by now.

        Raises:
            HostFault: the kernel refused a step; the other steps were tried all the same.
        """
        failures: list[HostFault] = []
        containers = [link.name for link in self._own_links() if self._is_containers(link)]
        names = [*containers, self._plan.anchor_link]
        steps: list[Callable[[], None]] = [partial(self._delete_link, name) for name in names]
        removal = host_firewall.compile_host_removal(self._plan)
        steps += [
            *(partial(self._delete_unreachable, pool) for pool in self._pools()),
            partial(self._run_nft, "network.table", removal),
        ]
        for act in steps:
            try:
                _step("network.remove", act)
            except HostFault as fault:
                failures.append(fault)
        if failures:
            raise HostFault("network.remove", "; ".join(str(f) for f in failures))

    def forget_pool(self, pool: IPv6Network) -> None:
        """Remove what stands for an IPv6 pool that the server had, gateway address and route; gone is fine.

        Raises:
            HostFault: the kernel refused.
        """
        gateway = replace(self._plan, pool_v6=pool).gateway_v6
        assert gateway is not None
        _step("network.forget_pool", partial(self._delete_unreachable, pool))
        link = self._netlink.find_link(self._plan.anchor_link)
        if link is not None:
            _step("network.forget_pool", partial(self._delete_address, link.index, gateway))

    def survey(self) -> Survey:
        """Everything of this server instance's tag that is on the host, in detail.

        Raises:
            HostFault: the kernel refused a listing.
        """
        try:
            listed: list[dict[str, Any]] | None = self._nft.run_json(f"list table inet {self._plan.table}")
        except NftError as error:
            if not is_missing(error):
                raise HostFault("network.survey", error.message) from error
            listed = None
        return Survey(
            links={link.name: link.kind for link in self._own_links()},
            anchor=self._netlink.find_link(self._plan.anchor_link) is not None,
            table=listed is not None,
            elements=read_elements(listed or []),
            chains=read_chains(listed or []),
            in_force=listed is None or is_in_force(listed),
        )

    def remove_link(self, name: str) -> None:
        """Remove one of the server's links; gone is fine.

        Raises:
            HostFault: it is not a veth pair, or the kernel refused.
        """
        link = self._netlink.find_link(name)
        if link is not None and not self._is_containers(link):
            raise HostFault("network.link_delete", f"{name} is not a container's link")
        self._delete_link(name)

    def forget(self, rules: str) -> None:
        """Run a transaction that deletes from the table; what is gone already is no error."""
        self._forget("network.forget", rules)

    # --- containers ---

    def attach_container(self, attachment: Attachment, netns_fd: int, userns_fd: int | None) -> None:
        """Give a network namespace its link, addresses, routes and rules.

        The container's rules are in force before a packet of it gets anywhere: the host accepts its address
        in the last step. Rules on the host let established connections go on, so those of the address's former owner
        are forgotten before. A half-made attachment is undone. A link of the same name, left by a container that
        is gone, is replaced.

        Args:
            attachment: what to do.
            netns_fd: the container's network namespace.
            userns_fd: its user namespace; None for a privileged container.

        Raises:
            HostFault: a step was refused; everything was undone.
        """
        link = attachment.link
        self._delete_link(link.host_link)
        try:
            _step("network.veth", partial(self._add_veth, link, netns_fd))
            # Our end first: the other one then finds a carrier when it comes up, and its queue starts at once.
            _step("network.link", partial(self._open_link, link))
            request: dict[str, Any] = {"interface": _interface(link)}
            self._inject("network.container", userns_fd, netns_fd, request, attachment.container_rules)
            _step("network.link", partial(self._await_link, link.host_link))
            if userns_fd is None:
                self._forget_connections(link, Side.ORIGINAL, Side.REPLY)
            self._run_nft("network.attach", attachment.host_rules)
        except HostFault as fault:
            try:
                self._delete_link(link.host_link)
            except HostFault as undo_fault:
                fault.add_note(f"undo failed too: {undo_fault}")
            raise

    def isolate_container(self, netns_fd: int, userns_fd: int | None) -> None:
        """Bring up loopback in a network namespace that has nothing else.

        Raises:
            HostFault: a step was refused.
        """
        self._inject("network.container", userns_fd, netns_fd, {"loopback": True})

    def claim_subnet(self, subnet: IPv4Network) -> None:
        """Make sure that the host uses a subnet for nothing else, and that what no container has is unreachable.

        Raises:
            InvalidField: it overlaps a network of the host (field `subnet`).
            HostFault: the kernel refused a step.
        """
        self._refuse_overlap(subnet, "subnet")
        _step("network.subnet", partial(self._netlink.set_unreachable, subnet))

    def release_subnet(self, subnet: IPv4Network) -> None:
        """Undo it; what is gone already is no error."""
        _step("network.subnet", partial(self._delete_unreachable, subnet))

    def detach_container(self, link: LinkPlan, detach_rules: str, *, had_ports: bool = False) -> None:
        """Forget a container; what is gone already is no error.

        Args:
            link: the host's end; the other end goes with it, and so do routes.
            detach_rules: from host_firewall.compile_detach.
            had_ports: ports were mapped to it. What still comes in through them is not for the address's next owner.

        Raises:
            HostFault: a step was refused; the other ones were done all the same.
        """
        try:
            self._delete_link(link.host_link)
        finally:
            self._forget("network.detach", detach_rules)
            if had_ports:
                self._forget_connections(link, Side.REPLY)

    def _forget_connections(self, link: LinkPlan, *sides: Side) -> None:
        for address in filter(None, (link.address, link.address_v6)):
            _step("network.connections", partial(forget_connections, ip_address(address), sides))

    def replace_egress(
        self, container_rules: str, netns_fd: int, userns_fd: int | None, link: LinkPlan | None = None
    ) -> None:
        """Replace an unprivileged container's whole policy, in one transaction; established flows go on.

        Args:
            container_rules: from firewall.compile_container_ruleset.
            netns_fd: the container's network namespace.
            userns_fd: its user namespace.
            link: given for a container of an earlier release, whose routes are then set anew as well.

        Raises:
            HostFault: refused; the former policy is in force.
        """
        if link is not None:
            self._inject("network.egress", userns_fd, netns_fd, {"interface": _interface(link)})
        try:
            self._rule_sockets.run(container_rules, netns_fd)
        except NftError as error:
            raise HostFault("network.egress.nft", error.message) from error

    def replace_host_side_egress(self, rules: str) -> None:
        """Replace a privileged container's policy (text of host_firewall.compile_host_side_policy).

        Raises:
            HostFault: refused; the former policy is in force.
        """
        try:
            self._rule_sockets.run(rules)
        except NftError as error:
            raise self._fault("network.egress", error) from error

    def read_egress_counters(self, netns_fd: int, userns_fd: int | None) -> list[RuleCounter]:
        """An unprivileged container's counters since its policy was last replaced, in rule order.

        Raises:
            HostFault: the container has no policy, or its namespace cannot be joined.
        """
        found = self._inject("network.counters", userns_fd, netns_fd, {"counters": True})
        return [RuleCounter(**counter) for counter in found["counters"]]

    def read_host_side_counters(self, link: LinkPlan) -> list[RuleCounter]:
        """A privileged container's counters since its policy was last replaced, in rule order.

        Raises:
            HostFault: it has no policy on the host.
        """
        chain = host_firewall.egress_chain(link)
        try:
            listed = self._nft.run_json(f"list chain inet {self._plan.table} {chain}")
        except NftError as error:
            raise self._fault("network.counters", error) from error
        return [RuleCounter(**counter) for counter in read_counters(listed)]  # type: ignore[arg-type]

    # --- bandwidth ---

    def set_bandwidth(self, link: LinkPlan, wanted: Bandwidth, netns_fd: int, userns_fd: int | None) -> None:
        """Limit what passes a container's link; a rate of 0 lifts the limit.

        What it receives is held back at the host's end, what it sends at its own: each end limits what it sends, so
        that packets wait there instead of being lost on the other side.

        Raises:
            HostFault: refused; one direction may have been changed.
        """
        _step("network.bandwidth", partial(self._set_rate, link.host_link, wanted))
        rate = {
            "name": link.container_link,
            "bytes_per_s": wanted.tx_bytes_per_s,
            "burst_bytes": wanted.tx_burst_bytes,
        }
        self._inject("network.bandwidth", userns_fd, netns_fd, {"rate": rate})

    def read_bandwidth(self, link: LinkPlan, netns_fd: int, userns_fd: int | None) -> Bandwidth:
        """What the kernel holds a container's link to.

        Raises:
            HostFault: it cannot be asked.
        """
        host = _step("network.bandwidth", lambda: self._netlink.rate(self._find(link.host_link).index))
        found = self._inject("network.bandwidth", userns_fd, netns_fd, {"read_rate": link.container_link})
        tx = found["rate"] or (0, 0)
        rx = (0, 0) if host is None else (host.bytes_per_s, host.burst_bytes)
        return Bandwidth(rx[0], tx[0], rx[1], tx[1])

    def _set_rate(self, name: str, wanted: Bandwidth) -> None:
        index = self._find(name).index
        if wanted.rx_bytes_per_s:
            self._netlink.set_rate(index, Rate(wanted.rx_bytes_per_s, wanted.rx_burst_bytes))
        else:
            self._netlink.clear_rate(index)

    def _find(self, name: str) -> Link:
        link = self._netlink.find_link(name)
        if link is None:
            raise RtnetlinkError(errno.ENODEV, f"link {name}")
        return link

    # --- mapped ports ---

    def map_port(self, mapping: PortMapping) -> None:
        """Send connections to a host port to a container; repeating it is fine.

        Raises:
            PortInUse: the port is mapped to something else.
            HostFault: refused for another reason.
        """
        try:
            self._nft.run(host_firewall.compile_map_port(self._plan, mapping))
        except NftError as error:
            if "File exists" in error.message:
                raise PortInUse(mapping.host_port) from error
            raise self._fault("network.map_port", error) from error
        if mapping.protocol is PortProtocol.UDP:
            self._redirect_flows(mapping)

    def _redirect_flows(self, mapping: PortMapping) -> None:
        """Have what has been sending to a port already begin anew, now that the port leads somewhere."""
        found = [*self._netlink.addresses(), *self._netlink.addresses(socket.AF_INET6)]
        local = {each.address for each in found}
        owners: set[IPv4Address | IPv6Address] = {mapping.address}
        if mapping.address_v6 is not None:
            owners.add(mapping.address_v6)
        try:
            _step("network.connections", partial(forget_datagrams, mapping.host_port, local, owners))
        except HostFault as fault:
            try:
                self.unmap_port(mapping)
            except HostFault as undo_fault:
                fault.add_note(f"undo failed too: {undo_fault}")
            raise

    def unmap_port(self, mapping: PortMapping) -> None:
        """Undo map_port; a mapping that is gone already is no error."""
        self._forget("network.unmap_port", host_firewall.compile_unmap_port(self._plan, mapping))

    # --- inside ---

    def _pools(self) -> list[IPv4Network | IPv6Network]:
        return [self._plan.pool, *([] if self._plan.pool_v6 is None else [self._plan.pool_v6])]

    def _refuse_overlap(self, pool: IPv4Network | IPv6Network, field: str) -> None:
        """Raise InvalidField if another network of the host shares addresses with the pool, or a subnet."""
        for foreign in self._find_foreign(pool):
            flag = "--" + field.replace("_", "-")
            advice = f"; choose another with {flag}" if field.startswith("network_pool") else ""
            raise InvalidField(field, f"{pool} overlaps {foreign.what} on this host{advice}")

    def _find_foreign(self, pool: IPv4Network | IPv6Network) -> list[Foreign]:
        """Other networks of the host that share addresses with the pool, or a subnet."""
        family = socket.AF_INET if pool.version == 4 else socket.AF_INET6
        addresses, routes = self._netlink.addresses(family), self._netlink.routes(family)
        # Last: what has come meanwhile is known then. What has gone is nobody's network any more.
        links = {link.index: link for link in self._netlink.links()}
        own = {i for i, link in links.items() if self._is_own(link.name)}
        found: list[Foreign] = []
        for address in addresses:
            network = ip_network((address.address, address.prefix_length), strict=False)
            if address.link_index in links.keys() - own and network.overlaps(pool):
                what = f"address {address.address}/{address.prefix_length}"
                found.append(_foreign(network, what, address.link_index, links))
        for route in routes:
            is_default = route.destination.prefixlen == 0
            is_pool_route = route.type == RTN_UNREACHABLE and route.destination == pool
            is_gone = bool(route.link_index) and route.link_index not in links
            if is_default or is_pool_route or is_gone or route.link_index in own:
                continue
            if route.destination.overlaps(pool):
                what = f"route {route.destination}"
                found.append(_foreign(route.destination, what, route.link_index, links))
        return found

    def _ensure_anchor(self) -> None:
        name = self._plan.anchor_link
        if self._netlink.find_link(name) is None:
            self._netlink.add_bridge(name, self._plan.anchor_mac)
        link = self._find(name)
        self._settle_ipv6(name, wanted=self._plan.pool_v6 is not None)
        self._netlink.set_link_up(link.index, alias=f"garden server {self._plan.tag}: gateway address")
        self._netlink.set_address(link.index, self._plan.gateway, 32)
        if self._plan.gateway_v6 is not None:
            self._netlink.set_address(link.index, self._plan.gateway_v6, 128)
        for pool in self._pools():
            self._netlink.set_unreachable(pool)

    def _settle_ipv6(self, name: str, *, wanted: bool) -> None:
        """IPv6 of one of our links: off, or on without an address of the kernel's own choice and without advice."""
        if wanted:
            _write_sysctl(f"ipv6/conf/{name}/addr_gen_mode", "1")
            _write_sysctl(f"ipv6/conf/{name}/accept_ra", "0")
        _write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "0" if wanted else "1")

    def _add_veth(self, link: LinkPlan, netns_fd: int) -> None:
        self._netlink.add_veth(
            VethEnd(link.host_link, parse_mac(link.host_mac)),
            VethEnd(link.container_link, parse_mac(link.container_mac), netns_fd),
            mtu=link.mtu_bytes,
        )

    def _open_link(self, link: LinkPlan) -> None:
        found = self._find(link.host_link)
        self._settle_ipv6(link.host_link, wanted=bool(link.address_v6))
        # 127.0.0.1:PORT on the host reaches a container only so; chain antispoof closes what this opens.
        _write_sysctl(f"ipv4/conf/{link.host_link}/route_localnet", "1")
        # Redirects would tell a container of a neighbour that it cannot reach directly.
        _write_sysctl(f"ipv4/conf/{link.host_link}/send_redirects", "0")
        address = IPv4Address(link.address)
        self._netlink.set_link_up(found.index, alias=link.alias)
        self._netlink.set_neighbour(found.index, address, parse_mac(link.container_mac))
        self._netlink.set_route(IPv4Network(address), link_index=found.index)
        if link.address_v6:
            address_v6 = IPv6Address(link.address_v6)
            self._netlink.set_neighbour(found.index, address_v6, parse_mac(link.container_mac))
            self._netlink.set_route(IPv6Network(address_v6), link_index=found.index)

    def _await_link(self, name: str) -> None:
        """Wait until the kernel has started our end's queue: what it gets before is lost, a TCP handshake for a second.

        The kernel does so in a worker that waits for the lock of all links (net/core/link_watch.c). Since Linux 6.8
        a look at the link does the work itself, so that the first one is the last.
        """
        deadline = time.monotonic() + _LINK_S
        while not self._find(name).is_operational:
            if time.monotonic() > deadline:
                raise RtnetlinkError(errno.ETIMEDOUT, f"link {name} to take packets")
            time.sleep(0.001)

    def _inject(
        self, step: str, userns_fd: int | None, netns_fd: int, request: dict[str, Any], rules: str = ""
    ) -> dict[str, Any]:
        """Rules: text of one transaction, the last part of the request."""
        try:
            transaction = encode_rules(rules) if rules else None
            if transaction is not None:
                request = {**request, "rules": pack_batch(transaction.batch, len(transaction.lines))}
            return inject(self._tools, userns_fd, netns_fd, request)
        except NftError as error:
            raise HostFault(f"{step}.nft", error.message) from error
        except NetrulesError as error:
            message = error.message
            if transaction is not None and error.step == "nft":
                message = f"{transaction.line(error.refused)}: {message}"
            raise HostFault(f"{step}.{error.step}", message) from error

    def _run_nft(self, step: str, text: str) -> None:
        try:
            self._nft.run(text)
        except NftError as error:
            raise self._fault(step, error) from error

    def _fault(self, step: str, error: NftError) -> HostFault:
        """What a refused transaction is told as: TABLE_MISSING if the whole table is."""
        if is_missing(error) and not self._has_table():
            return HostFault(TABLE_MISSING, f"somebody has removed the table inet {self._plan.table}")
        return HostFault(step, error.message)

    def _has_table(self) -> bool:
        tables = [item["table"]["name"] for item in self._nft.run_json("list tables inet") if "table" in item]
        return self._plan.table in tables

    def _forget(self, step: str, text: str) -> None:
        """Run a transaction that deletes; a missing table means that everything in it is gone already.

        What stands for somebody else by now is not deleted, and does not keep the rest.
        """
        try:
            self._nft.run(text)
        except NftError as error:
            if is_taken(error):
                for part in host_firewall.split_forget(text):
                    self._forget_part(step, part)
            elif not is_missing(error):
                raise HostFault(step, error.message) from error

    def _forget_part(self, step: str, text: str) -> None:
        try:
            self._nft.run(text)
        except NftError as error:
            if not is_missing(error) and not is_taken(error):
                raise HostFault(step, error.message) from error

    def _delete_link(self, name: str) -> None:
        try:
            self._netlink.delete_link(name)
        except RtnetlinkError as error:
            if error.errno != errno.ENODEV:
                raise HostFault("network.link_delete", str(error)) from error

    def _delete_unreachable(self, network: IPv4Network | IPv6Network) -> None:
        # By name alone, IPv6 would also delete a route of another kind to the same network (ip6_route_del).
        if network.version == 6 and not self._has_unreachable(network):
            return
        try:
            self._netlink.delete_unreachable(network)
        except RtnetlinkError as error:
            if error.errno != errno.ESRCH:
                raise

    def _has_unreachable(self, network: IPv4Network | IPv6Network) -> bool:
        found = self._netlink.routes(socket.AF_INET6)
        return any(each.type == RTN_UNREACHABLE and each.destination == network for each in found)

    def _delete_address(self, index: int, address: IPv6Address) -> None:
        try:
            self._netlink.delete_address(index, address, 128)
        except RtnetlinkError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise

    def _own_links(self) -> Sequence[Link]:
        return [link for link in self._netlink.links() if link.name.startswith(self._plan.link_prefix)]

    def _is_containers(self, link: Link) -> bool:
        """Whether it can be the host's end of a container's link: somebody else may like our prefix, too."""
        return link.kind == "veth" and address_of_link(self._plan, link.name) is not None

    def _is_own(self, name: str) -> bool:
        return name == self._plan.anchor_link or name.startswith(self._plan.link_prefix)

    def _find_uplink(self, links: dict[int, Link]) -> Link | None:
        """The link of the default route with the lowest metric."""
        defaults = [r for r in self._netlink.routes() if r.destination.prefixlen == 0 and r.link_index]
        return links.get(min(defaults, key=lambda r: r.metric).link_index) if defaults else None


def _interface(link: LinkPlan) -> dict[str, Any]:
    return {
        "name": link.container_link,
        "address": link.address,
        "gateway": link.gateway,
        "gateway_mac": link.host_mac,
        "address_v6": link.address_v6,
        "gateway_v6": link.gateway_v6,
    }


def _foreign(network: IPv4Network | IPv6Network, what: str, index: int, links: dict[int, Link]) -> Foreign:
    return Foreign(str(network), f"{what} of link {links[index].name if index in links else 'none'}")


def _ensure_forwarding() -> bool:
    """Turn IPv4 forwarding on; whether it was off."""
    path = _SYSCTL / "ipv4/ip_forward"
    if path.read_text().strip() == "1":
        return False
    path.write_text("1")
    return True


def _ensure_forwarding_v6() -> None:
    """Turn IPv6 forwarding on.

    A host that forwards takes no routes from router advertisements unless it is told to (accept_ra 2); where it took
    them so far it goes on to. Source: ip-sysctl.rst, accept_ra.
    """
    conf = _SYSCTL / "ipv6/conf"
    path = conf / "all/forwarding"
    if path.read_text().strip() != "0":
        return
    for link in conf.iterdir():
        try:
            if (link / "accept_ra").read_text().strip() == "1" and link.name not in ("all", "lo"):
                (link / "accept_ra").write_text("2")
        except FileNotFoundError:
            continue  # a link that has just gone
    path.write_text("1")


def _write_sysctl(name: str, value: str) -> None:
    path = _SYSCTL / name
    if name.startswith("ipv6/") and not (_SYSCTL / "ipv6").exists():
        return  # a kernel without IPv6
    path.write_text(value)


def _step(name: str, act: Callable[[], T]) -> T:
    """Run one step and name it in the error if the kernel refuses."""
    try:
        return act()
    except OSError as error:  # RtnetlinkError is one
        raise HostFault(name, str(error)) from error
