"""Rules that were sent as messages are those that libnftables makes of the same text."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.policies import egress_policies
from net_lab import nft, private_netns

from garden_py.agent.nft import Nft, NftError
from garden_py.agent.rtnetlink import Rtnetlink, VethEnd
from garden_py.backend.net import rule_socket
from garden_py.backend.net.firewall import compile_container_ruleset
from garden_py.backend.net.host_firewall import HostPolicy, compile_host_base, compile_host_side_policy
from garden_py.backend.net.plan import CONTAINER_LINK, HostPlan, plan_link
from garden_py.backend.net.rule_socket import RuleSockets
from garden_py.model.netrule import AddressRange, DefaultAction, EgressPolicy, parse_egress_rule

pytestmark = pytest.mark.root
GOLDEN = Path(__file__).parent.parent / "golden" / "firewall"
HOST = HostPlan("7e57", IPv4Network("10.254.0.0/22"), IPv4Address("10.254.0.1"), IPv6Network("fd67::/64"))
LINK = plan_link(HOST, IPv4Address("10.254.0.7"), handle="web", mtu_bytes=1500)
CLOSED = compile_container_ruleset(EgressPolicy(DefaultAction.DENY))
DENIED = (AddressRange.parse("169.254.0.0/16"), AddressRange.parse("fd00:ec2::254"))
# Two namespaces for all that is drawn, since making one takes longer than all else.
DRAWN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Both:
    """The same rules through libnftables and as messages, each in an empty ruleset."""

    def __init__(self) -> None:
        self.libnftables = Nft()
        self.sockets = RuleSockets()

    def compare(self, text: str, base: str = "") -> None:
        self._begin(base)
        self.libnftables.run(text)
        wanted = self._listing()
        self._begin(base)
        self.sockets.run(text)
        assert self._listing() == wanted
        self.sockets.run(text)  # in place of itself
        assert self._listing() == wanted

    def _begin(self, base: str) -> None:
        self.libnftables.run(f"flush ruleset\n{base}")

    def _listing(self) -> Any:
        return without_handles(self.libnftables.run_json("list ruleset"))

    def close(self) -> None:
        self.libnftables.close()
        self.sockets.close()


@pytest.fixture
def both() -> Iterator[Both]:
    with private_netns():
        with Rtnetlink() as netlink:
            netlink.add_veth(
                VethEnd(CONTAINER_LINK, b"\x02" * 6), VethEnd("far", b"\x02" * 5 + b"\x03"), mtu=1500
            )
        both = Both()
        yield both
        both.close()


def without_handles(listed: Any) -> Any:
    """The kernel numbers all that is made, in the order in which it is made."""
    if isinstance(listed, dict):
        return {key: without_handles(value) for key, value in listed.items() if key != "handle"}
    return [without_handles(each) for each in listed] if isinstance(listed, list) else listed


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("container_*.nft")))
def test_golden_rulesets_mean_the_same(both: Both, name: str) -> None:
    """Every statement that the compiler knows."""
    both.compare((GOLDEN / name).read_text())


@given(policy=egress_policies(), has_ipv6=st.booleans())
@DRAWN
def test_any_policy_means_the_same(both: Both, policy: EgressPolicy, has_ipv6: bool) -> None:
    """Edges of ranges, prefixes of every length, sets of both kinds."""
    both.compare(compile_container_ruleset(policy, denied=DENIED, has_ipv6=has_ipv6))


@given(policy=egress_policies())
@DRAWN
def test_any_policy_of_a_privileged_container_means_the_same(both: Both, policy: EgressPolicy) -> None:
    """Its chain is one of many in the host's table, which stays as it is."""
    rules = compile_host_side_policy(HOST, LINK, policy, denied=DENIED)
    both.compare(rules, compile_host_base(HOST, HostPolicy()))


