"""`garden diagnose` and `garden inspect` on real containers: healthy, broken, and held by the kernel."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest
from kit.cgroups import pids_in
from kit.garden import wait_until
from kit.server import ServerProcess, running_server
from kit.stuck import FREEZER, held
from kit.trace import assert_no_trace, snapshot

from garden_py.client import (
    ContainerSpec,
    ContainerState,
    EgressPolicy,
    EgressProtocol,
    EgressRule,
    GardenClient,
    Limits,
    PortMapping,
    PortRange,
    Unavailable,
)

pytestmark = pytest.mark.root
SECRET = "s3cret-that-nobody-may-read"


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    before = snapshot()
    with running_server("--destroy-timeout-s", "1") as server:
        yield server
    assert_no_trace(before)


def run_garden(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """As a user would, with stdout into a file or a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "garden_py", *arguments],
        env={**os.environ, "GARDEN_ADDRESS": server.address},
        capture_output=True,
        timeout=60,
    )


def diagnose(server: ServerProcess, handle: str) -> dict[str, bytes]:
    done = run_garden(server, "diagnose", handle)
    assert done.returncode == 0, done.stderr
    found = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found[member.name.removeprefix(f"garden-{handle}/")] = file.read()
    return found


def problems(found: dict[str, bytes]) -> dict[str, str]:
    parts = json.loads(found["summary.json"])["parts"]
    return {part["name"]: part["problem"] for part in parts if part["problem"]}


def make(garden: GardenClient, handle: str) -> Any:
    policy = EgressPolicy(
        rules=(
            EgressRule(protocol=EgressProtocol.TCP, networks=("192.0.2.7",), ports=(PortRange(443, 443),)),
        )
    )
    container = garden.create(
        ContainerSpec(
            handle=handle,
            env={"PASSWORD": SECRET},
            limits=Limits(memory_bytes=64 << 20),
            egress=policy,
            port_mappings=(PortMapping(0, 8080),),
        )
    )
    container.start(["sleep", "1000"], id="sleeper", env={"TOKEN": SECRET})
    container.run(["sh", "-c", "echo $PASSWORD; echo $TOKEN >&2"], env={"TOKEN": SECRET}).wait()
    return container


def test_a_healthy_container_is_told_from_all_sides_and_its_secrets_from_none(server: ServerProcess) -> None:
    with GardenClient(server.address) as garden:
        container, other = make(garden, "web"), make(garden, "other")
        info = container.info()
        found = diagnose(server, "web")
        other_ip = other.info().container_ip
        container.destroy()
        other.destroy()
    assert problems(found) == {}
    assert SECRET.encode() not in b"".join(found.values())
    assert json.loads(found["container.json"])["spec"]["env"] == ["PASSWORD=<removed>"]
    assert {each["id"] for each in json.loads(found["processes.json"])} > {"sleeper"}
    assert json.loads(found["oci/config.json"])["root"]
    assert b"op=spawn id=sleeper" in found["agent/agent.json"]
    assert json.loads(found["agent/agent.json"])["pid_1"]["connected"] is True
    assert str(64 << 20).encode() in found["cgroup.txt"]
    assert json.loads(found["limits.json"])["memory_bytes"] == 64 << 20
    assert json.loads(found["usage.json"])["pids"] >= 1
    assert b"192.0.2.7" in found["rules/container.nft"]
    host_rules = found["rules/host.nft"].decode()
    assert info.container_ip in host_rules
    assert other_ip not in host_rules
    assert b" / / " in found["mountinfo.txt"]
    assert b"/dev/.garden" in found["mountinfo.txt"]
    assert b"sleep 1000" in found["processes/commands.txt"]
    assert b"State:\tS (sleeping)" in found["processes/status.txt"]
    assert b"eth0" in found["network/namespace.txt"]
    assert b"rx_bytes" in found["network/link.txt"]
    assert b"config.json" in found["files.txt"]
    assert b"PROCESS_EXITED" in found["events.jsonl"]
    assert b"container.created" in found["log.jsonl"]


