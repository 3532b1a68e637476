"""The server's part of the host's network: made, repaired, removed, and nothing of it left behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from net_lab import HOST_IP, OUTSIDE_IP, TAG, Lab, Probe, nft, open_lab, private_netns

from garden_py.agent import netrules
from garden_py.agent.netrules import (
    REST_S,
    NetrulesError,
    Tools,
    end_children,
    inject,
    load_tools,
    pack_batch,
)
from garden_py.agent.rtnetlink import Link, Rtnetlink, RtnetlinkError
from garden_py.backend.net.apply import HostNetwork
from garden_py.backend.net.host_firewall import BASE_CHAINS, HostPolicy
from garden_py.backend.net.nftables import encode
from garden_py.backend.net.plan import HostPlan
from garden_py.backend.net.survey import Survey
from garden_py.model.errors import HostFault, InvalidField
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule

pytestmark = pytest.mark.root
NOTHING = Survey({}, anchor=False, table=False)
EMPTY = Survey({}, anchor=True, table=True, chains=tuple(sorted(BASE_CHAINS)))

OPEN = EgressPolicy(DefaultAction.ALLOW)
GOLDEN = Path(__file__).parent.parent / "golden" / "firewall"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


def routes() -> list[str]:
    """Routes of the main table, as `ip route` prints them."""
    printed = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in printed.splitlines()]


def test_forwarding_is_turned_on_and_reported_once(lab: Lab) -> None:
    """The operator must learn that the server changed a setting of the whole host."""
    assert lab.report.ip_forward_turned_on
    assert not lab.network.ensure_host(HostPolicy()).ip_forward_turned_on


def test_ensuring_the_host_again_repairs_it_and_keeps_the_containers(lab: Lab) -> None:
    """After a restart the table is written anew; running containers must not notice."""
    container = lab.container(2, OPEN)
    container.order("listen", "0.0.0.0", 8000)
    lab.map_tcp(61001, container, 8000)
    nft("flush", "chain", "inet", lab.plan.table, "source_nat")
    nft("flush", "chain", "inet", lab.plan.table, "map_ports")
    assert container.try_connect(OUTSIDE_IP, 80, patience_s=1) == "timeout"
    lab.network.ensure_host(HostPolicy())
    assert container.try_connect(OUTSIDE_IP, 80) == HOST_IP
    assert lab.outside.try_connect(HOST_IP, 61001) == OUTSIDE_IP


def test_detaching_twice_leaves_nothing(lab: Lab) -> None:
    """Destroy may be interrupted and repeated at any step."""
    plain, privileged = lab.container(2, OPEN), lab.container(3, OPEN, privileged=True)
    assert lab.network.survey().links == {f"gdn{TAG}-2": "veth", f"gdn{TAG}-3": "veth"}
    mapping = lab.map_tcp(61001, plain, 8000)
    for _ in range(2):
        lab.detach(plain, (mapping,))
        lab.detach(privileged)
        assert lab.network.survey() == EMPTY
    table = json.loads(nft("-j", "list", "table", "inet", lab.plan.table))["nftables"]
    sets = {o[k]["name"]: o[k].get("elem", []) for o in table for k in ("set", "map") if k in o}
    assert sets == {
        "members": [], "members6": [], "portmap": [], "portmap6": [], "told": [], "egress": [], "egress6": [],
    }  # fmt: skip
    assert not [o for o in table if o.get("chain", {}).get("name", "").startswith("egress_")]
    assert not [r for r in routes() if TAG in r]


def test_port_that_leads_elsewhere_by_now_does_not_keep_a_detach_from_its_end(lab: Lab) -> None:
    """What stands for another container stays; all that is this one's own goes."""
    plain, privileged = lab.container(2, OPEN), lab.container(3, OPEN, privileged=True)
    other = lab.map_tcp(61001, privileged, 9000)
    own = lab.map_tcp(61002, plain, 8001)
    claimed = dataclasses.replace(own, host_port=61001, container_port=8000)
    lab.detach(plain, (claimed, own))
    assert lab.network.survey().elements == (
        "egress 10.254.0.3 egress_3", f"member gdn{TAG}-3 10.254.0.3", "portmap tcp 61001 10.254.0.3 9000",
    )  # fmt: skip
    lab.detach(privileged, (claimed, other))
    assert lab.network.survey() == EMPTY


def test_removing_the_host_removes_everything_even_attached_containers() -> None:
    """A server that stops for good leaves the host as it found it; doing so twice is fine."""
    with open_lab() as lab:
        links_before = {"lo", "uplink"}
        lab.container(2, OPEN)
        lab.network.remove_host()
        lab.network.remove_host()
        assert lab.network.survey() == NOTHING
        with Rtnetlink() as netlink:
            assert {link.name for link in netlink.links()} == links_before
        assert nft("list", "tables") == ""
        assert [route.split()[0] for route in routes()] == ["default", "192.0.2.0/24"]


