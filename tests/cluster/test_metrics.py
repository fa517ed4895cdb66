"""A real Prometheus scrapes real runs: every panel and every alert rule asks for what is there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dra_ray import cluster, dashboards, runs
from dra_ray.cluster import wait_until
from dra_ray.config import metrics
from dra_ray.errors import ConfigError, RunError
from dra_ray.storage import Store
from dra_ray.workloads import train
from tests.cluster.small import experiment
from tests.dashboards.test_names import FILES, panels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus"),
]
LIMIT_S = 600.0  # for what takes seconds on a machine that is not busy
# rooms of which two runs that train have nothing to tell
ELSEWHERE = ("dra_sweep", "dra_evaluation", "ALERTS")


def test_a_prometheus_that_is_not_there_is_one_line() -> None:
    with (
        pytest.raises(ConfigError, match="--prometheus /nowhere/prometheus"),
        dashboards.prometheus(binary="/nowhere/prometheus"),
    ):
        pass


class Scraped:
    """Two runs of one name that train on one pool until they are stopped, and their Prometheus."""

    def __init__(self, url: str, folders: list[Store], session: str) -> None:
        self.url, self.folders, self.session = url, folders, session

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def labels(self, expression: str, name: str) -> set[str]:
        return {row["metric"].get(name, "") for row in self.query(expression)}


@pytest.fixture(scope="module")
def scraped(
    ray_cluster: Any, teacher: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scraped]:
    folders = [Store(str(tmp_path_factory.mktemp(name) / "run")) for name in ("one", "two")]
    endless = experiment(teacher, optim__epochs=100_000, resources__metrics_steps=1)

    def fit(folder: Store) -> None:
        with pytest.raises(RunError, match="was stopped"):
            train.fit(endless, folder)

    threads = [threading.Thread(target=fit, args=(folder,), daemon=True) for folder in folders]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sessions, session = os.path.split(ray_cluster.address_info["session_dir"])
    with dashboards.prometheus(port, ray_folders=[sessions]) as server:
        for thread, folder in zip(threads, folders, strict=True):
            thread.start()  # Serve's own code may not run in two threads of a process at once
            assert wait_until(lambda: (folder / runs.STEPS).exists(), LIMIT_S), folder  # noqa: B023
        try:
            yield Scraped(server.url, folders, session)
        finally:
            for thread, folder in zip(threads, folders, strict=True):
                cluster.ask_to_stop(folder.uri)
                thread.join()


def test_two_runs_of_one_name_on_one_pool_do_not_merge(scraped: Scraped) -> None:
    both = {runs.metric_labels(folder)["run"] for folder in scraped.folders}
    assert len(both) == 2
    for name in ("teacher_requests_total", "train_images_total", "train_step", "train_accuracy"):
        expression = f"ray_dra_{name} > 0" if name != "train_accuracy" else f"ray_dra_{name}"
        assert wait_until(
            lambda: scraped.labels(expression, "run") >= both,  # noqa: B023
            LIMIT_S,
            2.0,
        ), name


def test_every_counter_is_there_from_the_start(scraped: Scraped) -> None:
    """Also those of which nothing has happened yet, such as errors."""
    for metric in metrics.ALL:
        if metric.kind == "counter" and metric.room != "sweep":
            assert scraped.query(metric.shown), metric.name
    idle = scraped.query(f'ray_dra_storage_retries_total{{SessionName="{scraped.session}"}}')
    assert {row["value"][1] for row in idle} == {"0"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_panel_has_data(scraped: Scraped, file: Path) -> None:
    time.sleep(30)  # `rate` takes two scrapes, which are 10 s apart
    for panel in panels(file):
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", ".*").replace("$window", "5m")
            found = scraped.query(expression)
            if not any(name in expression for name in ELSEWHERE):
                assert found, (panel["title"], expression)


def test_steps_are_split_without_a_rest_that_is_all(scraped: Scraped) -> None:
    parts = {
        row["metric"]["part"]: float(row["value"][1])
        for row in scraped.query("sum by (part) (ray_dra_train_step_seconds_total)")
    }
    assert parts.keys() == set(metrics.PARTS)
    assert parts["attack"] > 0
    assert parts["teacher_wait"] > 0


def test_every_rule_evaluates(scraped: Scraped) -> None:
    def evaluated() -> bool:
        groups = scraped.ask("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return len(found) == 6 and all(rule["health"] == "ok" for rule in found)

    assert wait_until(evaluated, LIMIT_S, 2.0)


def test_gauges_of_a_run_that_has_ended_vanish(scraped: Scraped) -> None:
    gone, stays = scraped.folders
    label = runs.metric_labels(gone)["run"]
    cluster.ask_to_stop(gone.uri)
    assert wait_until(
        lambda: label not in scraped.labels('{__name__=~"ray_dra_train_(step|loss)"}', "run"),
        LIMIT_S,
        2.0,
    )
    assert label in scraped.labels("ray_dra_train_images_total", "run")
    assert runs.metric_labels(stays)["run"] in scraped.labels("ray_dra_train_step", "run")