def test_a_broken_container_is_told_with_what_is_left_of_it(server: ServerProcess) -> None:
    with GardenClient(server.address) as garden:
        container = make(garden, "web")
        os.kill(container.info().pid, signal.SIGKILL)
        wait_until(lambda: container.info().state is ContainerState.BROKEN, "the break")
        found = diagnose(server, "web")
        seen = run_garden(server, "inspect", "web")
        container.destroy()
    failed = problems(found)
    assert {"mountinfo.txt", "rules/container.nft", "processes/status.txt"} <= failed.keys()
    assert "PID 1" in failed["mountinfo.txt"]
    assert json.loads(found["container.json"])["state"] == "broken"
    assert json.loads(found["agent/agent.json"])["broken_because"]
    assert json.loads(found["agent/agent.json"])["pid_1"]["connected"] is False
    assert b"op=spawn id=sleeper" in found["agent/agent.json"]
    assert found["rules/host.nft"]
    assert b"CONTAINER_BROKEN" in found["events.jsonl"]
    assert SECRET.encode() not in b"".join(found.values())
    assert seen.returncode == 0, seen.stderr
    assert b"broken" in seen.stdout
    assert b"no answer" in seen.stdout


@pytest.mark.skipif(
    not FREEZER.exists(), reason="cgroup v2 kills what is frozen; nothing else is stuck at will"
)
def test_a_container_that_the_kernel_holds_is_told_while_it_is_held(server: ServerProcess) -> None:
    with GardenClient(server.address) as garden:
        container = make(garden, "stuck")
        (directory,) = FREEZER.glob("garden-*/stuck")
        with held(*pids_in(directory)):
            with pytest.raises(Unavailable):
                container.destroy()
            found = diagnose(server, "stuck")
        wait_until(lambda: not list(garden.list(all_states=True)), "the destroy", timeout_s=40)
    assert json.loads(found["container.json"])["state"] == "unkillable"
    assert b"refrigerator" in found["processes/status.txt"] or b"freeze" in found["processes/status.txt"]
    assert b"cgroup.procs" in found["cgroup.txt"]
    assert b"CONTAINER_UNKILLABLE" in found["events.jsonl"]
    assert b"container.unkillable" in found["log.jsonl"]


def test_a_tar_is_not_written_to_a_terminal_and_nobody_cannot_be_diagnosed(server: ServerProcess) -> None:
    ours, theirs = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        stack.callback(os.close, theirs)
        refused = subprocess.run(
            [sys.executable, "-m", "garden_py", "diagnose", "web"],
            env={**os.environ, "GARDEN_ADDRESS": server.address},
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert refused.returncode == 2
    assert b"garden diagnose HANDLE > bundle.tar" in refused.stderr
    unknown = run_garden(server, "diagnose", "nobody")
    assert (unknown.returncode, unknown.stdout) == (1, b"")
    assert b"nobody" in unknown.stderr


def test_inspect_shows_everything_in_both_forms(server: ServerProcess) -> None:
    with GardenClient(server.address) as garden:
        container = make(garden, "web")
        address = container.info().container_ip
        shown = run_garden(server, "inspect", "web").stdout.decode()
        told = json.loads(run_garden(server, "inspect", "web", "-o", "json").stdout)
        container.destroy()
    for words in (
        "active",
        address,
        "memory 64",
        "tcp:192.0.2.7:443",
        "sleep 1000",
        "8080",
        "PASSWORD",
        "agent",
    ):
        assert words in shown, words
    assert SECRET not in shown
    assert told["container"]["container_ip"] == address
    assert told["limits"]["memory_bytes"] == 64 << 20
    assert told["egress"]["rules"][0]["networks"] == ["192.0.2.7"]
    assert "packets" in told["egress"]["rules"][0]
    assert "sleeper" in {each["id"] for each in told["processes"]}
    assert told["metrics"]["memory_bytes"] > 0
    assert told["container"]["agent"]["current"] is True
    assert told["problems"] == {}
