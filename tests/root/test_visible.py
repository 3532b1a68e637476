"""What a real server tells of itself while real containers come and go."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot
from prometheus_client.parser import text_string_to_metric_families

from garden_py.client import ContainerSpec, GardenClient, NotFound
from garden_py.observe.steps import CREATE_STEPS, DESTROY_STEPS

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
        """Value by name and labels' values, as Prometheus reads them."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            (sample.name, *sample.labels.values()): sample.value
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
    parts = sum(after["garden_create_step_seconds_sum", step] for step in ("mount", "runtime"))
    assert (
        0
        < parts
        < after[
            "garden_create_step_seconds_sum",
            "launch",
        ]
    )
    assert after["garden_create_seconds_count",] == after["garden_destroy_seconds_count",] == 1
    assert after["garden_grpc_calls_total", "CreateContainer", "OK"] == 1
    assert after["garden_grpc_calls_total", "GetContainer", "NOT_FOUND"] == 1
    assert after["garden_grpc_seconds_count", "RunProcess"] == 1
    assert after["garden_stream_bytes_total", "stdin"] == after["garden_stream_bytes_total", "output"] == 5
    assert after["garden_journal_bytes", "database"] > 0
    for pool in ("addresses", "uid_ranges"):
        level = [each["garden_pool_in_use", pool] for each in (before, during, after)]
        assert level == [0, 1, 0]
        assert during["garden_pool_size", pool] > 1
    assert not any("seen" in name for names in after for name in names)
