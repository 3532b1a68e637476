"""External plugins as the statements have it: MP1 to MP4, N40 to N44, N31, M11, L12 and CA1, by every client.

What else plugins may do, and what becomes of it when they fail: test_image_plugin.py, test_network_plugin.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from garden_image import garden_door_of
from kit.garden import wait_until
from kit.garden_foreign import ForeignGarden
from kit.garden_grpc import GrpcGarden
from kit.garden_http import GardenClientBase, GardenHttpError, WireClient
from kit.patience import FACTOR
from plugin_lab import ROUTER_IP, PluginLab, obedient, open_plugin_lab  # noqa: F401 - a fixture

from garden_py.client import GardenClient
from garden_py.config import load_config

pytestmark = pytest.mark.root
IMAGE = "docker:///cloudfoundry/cflinuxfs4#1.2"
TCP_RULE = {
    "protocol": 1,
    "networks": [{"start": "10.1.0.0", "end": "10.1.0.255"}],
    "ports": [{"start": 80, "end": 90}],
}
PING_RULE = {"protocol": 3, "icmps": {"type": 8, "code": 0}, "log": True}


@pytest.fixture(scope="module")
def lab(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginLab]:
    with open_plugin_lab(tmp_path_factory.mktemp("plugins")) as found:
        yield found


@pytest.fixture(scope="module", params=["by hand", "foreign", "grpc"])
def garden(request: pytest.FixtureRequest, lab: PluginLab) -> Iterator[GardenClientBase]:
    """As in test_garden_statements.py."""
    if request.param == "by hand":
        yield lab.garden
        return
    other = (
        GrpcGarden(lab.server.address)
        if request.param == "grpc"
        else ForeignGarden(garden_door_of(lab.server))
    )
    yield other
    other.close()


def output_of(*argv: str) -> str:
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20 * FACTOR)
    return done.stdout


# --- image plugins


@pytest.mark.parametrize("privileged", [False, True])
def test_MP1_MP3_MP4_the_plugin_makes_the_root(
    lab: PluginLab, garden: GardenClientBase, privileged: bool
) -> None:
    """Its root is written to as it is; users and variables are those of the image; both plugins are told to delete."""
    made_by = lab.privileged_image if privileged else lab.image
    spec = {
        "image": {"uri": IMAGE, "username": "u", "password": "sesame"},
        "privileged": privileged,
        "limits": {"disk_limits": {"byte_hard": 10 << 20, "scope": 1}},
    }
    with garden.container(**spec) as handle:
        extra = [] if privileged else ["--store=/plain"]
        uri = IMAGE.replace("#", ":")
        limit = ["--disk-limit-size-bytes", str(10 << 20), "--exclude-image-from-quota"]
        who = ["--username", "u", "--password", "sesame"]
        assert made_by.calls("create")[-1]["argv"] == [*extra, "create", *limit, *who, uri, handle]
        assert garden.text_of(handle, "cat /tmp/made-by-plugin") == uri
        assert garden.text_of(handle, "echo $FROM_PLUGIN") == "yes\n"
        assert garden.text_of(handle, "stat -c %U /home/alice /root /bin/busybox").split() == [
            "alice",
            "root",
            "root",
        ]
        garden.text_of(handle, "echo mine > $HOME/note", user="alice")
        garden.text_of(handle, "echo root > /root/note && chown testuser /root/note")
        root = made_by.place / "store" / handle / "rootfs"
        assert (root / "root/note").stat().st_uid == 1000
        assert (root / "home/alice/note").stat().st_uid == 1001
        assert made_by.roots() == [handle]
    for plugin in (lab.image, lab.privileged_image):
        assert plugin.calls("delete")[-1]["id"] == handle
        assert plugin.roots() == []
    assert "sesame" not in lab.server.log()


def test_a_limit_on_all_disk_space_is_told_as_such(lab: PluginLab, garden: GardenClientBase) -> None:
    """Garden's default scope counts the image as well; without a limit nothing is said of one."""
    with garden.container(image={"uri": IMAGE}, limits={"disk_limits": {"byte_hard": 20 << 20}}):
        call = lab.image.calls("create")[-1]
        assert (call["disk_limit_size_bytes"], call["exclude_image_from_quota"]) == (20 << 20, False)
    with garden.container(image={"uri": IMAGE}):
        assert lab.image.calls("create")[-1]["disk_limit_size_bytes"] is None