def test_detaching_after_the_host_was_removed_is_no_error(lab: Lab) -> None:
    """Destroy always ends, in whatever order things went away."""
    container = lab.container(2, OPEN)
    lab.network.remove_host()
    lab.detach(container)


@pytest.mark.parametrize("step", ["container_rules", "host_rules"])
def test_failed_attachment_is_undone(lab: Lab, step: str) -> None:
    """No half-attached container: the link goes again, whichever transaction was refused."""
    container = lab.container(2, OPEN)
    lab.detach(container)
    refused, good = "add rule inet nowhere x accept\n", lab.attachment(container, OPEN)
    broken = {
        "host_rules": dataclasses.replace(good, host_rules=refused),
        "container_rules": dataclasses.replace(good, container_rules=refused),
    }[step]
    with pytest.raises(HostFault, match="No such file or directory") as fault:
        lab.network.attach_container(broken, container.netns_fd, container.userns_fd)
    assert refused.strip() in str(fault.value) or step == "host_rules"
    assert lab.network.survey().links == {}
    lab.network.attach_container(lab.attachment(container, OPEN), container.netns_fd, container.userns_fd)
    assert container.try_connect(OUTSIDE_IP, 80) == HOST_IP


@pytest.mark.parametrize("looks_until_operational", [3, None])
def test_container_is_attached_when_its_link_takes_packets(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, looks_until_operational: int | None
) -> None:
    """Not before: a handshake that is begun before that takes a second.

    The kernel starts the queue of the host's end in a worker of its own, late where it is busy with others' links.
    """
    container, looks = lab.container(2, OPEN), 0
    lab.detach(container)
    find_link = Rtnetlink.find_link

    def look(netlink: Rtnetlink, name: str) -> Link | None:
        nonlocal looks
        found = find_link(netlink, name)
        if found is None or not found.is_operational:
            return found
        looks += 1
        is_operational = looks_until_operational is not None and looks >= looks_until_operational
        return dataclasses.replace(found, is_operational=is_operational)

    monkeypatch.setattr(Rtnetlink, "find_link", look)
    monkeypatch.setattr("garden_py.backend.net.apply._LINK_S", 30.0 if looks_until_operational else 0.1)
    attachment = lab.attachment(container, OPEN)
    if looks_until_operational is None:
        with pytest.raises(HostFault, match="to take packets"):
            lab.network.attach_container(attachment, container.netns_fd, container.userns_fd)
        assert lab.network.survey() == EMPTY
    else:
        lab.network.attach_container(attachment, container.netns_fd, container.userns_fd)
        assert looks == looks_until_operational


def test_a_kernel_that_refuses_the_table_is_told_as_that(lab: Lab) -> None:
    """Not as a table that somebody has removed: to put it back is what has just failed."""
    lab.network.remove_host()
    with pytest.raises(HostFault) as refused:
        lab.network.ensure_host(HostPolicy(), "add rule inet nowhere x accept\n")
    assert refused.value.step == "network.table"


@pytest.mark.parametrize("pool", ["192.0.2.0/24", "192.0.0.0/16", "192.0.2.128/29"])
def test_pool_that_overlaps_a_network_of_the_host_is_refused(lab: Lab, pool: str) -> None:
    """Routing part of the operator's own network into containers would cut the host off."""
    network = IPv4Network(pool)
    with HostNetwork(HostPlan("0bad", network, network[1])) as second:
        with pytest.raises(InvalidField, match="--network-pool"):
            second.ensure_host(HostPolicy())
        assert second.survey() == NOTHING


def test_two_servers_share_a_host(lab: Lab) -> None:
    """Each has its own tag and pool; removing one leaves the other's containers connected."""
    container = lab.container(2, OPEN)
    network = IPv4Network("10.253.0.0/24")
    with HostNetwork(HostPlan("5ec0", network, network[1])) as second:
        second.ensure_host(HostPolicy())
        assert second.survey() == EMPTY
        second.remove_host()
    assert container.try_connect(OUTSIDE_IP, 80) == HOST_IP


@pytest.fixture
def tools() -> Iterator[Tools]:
    tools = load_tools()
    yield tools
    end_children(tools)
    assert not tools.unreaped


@pytest.fixture
def probe() -> Iterator[Probe]:
    with private_netns():
        probe = Probe()
        yield probe
        probe.close()


def rules(text: str) -> dict[str, Any]:
    """A request that carries out a transaction."""
    transaction = encode(text)
    return {"rules": pack_batch(transaction.batch, len(transaction.lines))}


def test_injection_names_the_step_that_failed(tools: Tools, probe: Probe) -> None:
    """A descriptor that is no namespace, a link that is not there, a bad rule: three different reports."""
    with open("/dev/null") as null, pytest.raises(NetrulesError) as caught:
        inject(tools, None, null.fileno(), {})
    assert (caught.value.step, caught.value.errno) == ("setns", errno.EINVAL)
    interface = {"name": "eth0", "address": "10.0.0.2", "gateway": "10.0.0.1", "gateway_mac": "0" * 12}
    with pytest.raises(NetrulesError) as caught:
        inject(tools, probe.userns_fd, probe.netns_fd, {"interface": interface})
    assert (caught.value.step, caught.value.errno) == ("link", errno.ENODEV)
    with pytest.raises(NetrulesError) as caught:
        inject(
            tools, probe.userns_fd, probe.netns_fd, rules("add table inet garden\nadd chain inet none of\n")
        )
    assert (caught.value.step, caught.value.errno, caught.value.refused) == ("nft", errno.ENOENT, 2)


