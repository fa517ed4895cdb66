"""Metrics that are defined, emitted, documented and shown are the same, and dashboards are
well-formed.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dra_ray.config import metrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "dra_ray" / "dashboards"
FILES = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
# of Ray and Prometheus themselves
FOREIGN = {"ray_node_cpu_count", "ALERTS"}
SUFFIXES = {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket"}}
EMITTED = re.compile(r"dra_(train|teacher|sweep|evaluation|data|storage)_\w+")


def dashboard(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def panels(file: Path) -> list[dict[str, Any]]:
    return dashboard(file)["panels"]


def queries() -> list[str]:
    return [
        target["expr"] for file in FILES for panel in panels(file) for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_\w+|ALERTS)\b", expression))


def shown() -> dict[str, str]:
    """Names in Prometheus -> ours."""
    return {
        f"ray_{metric.name}{suffix}": metric.name
        for metric in metrics.ALL
        for suffix in SUFFIXES[metric.kind]
    }


def literals() -> set[str]:
    """Names of metrics in the code, other than where they are defined."""
    return {
        node.value
        for path in sorted((ROOT / "dra_ray").rglob("*.py"))
        if path.name != "metrics.py" or path.parent.name != "config"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and EMITTED.fullmatch(node.value)
    }


def test_what_is_emitted_is_what_is_defined() -> None:
    assert literals() == metrics.BY_NAME.keys()
    assert len(metrics.BY_NAME) == len(metrics.ALL)


def test_every_metric_asked_for_is_defined() -> None:
    asked = set().union(*map(names, queries()), *(names(rule["expr"]) for rule in rules()))
    assert asked - shown().keys() - FOREIGN == set()


def test_every_metric_is_shown() -> None:
    asked = set().union(*map(names, queries()))
    assert metrics.BY_NAME.keys() - {shown().get(name) for name in asked} == set()


def test_every_metric_is_documented() -> None:
    guide = (ROOT / "docs" / "metrics.md").read_text()
    assert metrics.table() in guide, "python -m dra_ray.config.metrics"
    documented = set(re.findall(r"^\| (\w+) \| ", guide, re.MULTILINE)) - {"alert"}
    assert documented == {rule["alert"] for rule in rules()}


def test_labels_asked_for_are_those_of_the_metric() -> None:
    """A misspelt label selects nothing, and says nothing."""
    ray = {"SessionName", "NodeAddress", "WorkerId"}
    for expression in [*queries(), *(rule["expr"] for rule in rules())]:
        for name, selected in re.findall(
            r"\bray_(dra_\w+?)(?:_total|_bucket)?\{([^}]*)\}", expression
        ):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selected))
            assert labels <= ray | set(metrics.BY_NAME[name].labels), expression


def test_trials_stand_on_nothing_that_stays() -> None:
    for metric in metrics.ALL:
        assert "trial" not in metric.labels or metric.kind == "gauge", metric.name


def test_counters_and_histograms_are_asked_for_as_such() -> None:
    for expression in queries():
        for name in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert name.endswith(("_total", "_bucket")), expression
        if "histogram_quantile" in expression:
            assert "sum by (le)" in expression
        assert expression.count("(") == expression.count(")")
        assert expression.count("{") == expression.count("}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_panels_are_well_formed(file: Path) -> None:
    ids = [panel["id"] for panel in panels(file)]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels(file):
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_variables_are_defined(file: Path) -> None:
    whole = dashboard(file)
    defined = {variable["name"] for variable in whole["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(whole["panels"]))) - defined == set()


def test_the_five_dashboards_have_names_of_their_own() -> None:
    assert [file.stem for file in FILES] == ["cost", "overview", "pool", "sweep", "training"]
    assert len({dashboard(file)["uid"] for file in FILES}) == len(FILES)


def test_every_alert_says_what_and_what_to_do() -> None:
    for rule in rules():
        assert {"summary", "remedy"} <= rule["annotations"].keys(), rule["alert"]


def test_prometheus_finds_ray_and_the_rules() -> None:
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [part["file_sd_configs"][0]["files"] for part in settings["scrape_configs"]] == [
        ["/tmp/ray/prom_metrics_service_discovery.json"]
    ]
    assert [(FOLDER / file).is_file() for file in settings["rule_files"]] == [True]


def test_the_containers_find_what_they_mount_and_listen_on_loopback_only() -> None:
    services = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]
    for service in services.values():
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            here = volume.partition(":")[0]
            assert not here.startswith("./") or (FOLDER / here).exists(), volume
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/dra.yml").read_text())
    mounted = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert provider["providers"][0]["options"]["path"] in mounted
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/dra.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