def test_MP2_the_plugin_counts(lab: PluginLab, garden: GardenClientBase) -> None:
    with garden.container(image={"uri": IMAGE}) as handle:
        before = garden.metrics(handle)["DiskStat"]
        garden.text_of(handle, "dd if=/dev/zero of=/root/some bs=1M count=3")
        after = garden.metrics(handle)["DiskStat"]
        for name in ("ExclusiveBytesUsed", "TotalBytesUsed"):
            assert after[name] - before[name] == 3 << 20
        assert after["TotalBytesUsed"] > after["ExclusiveBytesUsed"]
        assert lab.image.calls("stats")[-1]["id"] == handle


@pytest.mark.garden_only("gRPC knows of no store of somebody else's")
def test_MP2_CA1_the_plugin_says_what_its_store_can_hold(garden: WireClient) -> None:
    wait_until(
        lambda: garden.json("GET", "/capacity")["schedulable_disk_in_bytes"] == 12_345_678_912, "it was asked"
    )


def test_MP3_metrics_ask_the_unprivileged_plugin_first(lab: PluginLab, garden: GardenClientBase) -> None:
    with garden.container(image={"uri": IMAGE}, privileged=True) as handle:
        assert garden.metrics(handle)["DiskStat"]["TotalBytesUsed"] > 0
        assert lab.image.calls("stats")[-1]["id"] == handle
        assert lab.privileged_image.calls("stats")[-1]["id"] == handle


def test_MP4_a_sidecars_root_is_made_by_its_process_id(lab: PluginLab, garden: GardenClientBase) -> None:
    with garden.container(image={"uri": IMAGE}) as handle:
        process = garden.run(handle, "sleep", "600", id="side-1", image={"uri": "docker:///side"})
        wait_until(lambda: lab.image.calls("create")[-1]["id"] == "side-1", "it is made")
        assert lab.image.roots() == sorted([handle, "side-1"])
        process.signal(1)  # KILL, in the protocol's numbers
        process.wait()
        wait_until(lambda: lab.image.roots() == [handle], "it is removed")
        assert lab.image.calls("delete")[-1]["id"] == "side-1"


@pytest.mark.garden_only("over gRPC metrics are asked for by container and process")
def test_MP4_metrics_of_a_sidecar(lab: PluginLab, garden: WireClient) -> None:
    with garden.container(image={"uri": IMAGE}) as handle:
        process = garden.run(handle, "sleep", "600", id="side-2", image={"uri": IMAGE})
        found = garden.json("GET", "/containers/bulk_metrics?handles=side-2")["side-2"]
        assert found["Err"] is None
        assert found["Metrics"]["DiskStat"]["TotalBytesUsed"] > 0
        assert lab.image.calls("stats")[-1]["id"] == "side-2"
        process.signal(1)
        process.wait()


def test_M11_a_failing_create_is_told_in_the_plugins_words(lab: PluginLab, garden: GardenClientBase) -> None:
    """Clients look at the text."""
    with pytest.raises(GardenHttpError) as caught:
        garden.create(image={"uri": "docker:///missing"}, handle="box")
    told = "docker:///missing does not exist or you do not have permissions to see it."
    assert caught.value.error["Message"] == f"running image plugin create: {told}"
    lab.order("create", "fail")
    with pytest.raises(GardenHttpError) as caught:
        garden.create(image={"uri": IMAGE}, handle="box")
    assert caught.value.error["Message"] == "running image plugin create: said on stdout"
    assert lab.image.calls("delete")[-1]["id"] == "box"
    assert garden.list() == []


# --- the network plugin


@pytest.mark.parametrize("privileged", [False, True])
def test_N40_N41_N43_a_container_is_connected_by_the_plugin(
    lab: PluginLab, garden: GardenClientBase, privileged: bool
) -> None:
    """It is told what the container wants and which process is in its namespace; what it answers is the container's."""
    spec: dict[str, Any] = {
        "privileged": privileged,
        "properties": {
            "network.app_id": "a1",
            "network.ports": "8080",
            "log_config": '{"guid":"g"}',
            "other": "x",
        },
        "netin": [{"host_port": 0, "container_port": 8080}, {"host_port": 9500, "container_port": 2222}],
        "netout_rules": [TCP_RULE, PING_RULE],
    }
    with garden.container(**spec) as handle:
        call = lab.network.calls("up")[-1]
        assert call["argv"] == ["--config=/c.json", "--action", "up", "--handle", handle]
        asked = call["asked"]
        assert asked["Properties"] == {"app_id": "a1", "ports": "8080", "log_config": '{"guid":"g"}'}
        assert asked["netin"] == spec["netin"]
        assert asked["netout_rules"] == spec["netout_rules"]
        assert Path(f"/proc/{asked['Pid']}/comm").read_text().strip() == "garden-init"
        info = garden.info(handle)
        address = info["ContainerIP"]
        assert re.fullmatch(r"10\.77\.0\.\d+", address)
        assert (info["HostIP"], info["ContainerIPv6"]) == (ROUTER_IP, "")
        assert [port["ContainerPort"] for port in info["MappedPorts"]] == [8080, 2222]
        assert info["MappedPorts"][1]["HostPort"] == 9500
        properties = info["Properties"]
        assert properties["garden.network.interface"] == "eth7"
        assert properties["plugin.color"] == "green"
        assert properties["other"] == "x"
        garden.text_of(handle, f"ping -c 1 -W 5 {ROUTER_IP}")
    assert lab.network.calls("down")[-1]["handle"] == handle
    assert lab.network.calls("down")[-1]["asked"] is None
    assert not lab.links()