def test_injection_past_its_deadline_is_killed_and_reported(tools: Tools, probe: Probe) -> None:
    """A child that is stuck must not hold up the helper."""
    with pytest.raises(NetrulesError) as caught:
        inject(tools, probe.userns_fd, probe.netns_fd, {}, deadline_s=0)
    assert (caught.value.step, caught.value.errno) == ("deadline", errno.ETIMEDOUT)
    assert not tools.resting


def test_a_child_that_died_while_resting_is_replaced(tools: Tools, probe: Probe) -> None:
    """It may end at any moment, also between our look and our request."""
    inject(tools, probe.userns_fd, probe.netns_fd, {})
    (first,) = tools.resting.values()
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    inject(tools, probe.userns_fd, probe.netns_fd, rules("add table inet garden\n"))
    (second,) = tools.resting.values()
    assert second.pid != first.pid
    assert inject(tools, probe.userns_fd, probe.netns_fd, {"counters": True}) == {"counters": []}


def test_a_child_tells_of_a_bug_of_ours(tools: Tools, probe: Probe) -> None:
    """That it has ended without a word would say nothing to anybody."""
    with pytest.raises(NetrulesError, match="KeyError"):
        inject(tools, probe.userns_fd, probe.netns_fd, {"rate": {}})
    assert inject(tools, probe.userns_fd, probe.netns_fd, {}) == {}


def test_a_resting_child_ends_by_itself(tools: Tools, probe: Probe) -> None:
    """It keeps the container's namespace alive, so it must not rest for long."""
    inject(tools, probe.userns_fd, probe.netns_fd, {})
    (child,) = tools.resting.values()
    child.channel.settimeout(10 * REST_S)
    assert child.channel.recv(1) == b""


def test_resting_children_are_few(tools: Tools, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand containers that change at once must not mean a thousand processes."""
    monkeypatch.setattr(netrules, "MAX_RESTING", 1)
    others = [Probe() for _ in range(2)]
    for each in others:
        inject(tools, each.userns_fd, each.netns_fd, {})
        assert len(tools.resting) == 1
        each.close()


def test_netlink_errors_carry_errno_and_request() -> None:
    """The message must say what was asked for, not only that an argument was invalid."""
    with private_netns(), Rtnetlink() as netlink:
        netlink.add_bridge("gdn-test", b"\x0a\0\0\0\0\1")
        with pytest.raises(RtnetlinkError, match="link add gdn-test type bridge") as caught:
            netlink.add_bridge("gdn-test", b"\x0a\0\0\0\0\1")
        assert caught.value.errno == errno.EEXIST
        assert netlink.find_link("gdn-none") is None


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.nft")), ids=lambda path: path.stem)
def test_real_nft_accepts_every_golden_text(path: Path) -> None:
    """A golden file that the kernel's own tool refuses would be golden nonsense."""
    with private_netns():
        if path.stem.startswith("element"):
            nft("-f", "-", text=(GOLDEN / "host_default.nft").read_text())
        nft("-c", "-f", "-", text=path.read_text())


def test_times_are_printed(lab: Lab, tools: Tools) -> None:
    """Figures for the record, not asserted: attach, replace, detach, and the largest usual policy."""
    container = lab.container(2, OPEN)

    def attach() -> None:
        lab.network.attach_container(lab.attachment(container, OPEN), container.netns_fd, container.userns_fd)

    def visit_afresh() -> None:
        inject(tools, container.userns_fd, container.netns_fd, {})
        end_children(tools)

    def cycle() -> None:
        lab.detach(container)
        attach()

    figures = {
        "replace 100 rules": p50_ms(20, lambda: lab.replace(container, policy_of(100))),
        "replace 3000 rules": p50_ms(3, lambda: lab.replace(container, policy_of(3000))),
        "empty injection": p50_ms(20, visit_afresh),
        "detach + attach": p50_ms(20, cycle),
        "detach": p50_ms(1, lambda: lab.detach(container)),
    }
    print("".join(f"\n{name}: {ms:.2f} ms" for name, ms in figures.items()))


def policy_of(count: int) -> EgressPolicy:
    rules = (f"tcp:{IPv4Address(0x0A000000 + (i << 8))}/24:{i + 1}-{i + 100}" for i in range(count))
    return EgressPolicy(DefaultAction.DENY, tuple(parse_egress_rule(rule) for rule in rules))


def p50_ms(times: int, act: Callable[[], object]) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append((time.perf_counter() - start) * 1000)
    return median(taken)
