"""A request in gives exactly this OCI configuration out; a change of a golden file is reviewed like code.

Run with GARDEN_UPDATE_GOLDEN=1 to write the files anew, then read the diff. The seccomp filter is data of its own
(vendor/runc-config/seccomp.json) and stands in the golden files as a digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from garden_py.backend.host.idmap import map_root_apart, range_of
from garden_py.backend.oci.bundle import build_config
from garden_py.backend.oci.data import load_runc_config
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest
from garden_py.model.device import DeviceRule

GOLDEN = Path(__file__).parent / "oci"
ALL_CAPABILITIES = (1 << 41) - 1
WITHOUT_SYS_RESOURCE = ALL_CAPABILITIES & ~(1 << 24)

UNPRIVILEGED = BundleRequest(
    handle="box",
    hostname="box",
    privileged=False,
    id_map=range_of(0x7000_0000, 65_536),
    rootfs="/run/garden/mnt/ab/rootfs",
    cgroup_path="/garden-1a2b/box",
    agent_argv=("/dev/.garden/v/ld.so", "/dev/.garden/v/python3", "-c", "agent"),
    agent_env=("PYTHONHOME=/dev/.garden/v",),
    agent_filter_fd=None,
    agent_source="/run/garden/mnt/ab/agent",
    agent_target="/dev/.garden",
    binds=(("/run/garden/mnt/ab/bind-0", "/data"), ("/run/garden/mnt/ab/hosts", "/etc/hosts")),
)
PRIVILEGED = replace(UNPRIVILEGED, privileged=True, id_map=None)
JOINS = tuple((name, f"/proc/7/fd/{n}") for n, name in enumerate(("user", "pid", "network", "ipc", "uts")))
V1 = HostFacts(cgroup_version=1, bounding_capabilities=ALL_CAPABILITIES, nofile_hard=1_048_576)
V2 = replace(V1, cgroup_version=2, bounding_capabilities=WITHOUT_SYS_RESOURCE, nofile_hard=4096)

CASES = {
    "unprivileged_v1": (UNPRIVILEGED, V1),
    "unprivileged_v2_weak_host": (UNPRIVILEGED, V2),
    "unprivileged_filtering_agent": (replace(UNPRIVILEGED, agent_filter_fd=4), V1),
    "unprivileged_hardened": (
        replace(
            UNPRIVILEGED,
            no_new_privileges=True,
            apparmor_profile="garden-default",
            sysctls=(("net.ipv4.tcp_retries2", "9"),),
        ),
        V1,
    ),
    "unprivileged_aarch64": (replace(UNPRIVILEGED, binds=()), replace(V1, machine="aarch64")),
    "unprivileged_as_reference": (
        replace(UNPRIVILEGED, agent_filter_fd=4, as_reference=True, id_map=map_root_apart(0xFFFF_FFFE)),
        V1,
    ),
    "privileged_as_reference": (replace(PRIVILEGED, as_reference=True), V1),
    "sidecar": (replace(UNPRIVILEGED, joins=JOINS, binds=()), V1),
    "privileged_v1": (replace(PRIVILEGED, sysctls=(("net.ipv4.tcp_retries2", "9"),)), V1),
    "privileged_v2_weak_host": (PRIVILEGED, V2),
    "privileged_of_plugins_with_devices": (
        replace(
            PRIVILEGED,
            first_mounts=(
                {"destination": "/", "type": "overlay", "source": "overlay", "options": ["lowerdir=/a"]},
            ),
            device_rules=(
                DeviceRule("c", 1, 3, "r"),
                DeviceRule("c", 10, 232, "rwm"),
                DeviceRule("b", None, None, "m"),
            ),
        ),
        V1,
    ),
}


def text_of(name: str) -> str:
    config = build_config(*CASES[name], load_runc_config())
    seccomp = config["linux"].get("seccomp")
    if seccomp is not None:
        digest = hashlib.sha256(json.dumps(seccomp["syscalls"], sort_keys=True).encode()).hexdigest()
        config["linux"]["seccomp"] = {**seccomp, "syscalls": digest}
    return json.dumps(config, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", sorted(CASES))
def test_config_is_the_golden_one(name: str) -> None:
    """What the runtime is told changes only when somebody reads the difference."""
    path = GOLDEN / f"{name}.json"
    if os.environ.get("GARDEN_UPDATE_GOLDEN") == "1":
        path.write_text(text_of(name))
    assert text_of(name) == path.read_text()


def test_every_golden_file_has_a_case() -> None:
    """A file that no case writes proves nothing any more."""
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


def config_of(name: str) -> dict[str, Any]:
    return build_config(*CASES[name], load_runc_config())


@pytest.mark.parametrize("name", sorted(name for name in CASES if "reference" not in name))
def test_no_capability_survives_where_it_must_not(name: str) -> None:
    """Never inheritable, never ambient, never what the host lacks: runc would fail with "unable to apply caps"."""
    sets = config_of(name)["process"]["capabilities"]
    assert set(sets) == {"bounding", "effective", "permitted"}
    lacking = "CAP_SYS_RESOURCE" not in sets["bounding"]
    assert lacking or (name.startswith("privileged") and CASES[name][1] is V1)


@pytest.mark.parametrize("name", ["unprivileged_as_reference", "privileged_as_reference"])
def test_as_the_reference_capabilities_are_inheritable(name: str) -> None:
    """All four sets of PID 1 are the same; what the agent lays down again is in the unprivileged ones (C)."""
    sets = config_of(name)["process"]["capabilities"]
    mask = load_runc_config().capability_mask("unprivileged")
    expected = (1 << 38) - 1 if name.startswith("privileged") else mask | 1 << 21
    numbers = load_runc_config().capabilities["numbers"]
    assert set(sets) == {"bounding", "effective", "inheritable", "permitted"}
    assert {sum(1 << numbers.index(each) for each in found) for found in sets.values()} == {expected}


def test_unprivileged_root_is_nobody_on_the_host() -> None:
    """A user namespace with the container's own range; a privileged container has none."""
    linux = config_of("unprivileged_v1")["linux"]
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": 0x7000_0000, "size": 65_536}]
    assert linux["gidMappings"] == linux["uidMappings"]
    assert {"type": "user"} in linux["namespaces"]
    privileged = config_of("privileged_v1")["linux"]
    assert {"type": "user"} not in privileged["namespaces"]
    assert {"type": "network"} in privileged["namespaces"]
    assert "seccomp" not in privileged


def test_building_changes_no_data() -> None:
    """The next container starts from the same base."""
    before = text_of("unprivileged_v1")
    text_of("privileged_v1")
    assert text_of("unprivileged_v1") == before
