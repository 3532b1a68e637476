"""What a real server tells of itself while real containers come and go."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from kit.garden_http import build_head, connect
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot
from prometheus_client.parser import text_string_to_metric_families

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import ContainerSpec, GardenClient, GardenError, NotFound
from garden_py.observe.steps import CREATE_STEPS, DESTROY_STEPS, Step

pytestmark = pytest.mark.root


@dataclass
class Visible:
    """A server of these tests' own, its metrics included."""

    process: ServerProcess
    metrics_port: int

    @property
    def address(self) -> str:
        return self.process.address

    def samples(self) -> dict[tuple[str, ...], float]:
        """Value by name and labels' values, in the order of the labels' names, as Prometheus reads them."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for each in families
            for sample in each.samples
        }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def visible(no_trace: None) -> Iterator[Visible]:
    before, port = snapshot(), free_port()
    with running_server("--metrics", f"127.0.0.1:{port}", "--log-level", "debug") as process:
        yield Visible(process, port)
    assert_no_trace(before)


def test_metrics_tell_where_the_time_goes_and_what_is_used(visible: Visible) -> None:
    """Each step of a create and of a destroy, each call, each byte, each pool."""
    before = visible.samples()
    with GardenClient(visible.address) as garden:
        container = garden.create(ContainerSpec(handle="seen"))
        with container.run(["cat"]) as process:
            process.stdin.write(b"12345")
            process.stdin.close()
            assert process.output(check=True).stdout == b"12345"
        during = visible.samples()
        container.destroy()
        with pytest.raises(NotFound):
            container.info()
    after = visible.samples()
    for step in CREATE_STEPS:
        assert after["garden_create_step_seconds_count", step.value] > 0, step
    for step in DESTROY_STEPS:
        assert after["garden_destroy_step_seconds_count", step.value] > 0, step
    took = {step: after["garden_create_step_seconds_sum", step.value] for step in CREATE_STEPS}
    assert 0 < took[Step.MOUNT] + took[Step.RUNTIME] < took[Step.LAUNCH]
    assert after["garden_create_seconds_count",] == after["garden_destroy_seconds_count",] == 1
    assert after["garden_grpc_calls_total", "OK", "CreateContainer"] == 1
    assert after["garden_grpc_calls_total", "NOT_FOUND", "GetContainer"] == 1
    assert after["garden_grpc_seconds_count", "RunProcess"] == 1
    assert after["garden_stream_bytes_total", "stdin"] == after["garden_stream_bytes_total", "output"] == 5
    assert after["garden_journal_bytes", "database"] > 0
    for pool in ("addresses", "uid_ranges"):
        level = [each["garden_pool_in_use", pool] for each in (before, during, after)]
        assert level == [0, 1, 0]
        assert during["garden_pool_size", pool] > 1
    assert not any("seen" in name for names in after for name in names)


# --- the log


def lines_of(server: ServerProcess) -> list[dict[str, Any]]:
    """Every line that the server has logged, but what is no JSON: fail points, Python's own warnings."""
    found = []
    for line in server.log().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


SECRETS = ("s3cret-of-container", "s3cret-of-process", "s3cret-of-registry", "s3cret-typed", "s3cret-of-http")


def test_every_line_says_who_asked_and_about_what_and_no_secret(no_trace: None, tmp_path: Path) -> None:
    """Ids given by callers of both doors, ids made for those who give none, and secrets in all places they come in."""
    before = snapshot()
    http_socket = f"unix:{tmp_path}/garden-http.sock"
    with running_server("--garden-http", http_socket) as server:
        with grpc.insecure_channel(server.address) as channel:
            garden = garden_pb2_grpc.GardenStub(channel)
            spec = pb.ContainerSpec(handle="told", env=["PASSWORD=s3cret-of-container"])
            _, made = garden.CreateContainer.with_call(
                pb.CreateContainerRequest(spec=spec), metadata=[("x-request-id", "ticket-17")]
            )
            assert ("x-request-id", "ticket-17") in made.trailing_metadata()
            refused = pb.ContainerSpec(
                handle="unfetched",
                image="docker://127.0.0.1:1/none",
                image_auth=pb.RegistryAuth(username="bot", password="s3cret-of-registry"),
            )
            with pytest.raises(grpc.RpcError) as failure:
                garden.CreateContainer(
                    pb.CreateContainerRequest(spec=refused),
                    metadata=[("x-request-id", 'ticket 18, "quoted"')],
                )
            (own_id,) = [value for key, value in failure.value.trailing_metadata() if key == "x-request-id"]
            assert re.fullmatch(r"[0-9a-f]{16}", own_id)
            start = pb.RunProcessRequest.Start(handle="told", spec=pb.ProcessSpec(path="true"))
            list(garden.RunProcess(iter([pb.RunProcessRequest(start=start)])))
        with GardenClient(server.address) as client:
            container = client.container("told")
            with container.run(["cat"], env={"TOKEN": "s3cret-of-process"}) as process:
                process.stdin.write(b"s3cret-typed")
                process.stdin.close()
                assert process.wait().code == 0
            with pytest.raises(GardenError) as not_found:
                container.run(["no-such-program"], env={"TOKEN": "s3cret-of-process"})
        body = b'{"handle":"asked","env":["SECRET=s3cret-of-http"],"network":"nonsense"}'
        head = build_head("POST", "/containers", "X-Request-Id: ticket-19", length=len(body))
        with connect(http_socket) as sock:
            sock.sendall(head + body)
            assert b"\r\nX-Request-Id: ticket-19\r\n" in sock.recv(4096)
        with GardenClient(server.address) as client:
            client.container("told").destroy()
        lines = lines_of(server)
        text = server.log()
    for secret in SECRETS:
        assert secret not in text
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_id[line.get("request_id", "")].append(line)
    assert {"container.created", "rpc.done"} <= {line["event"] for line in by_id["ticket-17"]}
    assert {line["handle"] for line in by_id["ticket-17"]} == {"told"}
    assert {"container.create_failed", "rpc.refused"} <= {line["event"] for line in by_id[own_id]}
    assert {line["handle"] for line in by_id[own_id]} == {"unfetched"}
    assert {"garden.done", "garden.refused"} & {line["event"] for line in by_id["ticket-19"]}
    assert {line["handle"] for line in by_id[not_found.value.request_id]} == {"told"}
    for line in lines:
        if line["event"].startswith(("rpc.", "garden.", "container.")):
            assert line.get("request_id"), line
    destroyed = next(line for line in lines if line["event"] == "container.destroyed")
    assert destroyed["handle"] == "told"
    done = [line for line in lines if line["event"] == "rpc.done" and line["method"].endswith("RunProcess")]
    assert {line["handle"] for line in done} == {"told"}
    assert len({line["request_id"] for line in lines if line["event"] == "rpc.done"}) > 2
    assert_no_trace(before)