@pytest.mark.garden_only("over gRPC they are fields")
def test_N41_what_the_plugin_answers_are_properties(garden: WireClient) -> None:
    with garden.container(netin=[{"host_port": 0, "container_port": 8080}]) as handle:
        info = garden.info(handle)
        properties = info["Properties"]
        assert properties["garden.network.container-ip"] == info["ContainerIP"]
        assert json.loads(properties["garden.network.mapped-ports"]) == info["MappedPorts"]
        assert properties["garden.network.external-ip"] == info["ExternalIP"]


def test_N31_names_are_served_by_whom_the_plugin_says(garden: GardenClientBase) -> None:
    with garden.container() as handle:
        lines = garden.text_of(handle, "cat /etc/resolv.conf").splitlines()
        told = [line for line in lines if line.split()[0] in ("search", "nameserver")]
        assert told == ["search apps.internal example.org", f"nameserver {ROUTER_IP}"]
        address = garden.info(handle)["ContainerIP"]
        assert f"{address} {handle}" in garden.text_of(handle, "cat /etc/hosts")
        garden.text_of(handle, "echo mine >> /etc/hosts")


def test_N42_ports_and_destinations_are_added(lab: PluginLab, garden: GardenClientBase) -> None:
    with garden.container() as handle:
        address = garden.info(handle)["ContainerIP"]
        external = garden.info(handle)["ExternalIP"]
        assert garden.map_port(handle, 7070) == (9999, 7070)
        asked = lab.network.calls("net-in")[-1]["asked"]
        assert asked == {"HostIP": external, "HostPort": 0, "ContainerIP": address, "ContainerPort": 7070}
        assert garden.info(handle)["MappedPorts"] == [{"HostPort": 9999, "ContainerPort": 7070}]
        garden.net_out(handle, TCP_RULE)
        assert lab.network.calls("net-out")[-1]["asked"] == {"container_ip": address, "netout_rule": TCP_RULE}
        garden.net_out(handle, TCP_RULE, PING_RULE)
        assert lab.network.calls("bulk-net-out")[-1]["asked"] == {
            "container_ip": address,
            "netout_rules": [TCP_RULE, PING_RULE],
        }


def test_N44_there_is_nothing_of_our_own(lab: PluginLab, garden: GardenClientBase) -> None:
    """No table, no link of the server's; the external address is told to everybody before the plugin speaks."""
    with garden.container() as handle:
        tag = load_config({"state_dir": str(lab.server.place / "state")}, environ={}).tag
        assert f"garden_{tag}" not in output_of("nft", "list", "tables")
        assert f"gdn{tag}" not in output_of("ip", "-o", "link", "show")
        assert garden.info(handle)["ExternalIP"]
        with GardenClient(lab.server.address) as client:
            assert not client.check_leaks()


@pytest.mark.garden_only("over gRPC it is a number of its own kind")
def test_N44_CA1_addresses_do_not_bound_the_number_of_containers(garden: WireClient) -> None:
    assert garden.json("GET", "/capacity")["max_containers"] == 300  # of --uid-pool-size


def test_L12_a_failing_down_keeps_the_container_till_it_succeeds(
    lab: PluginLab, garden: GardenClientBase
) -> None:
    """The server tries again by itself."""
    handle = garden.create()
    lab.order("down", "fail")
    with pytest.raises(GardenHttpError, match="running 'down' action: exit status 1: said on stderr"):
        garden.destroy(handle)
    with GardenClient(lab.server.address) as client:
        assert [each.handle for each in client.list(all_states=True)] == [handle]
        lab.order("down", "")
        wait_until(lambda: not list(client.list(all_states=True)), "destroyed in the background")
