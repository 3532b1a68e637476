"""Traces of real creates and destroys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit.collector import attributes_of, running_collector
from kit.garden import open_stub
from kit.garden_http import GardenHttp
from kit.server import running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client import ContainerSpec, GardenClient
from garden_py.observe.steps import CREATE_STEPS, DESTROY_STEPS

pytestmark = pytest.mark.root


def test_a_create_is_one_trace_with_its_steps_and_so_is_a_destroy(no_trace: None) -> None:
    """All of them have arrived when the server has stopped."""
    before = snapshot()
    with running_collector() as collector:
        with (
            running_server("--otel-endpoint", collector.endpoint) as server,
            GardenClient(server.address) as garden,
        ):
            garden.create(ContainerSpec(handle="seen")).destroy()
        ((create, *created),) = collector.traces("create")
        ((destroy, *destroyed),) = collector.traces("destroy")
    assert {span.name for span in created} == {step.value for step in CREATE_STEPS}
    assert {span.name for span in destroyed} == {step.value for step in DESTROY_STEPS}
    assert attributes_of(create)["garden.handle"] == attributes_of(destroy)["garden.handle"] == "seen"
    assert len(attributes_of(create)["garden.request_id"]) == 16
    assert [created[0].name, created[1].name] == ["image", "lease"]
    (launch,) = [span for span in created if span.name == "launch"]
    (runtime,) = [span for span in created if span.name == "runtime"]
    assert launch.start_time_unix_nano <= runtime.start_time_unix_nano < launch.end_time_unix_nano
    assert_no_trace(before)


def test_a_create_is_part_of_its_callers_trace(no_trace: None, tmp_path: Path) -> None:
    """By gRPC metadata, and by a header of the Garden door."""
    before = snapshot()
    theirs, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    header = ("traceparent", f"00-{theirs}-{parent}-01")
    door = f"unix:{tmp_path}/garden.sock"
    with running_collector() as collector:
        with (
            running_server("--otel-endpoint", collector.endpoint, "--garden-http", door) as server,
            GardenClient(server.address) as garden,
            open_stub(server.address) as stub,
        ):
            request = pb.CreateContainerRequest(spec=pb.ContainerSpec(handle="one"))
            stub.CreateContainer(request, metadata=(header,), timeout=60)
            body = b'{"handle": "two", "image": {}, "limits": {}}'
            assert GardenHttp(door).call("POST", "/containers", body, ": ".join(header)).status == 200
            for handle in ("one", "two"):
                garden.container(handle).destroy()
        assert len(collector.traces("destroy")) == 2
        found = [span for span in collector.spans if span.parent_span_id.hex() == parent]
    assert {attributes_of(span)["garden.handle"] for span in found} == {"one", "two"}
    for span in found:
        assert (span.name, span.trace_id.hex()) == ("create", theirs)
    assert_no_trace(before)


def test_a_server_says_what_is_wrong_with_its_endpoint(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "garden_py", "server", "--otel-endpoint", "nonsense",
         "--state-dir", f"{tmp_path}/state", "--run-dir", f"{tmp_path}/run"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "--otel-endpoint" in done.stderr
    assert "http://127.0.0.1:4318" in done.stderr
