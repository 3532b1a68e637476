"""What is said to plugins and what is kept of their answers."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.api.http import decode
from garden_py.api.http.fields import as_fields
from garden_py.backend.host.idmap import IdMap, map_root_apart, range_of
from garden_py.backend.linux.launching import map_of_ready
from garden_py.backend.linux.lease import NetworkLease, PluginLease
from garden_py.backend.linux.plugin_network import facts_of
from garden_py.backend.linux.traffic import LinkTraffic, parse_net_dev
from garden_py.backend.plugin.network import plugin_properties, rule_json
from garden_py.backend.rootfs.names import build_hosts, build_resolv_conf
from garden_py.config import Config, load_config
from garden_py.model.errors import HostFault, InvalidRequest
from garden_py.model.netrule import (
    AddressRange,
    DefaultAction,
    EgressPolicy,
    EgressRule,
    IcmpMatch,
    PortRange,
    Protocol,
)
from garden_py.model.spec import PortMapping
from garden_py.service.containers import rules_put_to

HIGHEST = 0xFFFF_FFFE


@given(
    st.builds(
        EgressRule,
        protocol=st.sampled_from([Protocol.TCP, Protocol.UDP]),
        networks=st.lists(
            st.tuples(st.integers(0, 2**31), st.integers(0, 2**30)).map(
                lambda pair: AddressRange(IPv4Address(pair[0]), IPv4Address(pair[0] + pair[1]))
            ),
            max_size=3,
        ).map(tuple),
        ports=st.lists(st.integers(1, 65535).map(lambda port: PortRange(port, port)), max_size=3).map(tuple),
        log=st.booleans(),
    )
    | st.builds(
        EgressRule,
        protocol=st.just(Protocol.ICMP),
        icmp=st.none() | st.builds(IcmpMatch, st.integers(0, 255), st.none() | st.integers(0, 255)),
    )
    | st.builds(EgressRule, protocol=st.just(Protocol.ALL), log=st.booleans())
)
def test_rules_are_said_as_the_garden_protocol_has_them(rule: EgressRule) -> None:
    assert decode.egress_rule(as_fields(rule_json(rule), "rule")) == rule


def test_properties_are_those_meant_for_a_plugin() -> None:
    given_ = {"network.a": "1", "network.": "2", "networks": "3", "log_config": "{}", "x.network.y": "4"}
    assert plugin_properties(given_) == {"a": "1", "": "2", "log_config": "{}"}
    assert plugin_properties({"log_config2": ""}) == {}


def test_a_lease_of_a_plugin_is_kept_as_it_is() -> None:
    ports = (PortMapping(9000, 80), PortMapping(9001, 22))
    plugin = PluginLease(
        ("/bin/net", "--x"), (("garden.network.container-ip", "10.0.0.2"), ("k", "v")), ports
    )
    lease = NetworkLease(None, (), plugin=plugin)
    assert NetworkLease.from_json(lease.to_json()) == lease
    assert NetworkLease.from_json(NetworkLease(None, ()).to_json()).plugin is None
    facts = facts_of(plugin)
    assert (facts.container_ip, facts.host_ip, facts.mapped_ports) == ("10.0.0.2", "", ports)
    assert facts.properties == (("k", "v"),)


NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0   100       1    0    0    0     0       0          0
  eth7:    2000      20    0    0    0     0          0         0  3000      30    0    0    0     0       0          0
eth8.1: 4000000000000 40 0 0 0 0 0 0 5 50 0 0 0 0 0 0
"""


@pytest.mark.parametrize(
    ("interface", "expected"),
    [
        ("eth7", LinkTraffic(2000, 3000, 20, 30)),
        ("eth8.1", LinkTraffic(4_000_000_000_000, 5, 40, 50)),
        ("", LinkTraffic(4_000_000_002_000, 3005, 60, 80)),
        ("eth9", LinkTraffic()),
    ],
)
def test_traffic_is_that_of_the_interface(interface: str, expected: LinkTraffic) -> None:
    assert parse_net_dev(NET_DEV, interface) == expected


