"""A policy in gives exactly this nft text out; a change of a golden file is reviewed like code.

Run with GARDEN_UPDATE_GOLDEN=1 to write the files anew, then read the diff. That the kernel's tools accept
each text is shown by tests/root/test_net_host.py.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest

from garden_py.backend.net.firewall import compile_container_ruleset
from garden_py.backend.net.host_firewall import (
    Access,
    HostPolicy,
    PortMapping,
    PortProtocol,
    Reach,
    compile_attach,
    compile_detach,
    compile_host_base,
    compile_host_removal,
    compile_map_port,
    compile_unmap_port,
    split_forget,
)
from garden_py.backend.net.plan import HostPlan, plan_link
from garden_py.model.netrule import AddressRange, DefaultAction, EgressPolicy, parse_egress_rule

GOLDEN = Path(__file__).parent / "firewall"
HOST = HostPlan("3fa1", IPv4Network("10.254.0.0/22"), IPv4Address("10.254.0.1"))
LINK = plan_link(HOST, IPv4Address("10.254.0.7"), handle="web", mtu_bytes=1500)
MAPPING = PortMapping(PortProtocol.TCP, 61001, IPv4Address("10.254.0.7"), 8080)
DNS = IPv4Address("10.254.0.1")
HOST_V6 = HostPlan("3fa1", HOST.pool, HOST.gateway, IPv6Network("fd67:6472::/64"))
HOST_GLOBAL_V6 = HostPlan("3fa1", HOST.pool, HOST.gateway, IPv6Network("2001:db8:1::/64"))
LINK_V6 = plan_link(
    HOST_V6,
    IPv4Address("10.254.0.7"),
    handle="web",
    mtu_bytes=1500,
    address_v6=IPv6Address("fd67:6472::afe:7"),
)
MAPPING_V6 = PortMapping(PortProtocol.TCP, 61001, MAPPING.address, 8080, IPv6Address("fd67:6472::afe:7"))
DNS_V6 = IPv6Address("fd67:6472::53")
SUBNETS = (IPv4Network("10.80.0.0/24"), IPv4Network("10.81.0.0/30"))


def policy(default: DefaultAction, *rules: str, generation: int = 0) -> EgressPolicy:
    return EgressPolicy(default, tuple(parse_egress_rule(rule) for rule in rules), generation)


EVERY_SHAPE = policy(
    DefaultAction.DENY,
    "tcp:10.0.0.0/8:80,443-445",
    "tcp:10.0.0.0/8:80,443,1000-2000,8080",
    "udp:10.0.0.1:53 log",
    "icmp:1.2.3.4:8/0",
    "icmp:1.2.3.4:8",
    "icmp",
    "tcp",
    "deny all:169.254.169.254 log",
    "all:10.0.0.1-10.0.0.9,10.0.0.5,10.0.0.10,192.168.0.0/16",
    "all:[2001:db8::/32]",
    "udp:[2001:db8::1],192.0.2.7",
    "tcp:0.0.0.0-255.255.255.255:1-65535",
    "tcp:*:443,80-90,85-100,101",
)
DENIED = tuple(AddressRange.parse(text) for text in ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32"))

TEXTS = {
    "container_open": compile_container_ruleset(policy(DefaultAction.ALLOW)),
    "container_closed": compile_container_ruleset(policy(DefaultAction.DENY)),
    "container_every_shape": compile_container_ruleset(EVERY_SHAPE),
    "container_deny_networks": compile_container_ruleset(
        policy(DefaultAction.ALLOW, "tcp:10.1.0.0/16:443", "deny all:10.0.0.0/8,172.16.0.0/12"), denied=DENIED
    ),
    "container_cut": compile_container_ruleset(
        policy(DefaultAction.ALLOW, "tcp:10.1.0.0/16 log", generation=3)
    ),
    "container_ipv6": compile_container_ruleset(EVERY_SHAPE, denied=DENIED, has_ipv6=True),
    "container_ipv6_open": compile_container_ruleset(policy(DefaultAction.ALLOW), has_ipv6=True),
    "host_ipv6": compile_host_base(HOST_V6, HostPolicy(Access.DENY, Reach.NONE, dns_servers=(DNS, DNS_V6))),
    "host_ipv6_global": compile_host_base(HOST_GLOBAL_V6, HostPolicy(reach=Reach.SUBNET, subnets=SUBNETS)),
    "element_ipv6_attach": compile_attach(HOST_V6, LINK_V6),
    "element_ipv6_attach_privileged": compile_attach(
        HOST_V6, LINK_V6, host_side_policy=EVERY_SHAPE, denied=DENIED
    ),
    "element_ipv6_detach_privileged": compile_detach(
        HOST_V6, LINK_V6, mappings=[MAPPING_V6], has_host_side_policy=True
    ),
    "element_ipv6_map_port": compile_map_port(HOST_V6, MAPPING_V6),
    "element_ipv6_unmap_port": compile_unmap_port(HOST_V6, MAPPING_V6),
    "host_default": compile_host_base(HOST, HostPolicy()),
    "host_closed": compile_host_base(HOST, HostPolicy(Access.DENY, Reach.NONE, dns_servers=(DNS,))),
    "host_open": compile_host_base(HOST, HostPolicy(Access.ALLOW, Reach.ALL)),
    "host_subnets": compile_host_base(HOST, HostPolicy(reach=Reach.SUBNET, subnets=SUBNETS)),
    "host_removal": compile_host_removal(HOST),
    "element_attach": compile_attach(HOST, LINK),
    "element_attach_privileged": compile_attach(HOST, LINK, host_side_policy=EVERY_SHAPE, denied=DENIED),
    "element_attach_privileged_cut": compile_attach(
        HOST, LINK, host_side_policy=policy(DefaultAction.ALLOW, "tcp:10.1.0.0/16 log", generation=3)
    ),
    "element_detach": compile_detach(HOST, LINK, mappings=[MAPPING]),
    "element_detach_privileged": compile_detach(HOST, LINK, has_host_side_policy=True),
    "element_map_port": compile_map_port(HOST, MAPPING),
    "element_unmap_port": compile_unmap_port(HOST, MAPPING),
}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_text_is_the_golden_one(name: str) -> None:
    """What the kernel is told changes only when somebody reads the difference."""
    path = GOLDEN / f"{name}.nft"
    if os.environ.get("GARDEN_UPDATE_GOLDEN") == "1":
        path.write_text(TEXTS[name])
    assert TEXTS[name] == path.read_text()


def test_every_golden_file_has_a_case() -> None:
    """A file that no case writes proves nothing any more."""
    assert {path.stem for path in GOLDEN.glob("*.nft")} == set(TEXTS)


def test_detach_in_parts() -> None:
    """An element is deleted by what adds it first; a chain is made before something leads to it, and goes last."""
    parts = split_forget(compile_detach(HOST, LINK, mappings=[MAPPING], has_host_side_policy=True))
    assert "".join(parts) == compile_detach(HOST, LINK, mappings=[MAPPING], has_host_side_policy=True)
    firsts = [[" ".join(line.split()[:2]) for line in part.splitlines()] for part in parts]
    pair = ["add element", "delete element"]
    assert firsts == [pair, pair, ["add chain"], pair, ["flush chain", "delete chain"]]
