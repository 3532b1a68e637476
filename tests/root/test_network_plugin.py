"""An external network plugin: what it cannot be told, and what happens when it does not do as it should.

The statements about it: test_garden_plugins.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import wait_until
from kit.garden_http import GardenHttp, GardenHttpError
from kit.patience import FACTOR
from plugin_lab import ROUTER_IP, PluginLab, obedient, open_plugin_lab  # noqa: F401 - a fixture

from garden_py.client import (
    ContainerSpec,
    Destination,
    EgressAction,
    EgressPolicy,
    EgressProtocol,
    EgressRule,
    GardenClient,
    GardenError,
    Limits,
    NetworkMode,
    PortMapping,
    PortProtocol,
    PortRange,
    Unimplemented,
)

pytestmark = pytest.mark.root
RULE = {
    "protocol": 1,
    "networks": [{"start": "10.1.0.0", "end": "10.1.0.255"}],
    "ports": [{"start": 80, "end": 90}],
}
FAILED = "external networker encountered an error running '{}' action: exit status 1: said on stderr"


@pytest.fixture(scope="module")
def lab(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginLab]:
    with open_plugin_lab(
        tmp_path_factory.mktemp("plugins"), "--destroy-timeout-s", str(2 * FACTOR), image=False
    ) as found:
        yield found


@pytest.fixture
def garden(lab: PluginLab) -> GardenHttp:
    return lab.garden


def test_metrics_are_read_inside(garden: GardenHttp) -> None:
    with garden.container() as handle:
        before = garden.metrics(handle)["NetworkStat"]
        garden.text_of(handle, f"ping -c 3 -i 0.2 -s 1000 -W 5 {ROUTER_IP}")
        after = garden.metrics(handle)["NetworkStat"]
        for name in ("RxBytes", "TxBytes"):
            assert after[name] - before[name] >= 3000


# --- over gRPC


def test_rules_that_allow_can_be_added_and_nothing_else_changed(lab: PluginLab) -> None:
    one = EgressRule(protocol=EgressProtocol.TCP, networks=("10.1.0.0/24",), ports=(PortRange(80),))
    two = EgressRule(protocol=EgressProtocol.UDP, networks=("10.2.0.1",), ports=(PortRange(53),), log=True)
    with GardenClient(lab.server.address) as client:
        box = client.create(ContainerSpec(egress=EgressPolicy(rules=(one,))))
        try:
            asked = lab.network.calls("up")[-1]["asked"]["netout_rules"]
            assert asked == [
                {
                    "protocol": 1,
                    "networks": [{"start": "10.1.0.0", "end": "10.1.0.255"}],
                    "ports": [{"start": 80, "end": 80}],
                }
            ]
            policy = box.egress()
            box.set_egress(EgressPolicy(rules=(one, two), etag=policy.etag))
            told = lab.network.calls()[-1]
            assert told["action"] == "bulk-net-out"
            assert told["asked"]["netout_rules"] == [
                {
                    "protocol": 2,
                    "networks": [{"start": "10.2.0.1", "end": "10.2.0.1"}],
                    "ports": [{"start": 53, "end": 53}],
                    "log": True,
                }
            ]
            calls = len(lab.network.calls())
            for policy in (
                EgressPolicy(rules=(two,)),
                EgressPolicy(default_action=EgressAction.DENY, rules=(one, two)),
                EgressPolicy(rules=(EgressRule(EgressAction.DENY), one, two)),
            ):
                with pytest.raises(Unimplemented):
                    box.set_egress(policy)
            with pytest.raises(Unimplemented):
                box.set_egress(EgressPolicy(rules=(one, two)), cut=True)
            with pytest.raises(Unimplemented):
                box.explain_egress(Destination(EgressProtocol.TCP, "10.1.0.1", 80))
            assert [rule.protocol for rule in box.egress().rules] == [EgressProtocol.TCP, EgressProtocol.UDP]
            assert len(lab.network.calls()) == calls
        finally:
            box.destroy()


@pytest.mark.parametrize(
    "spec",
    [
        ContainerSpec(subnet="10.9.0.0/30"),
        ContainerSpec(limits=Limits(network_rx_bytes_per_s=1 << 20)),
        ContainerSpec(port_mappings=(PortMapping(0, 53, PortProtocol.UDP),)),
        ContainerSpec(egress=EgressPolicy(default_action=EgressAction.DENY)),
        ContainerSpec(egress=EgressPolicy(rules=(EgressRule(EgressAction.DENY),))),
    ],
)
def test_what_a_plugin_cannot_be_told_is_refused(lab: PluginLab, spec: ContainerSpec) -> None:
    """Before anything is begun."""
    calls = len(lab.network.calls())
    with GardenClient(lab.server.address) as client:
        with pytest.raises(Unimplemented, match="network plugin"):
            client.create(spec)
        assert not list(client.list())
    assert len(lab.network.calls()) == calls


def test_bandwidth_cannot_be_limited_later_either(lab: PluginLab) -> None:
    with GardenClient(lab.server.address) as client:
        box = client.create(ContainerSpec())
        try:
            with pytest.raises(Unimplemented, match="network plugin"):
                box.update_limits(Limits(network_tx_bytes_per_s=1 << 20, memory_bytes=64 << 20))
            assert box.limits().memory_bytes == 0
        finally:
            box.destroy()


def test_containers_without_a_network_need_no_plugin(lab: PluginLab) -> None:
    calls = len(lab.network.calls())
    with GardenClient(lab.server.address) as client:
        box = client.create(ContainerSpec(network_mode=NetworkMode.NONE))
        assert box.run(["ls", "/sys/class/net"]).output().stdout == b"lo\n"
        box.destroy()
    assert len(lab.network.calls()) == calls


# --- when it fails


def test_a_failing_up_fails_the_create_and_leaves_nothing(lab: PluginLab, garden: GardenHttp) -> None:
    lab.order("up", "fail")
    with pytest.raises(GardenHttpError) as caught:
        garden.create(handle="box")
    assert caught.value.error["Message"] == FAILED.format("up")
    assert lab.network.calls("down")[-1]["handle"] == "box"
    assert garden.list() == []
    lab.order("up", "")
    with garden.container(handle="box"):
        assert garden.list() == ["box"]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("garbage", "its answer is not what it should be"),
        ('{"Properties": {"garden.network.mapped-ports": "[1]"}}', "is not a list of ports"),
        ('{"Properties": ["a"]}', "its answer is not what it should be: Properties"),
        ('{"dns_servers": ["10.0.0.1\\nnameserver 10.0.0.2"]}', "dns_servers.0: String should match"),
        ('{"search_domains": [""]}', "search_domains.0: String should match"),
        ('{"Properties": {"garden.network.container-ip": "10.0.0.1\\n"}}', "container-ip is not an address"),
        ("flood", "it wrote more than 262144 bytes to its standard output"),
    ],
)
def test_an_answer_that_is_none_fails_the_create(
    lab: PluginLab, garden: GardenHttp, order: str, said: str
) -> None:
    lab.order("up", order)
    with pytest.raises(GardenHttpError) as caught:
        garden.create(handle="box")
    message = caught.value.error["Message"]
    assert message.startswith("external networker encountered an error running 'up' action: ")
    assert said in message
    assert garden.list() == []
    assert not lab.links()
    assert lab.network.calls("down")[-1]["handle"] == "box"


def test_a_failing_net_in_and_net_out_change_nothing(lab: PluginLab, garden: GardenHttp) -> None:
    with garden.container() as handle:
        for action in ("net-in", "net-out"):
            lab.order(action, "fail")
        with pytest.raises(GardenHttpError, match="running 'net-in' action"):
            garden.map_port(handle, 1)
        assert garden.info(handle)["MappedPorts"] == []
        with pytest.raises(GardenHttpError, match="running 'net-out' action"):
            garden.json("POST", f"/containers/{handle}/net/out", RULE)
        with GardenClient(lab.server.address) as client:
            assert not client.container(handle).egress().rules


@pytest.mark.parametrize("action", ["net-in", "net-out"])
def test_what_is_still_being_made_is_ended_before_the_container_goes(
    lab: PluginLab, garden: GardenHttp, action: str
) -> None:
    """Else it could end behind the `down`, and nobody would take away what it has made."""
    handle = garden.create()
    lab.order(action, "hang")
    failures: list[GardenHttpError] = []

    def change() -> None:
        try:
            if action == "net-in":
                garden.map_port(handle, 80)
            else:
                garden.json("POST", f"/containers/{handle}/net/out", RULE)
        except GardenHttpError as error:
            failures.append(error)

    caller = threading.Thread(target=change)
    caller.start()
    wait_until(lambda: lab.network.calls(action) and lab.alive(), "it runs")
    garden.destroy(handle)
    assert not lab.alive()
    caller.join(20 * FACTOR)
    assert "it is being destroyed" in failures[0].message


def test_a_down_that_hangs_does_not_hold_up_the_caller(lab: PluginLab, garden: GardenHttp) -> None:
    """It is killed at the deadline of a destroy, with all that it has started."""
    handle = garden.create()
    lab.order("down", "hang")
    with GardenClient(lab.server.address) as client:
        with pytest.raises(GardenError, match="did not end in"):
            client.container(handle).destroy()
        lab.order("down", "")
        wait_until(lambda: not list(client.list(all_states=True)), "destroyed in the background")
    assert not lab.alive()


# --- restarts


def test_a_killed_server_takes_its_plugin_along(no_trace: None, tmp_path: Path) -> None:
    """Nothing is connected any more after the next server has taken the half-made container away."""
    with open_plugin_lab(tmp_path, image=False) as lab:
        lab.order("up", "hang")
        failures: list[Exception] = []

        def create() -> None:
            try:
                lab.garden.create(handle="box")
            except (GardenHttpError, OSError) as error:
                failures.append(error)

        caller = threading.Thread(target=create)
        caller.start()
        wait_until(lambda: lab.alive(), "the plugin runs")
        (pid,) = lab.alive()
        lab.server.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the plugin has ended")
        caller.join(20 * FACTOR)
        assert failures
        lab.order("up", "")
        lab.server.start()
        wait_until(
            lambda: [call["handle"] for call in lab.network.calls("down")] == ["box"], "box was disconnected"
        )
        with GardenClient(lab.server.address) as client:
            wait_until(lambda: not list(client.list(all_states=True)), "box is gone")


def test_a_restart_keeps_what_the_plugin_has_made(no_trace: None, tmp_path: Path) -> None:
    """Also with a server that has no plugin any more: it has networks of its own, and asks the one of then to end."""
    with open_plugin_lab(tmp_path, image=False) as lab:
        old = lab.garden.create(netin=[{"host_port": 0, "container_port": 80}])
        lab.garden.map_port(old, 7070)
        before = lab.garden.info(old)
        lab.server.kill()
        lab.server.start()
        assert lab.garden.info(old) == before
        assert len(lab.network.calls("up")) == 1
        lab.server.stop()
        at = lab.server.flags.index("--network-plugin")
        given = lab.server.flags[at : at + 3]
        del lab.server.flags[at : at + 3]
        lab.server.start()
        assert lab.garden.info(old) == before
        lab.garden.text_of(old, f"ping -c 1 -W 5 {ROUTER_IP}")
        new = lab.garden.create()
        assert lab.garden.info(new)["ContainerIP"].split(".")[:2] != ["10", "77"]
        lab.server.stop()
        lab.server.flags += given
        lab.server.start()
        with GardenClient(lab.server.address) as client:
            assert not client.check_leaks()
        assert lab.garden.info(new)["HostIP"]
        lab.garden.destroy(new)
        lab.garden.destroy(old)
        assert [call["handle"] for call in lab.network.calls("down")] == [old]


def test_a_create_that_takes_too_long_is_given_up(no_trace: None, tmp_path: Path) -> None:
    with open_plugin_lab(tmp_path, "--create-timeout-s", "2", image=False) as lab:
        lab.order("up", "hang")
        began = time.monotonic()
        with pytest.raises(GardenHttpError, match=r"create deadline has passed|did not end in"):
            lab.garden.create()
        assert time.monotonic() - began < 30 * FACTOR
        assert not lab.alive()
        assert lab.garden.list() == []