@pytest.mark.parametrize(
    ("owner", "id_map", "expected"),
    [
        (1000, None, None),
        (0x7000_0000, range_of(0x7000_0000, 65536), None),
        (HIGHEST, map_root_apart(HIGHEST), None),
        (0, range_of(0x7000_0000, 65536), range_of(0x7000_0000, 65536)),
        (0, map_root_apart(HIGHEST), map_root_apart(HIGHEST)),
        (
            HIGHEST,
            range_of(0x7000_0000, 65536),
            IdMap(((HIGHEST, 0x7000_0000, 1), (1, 0x7000_0001, 65535))),
        ),
    ],
)
def test_owners_of_a_ready_root_are_shown(owner: int, id_map: IdMap | None, expected: IdMap | None) -> None:
    assert map_of_ready(owner, id_map, HIGHEST) == expected


def test_a_ready_root_of_a_strangers_is_refused() -> None:
    with pytest.raises(HostFault, match="belongs to the host's user 1000"):
        map_of_ready(1000, range_of(0x7000_0000, 65536), HIGHEST)


HOST = "search corp.example\nnameserver 127.0.0.53\nnameserver 192.0.2.1\noptions ndots:2\n"


@pytest.mark.parametrize(
    ("servers", "search", "expected"),
    [
        (("10.0.0.1",), (), "nameserver 10.0.0.1\n"),
        (("10.0.0.1",), ("a.b", "c"), "search a.b c\nnameserver 10.0.0.1\n"),
        ((), ("a.b",), "search a.b\nnameserver 192.0.2.1\noptions ndots:2\nnameserver 9.9.9.9\n"),
        ((), (), "search corp.example\nnameserver 192.0.2.1\noptions ndots:2\nnameserver 9.9.9.9\n"),
    ],
)
def test_N31_a_plugins_word_on_names_goes_first(
    servers: tuple[str, ...], search: tuple[str, ...], expected: str
) -> None:
    assert build_resolv_conf(HOST, (), "", ("9.9.9.9",), of_plugin=servers, search=search) == expected


def test_without_a_gateway_nobody_is_asked_in_its_place() -> None:
    assert build_resolv_conf("nameserver 127.0.0.53\n", (), "") == ""
    assert build_hosts("", "", "box") == "127.0.0.1 localhost\n"


A, B, C = (EgressRule(Protocol.TCP, ports=(PortRange(port, port),)) for port in (1, 2, 3))


@pytest.mark.parametrize(
    ("former", "wanted", "expected"),
    [
        ((A,), (B, C, A), (B, C)),
        ((A,), (A, B), (B,)),
        ((), (A, B), (A, B)),
        ((A,), (A,), ()),
        ((A, B), (A,), None),
        ((A, B), (B, A), None),
        ((A, B), (A, C, B), None),
    ],
)
def test_rules_that_are_only_added_are_told_from_others(
    former: tuple[EgressRule, ...],
    wanted: tuple[EgressRule, ...],
    expected: tuple[EgressRule, ...] | None,
) -> None:
    def policy(rules: tuple[EgressRule, ...]) -> EgressPolicy:
        return EgressPolicy(rules=rules)

    assert rules_put_to(policy(former), policy(wanted)) == expected


def test_another_default_or_a_cut_is_more_than_rules_added() -> None:
    former = EgressPolicy(rules=(A,))
    assert rules_put_to(former, EgressPolicy(DefaultAction.DENY, (A, B))) is None
    assert rules_put_to(former, EgressPolicy(rules=(A, B), generation=1)) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network_plugin": "net"}, "must be an absolute path"),
        ({"image_plugin_extra_arg": ("--x",)}, "goes with image_plugin"),
        ({"privileged_image_plugin_extra_arg": ("--x",)}, "goes with privileged_image_plugin"),
        ({"image_plugin": "/bin/x", "no_image_plugin": True}, "contradicts"),
        ({"image_plugin_timeout_s": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        load_config(settings, environ={})


def test_settings_of_plugins_are_taken() -> None:
    given_ = {
        "image_plugin": "/bin/grow",
        "image_plugin_extra_arg": ("--config", "/c"),
        "network_plugin": "/bin/net",
    }
    config = load_config(given_, environ={})
    assert isinstance(config, Config)
    assert (config.image_plugin, config.image_plugin_extra_arg) == ("/bin/grow", ("--config", "/c"))