def test_the_same_expressions_are_run(both: Both) -> None:
    """A listing puts together again what belongs together; packets meet each expression by itself."""
    rules = (
        "tcp:10.0.0.0/8:80,443-445",
        "udp:10.0.0.1:53 log",
        "deny all:10.1.2.0/23",
        "icmp:[fd00::/15]:8",
        "tcp:*:7-9",
    )
    text = compile_container_ruleset(
        EgressPolicy(DefaultAction.DENY, tuple(map(parse_egress_rule, rules)), 3),
        denied=DENIED,
        has_ipv6=True,
    )
    both.libnftables.run(text)
    wanted = expressions()
    both.sockets.run(text)
    assert expressions() == wanted


def expressions() -> list[str]:
    """What `nft --debug=netlink` shows of rules and sets."""
    shown = nft("--debug=netlink", "list", "ruleset").splitlines()
    return [
        re.sub(r"__set\d+", "__set", line)
        for line in shown
        if line.startswith(("  [", "\telement", "  userdata"))
    ]


def test_a_long_list_arrives_whole(both: Both) -> None:
    """It takes several messages, which the kernel puts together."""
    networks = ",".join(f"10.{n >> 7}.{2 * (n & 127)}.0/24" for n in range(4000))
    both.compare(
        compile_container_ruleset(EgressPolicy(DefaultAction.DENY, (parse_egress_rule(f"all:{networks}"),)))
    )


def test_what_is_refused_changes_nothing_and_names_the_rule(both: Both) -> None:
    """The kernel takes all of a transaction or nothing, and the next one finds the socket in order."""
    both.sockets.run(CLOSED)
    before = both._listing()
    with pytest.raises(
        NftError, match=r"^add rule inet garden output goto nowhere: No such file or directory$"
    ) as refused:
        both.sockets.run(
            f"{CLOSED}add rule inet garden output goto nowhere\nadd rule inet garden output accept\n"
        )
    assert refused.value.commands.startswith(CLOSED)
    assert both._listing() == before
    both.sockets.run(CLOSED)


def test_rules_go_to_the_namespace_they_are_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets that rest are kept apart by it, are few, and are closed in the end."""
    monkeypatch.setattr(rule_socket, "MAX_RESTING", 1)
    before = len(os.listdir("/proc/self/fd"))
    rules = "add table inet garden\nadd chain inet garden mine\n"
    with private_netns():
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with private_netns():
            there = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            sockets = RuleSockets()
            sockets.run(rules, here)
            assert not nft("list", "ruleset")
            sockets.run(rules.replace("mine", "yours"), there)
            assert "yours" in nft("list", "ruleset")
            sockets.close_rested()  # nobody has been idle for so long
            assert sockets.has_resting
            monkeypatch.setattr(rule_socket, "REST_S", 0)
            sockets.close_rested()
            assert not sockets.has_resting
        assert "mine" in nft("list", "ruleset")
        assert "yours" not in nft("list", "ruleset")
    os.close(here)
    os.close(there)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_namespace_owned_by_a_user_namespace_can_be_given_rules() -> None:
    """It is below the host's, which therefore may; nothing has to be joined but the network namespace."""
    argv = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec cat"]
    sockets = RuleSockets()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        netns = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        sockets.run("add table inet garden\nadd chain inet garden mine\n", netns)
        listed = nft_in(process.pid)
        os.close(netns)
        sockets.close()
        process.communicate()
    assert "chain mine" in listed


def nft_in(pid: int) -> str:
    argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "nft", "list", "ruleset"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_a_policy_of_the_largest_size_is_one_message(both: Both) -> None:
    """One more would not be atomic."""
    rules = tuple(parse_egress_rule(f"tcp:10.{n >> 8}.{n & 255}.0/24:443") for n in range(10_000))
    both.sockets.run(compile_container_ruleset(EgressPolicy(DefaultAction.DENY, rules)))
    chain = both.libnftables.run_json("list chain inet garden output")
    assert sum("rule" in each for each in chain) == len(rules) + 4


def test_no_answer_is_a_refusal(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller must not take for done what the kernel has not said to be."""
    opened = rule_socket.open_rule_socket()
    deaf, _other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    deaf.settimeout(0.01)
    with opened, deaf, _other, pytest.raises(NftError, match="no answer"):
        rule_socket.send(deaf, rule_socket.encode(CLOSED), CLOSED)
