"""The Grafana dashboard speaks of metrics that the code emits, in well-formed panels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from dra_ray.pool import metrics
from dra_ray.workloads import train

FOLDER = Path(__file__).parents[1] / "dashboards"
EMITTED = {**metrics.METRICS, **train.METRICS}
SUFFIXES = r"_(total|bucket|sum|count)$"


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana" / "dra.json").read_text())


def panels() -> list[dict[str, Any]]:
    return dashboard()["panels"]


def expressions() -> list[str]:
    queries = [
        variable["definition"]
        for variable in dashboard()["templating"]["list"]
        if "definition" in variable
    ]
    return queries + [target["expr"] for panel in panels() for target in panel.get("targets", [])]


def names(expression: str) -> set[str]:
    """Metric names of a PromQL expression as the code spells them: without Ray's prefix and
    Prometheus' suffixes.
    """
    return {re.sub(SUFFIXES, "", name) for name in re.findall(r"\bray_(dra_\w+)", expression)}


def test_every_metric_asked_for_is_emitted():
    asked = {name for expression in expressions() for name in names(expression)}
    assert asked - EMITTED.keys() == set()


def test_every_metric_emitted_is_shown():
    shown = {
        name
        for panel in panels()
        for target in panel.get("targets", [])
        for name in names(target["expr"])
    }
    assert EMITTED.keys() - shown == set()


def test_counters_and_histograms_are_asked_for_as_such():
    """`rate` and `increase` take counters and buckets, `histogram_quantile` buckets only, and no
    gauge carries a suffix.
    """
    for expression in expressions():
        for name in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert name.endswith(("_total", "_bucket")), expression
        if "histogram_quantile" in expression:
            assert re.search(r"ray_dra_\w+_seconds_bucket", expression)
            assert "by (le)" in expression
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")


def test_panels_are_well_formed():
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"
            references = [target["refId"] for target in panel["targets"]]
            assert len(references) == len(set(references))


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_variables_are_defined():
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels())))
    assert used - defined == set()


def test_prometheus_finds_ray():
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert [part["file_sd_configs"][0]["files"] for part in scrape] == [
        ["/tmp/ray/prom_metrics_service_discovery.json"]
    ]


def test_provisioning_points_at_the_dashboard():
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/dra.yml").read_text())[
        "providers"
    ][0]
    assert f"{provider['options']['path']}/dra.json" in (FOLDER / "README.md").read_text()
    sources = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/dra.yml").read_text())[
        "datasources"
    ]
    assert [source["type"] for source in sources] == ["prometheus"]
