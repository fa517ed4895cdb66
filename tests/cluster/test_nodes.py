"""Nodes that go away: a spot notice leads to a checkpoint, from which the run goes on elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dra_ray import cluster, config
from dra_ray.storage import Store

SETTINGS: dict[str, Any] = {
    "model.name": "wrn-10-1",
    "align.weight": 0.0,
    "threat.steps": 3,
    "selection.steps": 3,
    "optim.batch": 128,
    "resources.metrics_steps": 2,
}


def _play(root: Store, changes: dict[str, Any]) -> dict[str, Any]:
    wanted = config.override(config.Experiment(), SETTINGS | changes)
    (root / "wanted.json").write_json(wanted.model_dump(mode="json"))
    command = [sys.executable, "-m", "tests.cluster.nodes", root.uri]
    private = cluster.of_our_own()  # what a cluster that other tests share has put there
    environment = {name: value for name, value in os.environ.items() if name not in private}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_notice_leads_to_a_checkpoint(tmp_path) -> None:
    """The node's notice comes between two validations; the run goes on elsewhere from a checkpoint
    of that moment.
    """
    seen = _play(Store(str(tmp_path)), {"optim.epochs": 12, "selection.every_epochs": 12})
    assert seen["rc"] == 0
    assert seen["checkpoints"], "no checkpoint was written after the notice"
    assert seen["starts"][1]["step"] == seen["checkpoints"][0]
