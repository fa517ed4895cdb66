"""`compute.compile`: three ways, of which two were true and false, on disk as they were."""

from __future__ import annotations

import pytest

from dra_ray import config
from dra_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "name", "kept"),
    [
        ("false", "off", False),
        ("off", "off", False),
        ("true", "forward", True),
        ("forward", "forward", True),
        ("attack", "attack", "attack"),
    ],
)
def test_a_run_of_before_has_the_digest_of_today(given: str, name: str, kept: object) -> None:
    read = config.load("digits-dm-at", config.Experiment, [f"compute.compile={given}"])
    assert read.compute.compile == name
    assert read.model_dump(mode="json")["compute"]["compile"] == kept
    assert config.Experiment.model_validate(read.model_dump(mode="json")).digest() == read.digest()
    assert config.Experiment.model_validate(read.model_dump(mode="json")) == read


@pytest.mark.parametrize("given", ["maybe", "1", "[true]", "{a: 1}", "null"])
def test_anything_else_is_refused_with_what_there_is(given: str) -> None:
    with pytest.raises(ConfigError, match="compute.compile=.*'off', 'forward' or 'attack'"):
        config.load("digits-dm-at", config.Experiment, [f"compute.compile={given}"])


def test_what_cannot_be_one_graph_is_refused_before_anything_starts() -> None:
    together = ["compute.compile=attack", "compute.sync_batchnorm=true", "resources.workers=2"]
    with pytest.raises(ConfigError, match="messages between workers.*compile='forward'"):
        config.load("digits-dm-at", config.Experiment, together)
    growing = {"compute.compile": "attack", "threat.norm": "l2", "threat.start": "normal"}
    with pytest.raises(ConfigError, match="a graph for each of threat.ramp_epochs=5"):
        config.override(config.Experiment(), growing | {"threat.ramp_epochs": 5})
    config.override(config.Experiment(), {"compute.compile": "attack", "threat.ramp_epochs": 5})
