"""What the server counts, for Prometheus. A leaf: every layer may be given a `Metrics` and count in it.

To add one, add an attribute here and use it where the thing happens: `metrics.creates.inc()`,
`metrics.leak_check_seconds.time()` around what is timed. Names end in their unit; labels have few values (no handles:
a time series that lives as long as a container is a leak of its own).

Source: prometheus.io/docs/practices/naming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CHECK_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The counters of one server; nothing is global, so tests and embedders may have several.

    Attributes:
        creates, destroys: containers made, containers removed.
        create_failures, destroy_failures: by stable error code, e.g. `unkillable`.
        leaks_found: by kind and direction; each leak once, however long it stays.
        leaks_removed: by kind.
        leak_check_seconds: how long one look of the janitor at the host took.
        janitor_failures: rounds that could not be finished.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.creates = Counter("garden_creates", "Containers made.", registry=registry)
        self.create_failures = Counter(
            "garden_create_failures", "Creates that failed.", ["code"], registry=registry
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
