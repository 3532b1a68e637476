"""What the server counts, for Prometheus. A leaf: every layer may be given a `Metrics` and count in it.

To add one, add an attribute here and use it where the thing happens: `metrics.creates.inc()`,
`metrics.leak_check_seconds.time()` around what is timed. Names end in their unit; labels have few values (no handles:
a time series that lives as long as a container is a leak of its own).

Source: prometheus.io/docs/practices/naming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from garden_py.observe import steps

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CHECK_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)
_CALL_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Stream(StrEnum):
    """What flows between callers and containers."""

    STDIN = "stdin"
    OUTPUT = "output"
    FILES_IN = "files_in"
    FILES_OUT = "files_out"


class Metrics:
    """The counters of one server; nothing is global, so tests and embedders may have several.

    Attributes:
        creates, destroys: containers made, containers removed.
        create_failures, destroy_failures: by stable error code, e.g. `unkillable`.
        leaks_found: by kind and direction; each leak once, however long it stays.
        leaks_removed: by kind.
        leak_check_seconds: how long one look of the janitor at the host took.
        janitor_failures: rounds that could not be finished.
        create_seconds, create_step_seconds, destroy_seconds, destroy_step_seconds: of what was done, failures left out;
            steps as in observe/steps.py, some of which overlap.
        grpc_calls: that have ended, by method and status code.
        grpc_seconds: until the answer, of a method that streams until its first one; by method, failures left out.
        garden_requests: that have been answered, by route and status.
        garden_seconds: until the answer or the head of a stream; by route.
        stream_bytes: by stream, as taken from callers and sent to them, by both doors.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.creates = Counter("garden_creates", "Containers made.", registry=registry)
        self.create_failures = Counter(
            "garden_create_failures", "Creates that failed after they had begun.", ["code"], registry=registry
        )
        self.destroys = Counter("garden_destroys", "Containers removed.", registry=registry)
        self.destroy_failures = Counter(
            "garden_destroy_failures", "Destroys that failed, retries included.", ["code"], registry=registry
        )
        self.leaks_found = Counter(
            "garden_leaks_found",
            "Differences between journal and host.",
            ["kind", "direction"],
            registry=registry,
        )
        self.leaks_removed = Counter(
            "garden_leaks_removed", "Orphans removed from the host.", ["kind"], registry=registry
        )
        self.leak_check_seconds = Histogram(
            "garden_leak_check_seconds",
            "Time of one look at the host.",
            buckets=_CHECK_BUCKETS_S,
            registry=registry,
        )
        self.janitor_failures = Counter(
            "garden_janitor_failures", "Rounds of the janitor that failed.", registry=registry
        )
        self.create_seconds, self.create_step_seconds = _operation(
            "create", steps.CREATE_STEPS, registry=registry
        )
        self.destroy_seconds, self.destroy_step_seconds = _operation(
            "destroy", steps.DESTROY_STEPS, registry=registry
        )
        self.grpc_calls = Counter(
            "garden_grpc_calls",
            "Calls of the gRPC door that have ended.",
            ["method", "code"],
            registry=registry,
        )
        self.grpc_seconds = Histogram(
            "garden_grpc_seconds",
            "Time until the answer, of streams until the first one.",
            ["method"],
            buckets=_CALL_BUCKETS_S,
            registry=registry,
        )
        self.garden_requests = Counter(
            "garden_http_requests",
            "Requests that the Garden door has answered.",
            ["route", "status"],
            registry=registry,
        )
        self.garden_seconds = Histogram(
            "garden_http_seconds",
            "Time until the answer, of streams until their head.",
            ["route"],
            buckets=_CALL_BUCKETS_S,
            registry=registry,
        )
        self.stream_bytes = Counter(
            "garden_stream_bytes", "Bytes taken from callers and sent to them.", ["stream"], registry=registry
        )
        self._streams = {stream: self.stream_bytes.labels(stream.value) for stream in Stream}

    def streamed(self, stream: Stream, count: int) -> None:
        """Count bytes of a stream."""
        self._streams[stream].inc(count)

    def operation_ended(self, operation: steps.Operation) -> None:
        """A `steps.Listener`."""
        is_create = operation.name == steps.CREATE
        whole = self.create_seconds if is_create else self.destroy_seconds
        each = self.create_step_seconds if is_create else self.destroy_step_seconds
        if not operation.failure:
            whole.observe(operation.took_ns / 1e9)
        for step in operation.steps:
            if not step.failure:
                each.labels(step.step.value).observe(step.took_ns / 1e9)

    def watch(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """A gauge that is read at each scrape.

        Args:
            name: of the metric, with its unit.
            text: its help line.
            label: name of its only label.
            read: value of the label to value; called in the event loop.
        """
        self._registry.register(_Gauge(name, text, label, read))

    def render(self) -> bytes:
        """All of them in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


def _operation(
    name: str, names: Iterable[steps.Step], *, registry: CollectorRegistry
) -> tuple[Histogram, Histogram]:
    """The histograms of an operation and of its steps, which are there before the first is taken."""
    whole = Histogram(
        f"garden_{name}_seconds",
        f"Time of a whole {name}.",
        buckets=_STEP_BUCKETS_S,
        registry=registry,
    )
    each = Histogram(
        f"garden_{name}_step_seconds",
        f"Time of one step of a {name}; steps may overlap.",
        ["step"],
        buckets=_STEP_BUCKETS_S,
        registry=registry,
    )
    for step in names:
        each.labels(step.value)
    return whole, each


class _Gauge(Collector):
    def __init__(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        self._name, self._text, self._label, self._read = name, text, label, read

    def describe(self) -> Iterable[Metric]:
        """Without it, registering would read the gauge before there is anything to read."""
        return [GaugeMetricFamily(self._name, self._text, labels=[self._label])]

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=[self._label])
        for value, number in self._read().items():
            family.add_metric([value], number)
        return [family]
