"""docs/grafana-dashboard.json and docs/operations.md speak of the metrics that the server renders, and of no others."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from kit.core import Server
from prometheus_client.parser import text_string_to_metric_families

from garden_py.backend.journal import Journal

DOCS = Path(__file__).parents[2] / "docs"
_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABELS_OF_PROMETHEUS = {"instance", "job"}


async def rendered(place: Path) -> dict[str, set[str]]:
    """Names of the samples that a server renders when everything has happened once, with their labels' names."""
    server = Server(journal=Journal(place / "journal.db"))
    core = await server.start()
    metrics = core.metrics
    metrics.watch("garden_journal_bytes", "As in wiring.running_server.", "file", server.journal.file_sizes)
    for counter in (metrics.create_failures, metrics.destroy_failures, metrics.leaks_removed):
        counter.labels("x")
    for counter in (metrics.leaks_found, metrics.grpc_calls, metrics.garden_requests):
        counter.labels("x", "y")
    for histogram in (metrics.grpc_seconds, metrics.garden_seconds):
        histogram.labels("x")
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    await core.close()
    return found


def expressions(value: Any) -> list[str]:
    """Every query in the dashboard."""
    if isinstance(value, dict):
        own = [value["expr"]] if "expr" in value else []
        return own + [each for inner in value.values() for each in expressions(inner)]
    return [each for inner in value for each in expressions(inner)] if isinstance(value, list) else []


def metrics_in(expression: str) -> set[str]:
    return {word for word in _WORD.findall(expression) if word.startswith("garden_")}


def labels_in(expression: str) -> set[str]:
    matched = re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = [name for names in re.findall(r"\bby \(([^)]*)\)", expression) for name in names.split(", ")]
    return {*matched, *grouped} - _LABELS_OF_PROMETHEUS


def legend_labels(dashboard: dict[str, Any]) -> list[tuple[str, set[str]]]:
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [(each["expr"], set(re.findall(r"{{([a-z_]+)}}", each["legendFormat"]))) for each in targets]


@pytest.fixture
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "grafana-dashboard.json").read_text())
    return found


async def test_every_query_is_about_metrics_and_labels_that_there_are(
    dashboard: dict[str, Any], tmp_path: Path
) -> None:
    """A panel of something that was renamed stays empty for ever, which looks as if all were well."""
    known = await rendered(tmp_path)
    queries = expressions(dashboard)
    assert len(queries) > 20
    for query in queries:
        names = metrics_in(query)
        assert names, query
        assert names <= known.keys(), query
        assert labels_in(query) <= set().union(*(known[name] for name in names)), query


def test_legends_name_what_the_query_groups_by(dashboard: dict[str, Any]) -> None:
    for query, labels in legend_labels(dashboard):
        if "by (" in query:
            assert labels <= labels_in(query), query


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


async def test_every_metric_is_documented_and_on_the_dashboard(
    dashboard: dict[str, Any], tmp_path: Path
) -> None:
    samples = {name for name in await rendered(tmp_path) if not name.endswith("_created")}
    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples}
    manual = (DOCS / "operations.md").read_text()
    shown = {re.sub(r"_bucket$", "", name) for query in expressions(dashboard) for name in metrics_in(query)}
    for name in known:
        assert name in manual
        assert name in shown
