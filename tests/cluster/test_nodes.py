"""Nodes that go away: a spot notice leads to a checkpoint, from which the run goes on elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from dra_ray import config
from dra_ray.storage import Store
from tests.cluster.apart import play

SETTINGS: dict[str, Any] = {
    "model.name": "wrn-10-1",
    "align.weight": 0.0,
    "threat.steps": 3,
    "selection.steps": 3,
    "optim.batch": 128,
    "resources.metrics_steps": 2,
}


def _play(root: Store, changes: dict[str, Any]) -> dict[str, Any]:
    experiment = config.override(config.Experiment(), SETTINGS | changes)
    (root / "experiment.json").write_json(experiment.model_dump(mode="json"))
    return play("tests.cluster.nodes", root.uri, timeout_s=600)


@pytest.mark.slow
def test_a_notice_leads_to_a_checkpoint(tmp_path) -> None:
    """The node's notice comes between two validations; the run goes on elsewhere from a checkpoint
    of that moment. It would train for hours: however fast the machine, it is stopped once it is
    back.
    """
    endless = {"optim.epochs": 10_000, "selection.every_epochs": 10_000}
    seen = _play(Store(str(tmp_path)), endless)
    assert seen["rc"] == 130
    assert seen["checkpoints"], "no checkpoint was written after the notice"
    assert seen["starts"][1]["step"] == seen["checkpoints"][0]
