"""Every message names the field, the value and the remedy; what cannot change a result is not in
the digest.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dra_ray import config
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.sweeps import spaces

SMALL = {"space": {"align.weight": [0.0, 1.0], "align.sigma": [0.1, 0.5]}}


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("digit-dra", [], ["digit-dra", "did you mean 'digits-dra'"]),
        ("digits-dra", ["optim.epoch=3"], ["optim.epoch", "did you mean 'epochs'"]),
        ("digits-dra", ["optm.epochs=3"], ["optm.epochs", "did you mean 'optim.epochs'"]),
        ("digits-dra", ["optim.epochs=0"], ["optim.epochs=0", "greater than or equal to 1"]),
        ("digits-dra", ["optim.epochs"], ["optim.epochs", "field=value"]),
        ("digits-dra", ["optim.lr=fast"], ["optim.lr='fast'", "valid number"]),
        ("digits-dra", ["threat.norm=l7"], ["threat.norm='l7'", "'linf'"]),
        ("digits-dra", ["threat.eps_255=300"], ["threat.eps_255=300", "255"]),
        ("digits-dra", ["threat.step_255=100"], ["threat.step_255=100", "at most 64"]),
        (
            "digits-dra",
            ["pool.min_replicas=3", "pool.max_replicas=2"],
            ["pool.max_replicas=2", "min_replicas=3"],
        ),
        ("digits-dra", ["resources.workers=3"], ["optim.batch=128", "resources.workers=3"]),
        (
            "digits-edm",
            ["resources.validation=beside"],
            ["resources.validation='beside'", "for students", "leave it out"],
        ),
        ("digits-dra", ["compute.cuda_graphs=true"], ["cuda_graphs=true", "compile='off'"]),
        (
            "digits-dra",
            ["compute.cuda_graphs=true", "compute.compile=attack"],
            ["compute.cuda_graphs=true", "resources.gpus_per_worker=0"],
        ),
        (
            "digits-sweep",
            ["base.resources.validation=beside"],
            ["resources.validation", "set in base", "leave it out"],
        ),
        (
            "digits-sweep",
            ['space={"resources.validation": ["workers", "beside"]}'],
            ["resources.validation", "set in space", "leave it out"],
        ),
        ("digits-sweep", ["asha.grace_epochs=99"], ["asha.grace_epochs=99", "epochs=16"]),
        ("digits-sweep", ["space={}"], ["space", "empty"]),
        ("digits-synthesis", ["batch=300"], ["shard_images=500", "batch=300"]),
    ],
)
def test_bad_input_is_one_clear_line(recipe: str, settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(recipe, None, settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert caught.value.exit_code == 2


def test_a_misspelt_field_of_a_file_gets_the_nearest_name(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"optim": {"epocs": 3}}))
    with pytest.raises(ConfigError, match=r"unknown field 'optim.epocs'; did you mean 'epochs'"):
        config.load(str(file))


def test_a_command_refuses_another_kind_of_config() -> None:
    with pytest.raises(ConfigError, match="kind 'sweep'"):
        config.load("digits-sweep", config.Experiment)


@pytest.mark.parametrize("name", config.recipe_names())
def test_every_recipe_validates(name: str) -> None:
    recipe = config.load(name)
    assert getattr(recipe, "description", None)
    if isinstance(recipe, config.Sweep):
        assert spaces.experiments(recipe)


def test_the_pair_differs_only_in_the_alignment_weight() -> None:
    baseline, dra = (
        dict(config.flatten(config.load(n).model_dump())) for n in ("digits-dm-at", "digits-dra")
    )
    assert {k for k in baseline if baseline[k] != dra[k]} == {"align.weight", "description"}


def test_the_digest_ignores_what_cannot_change_a_result() -> None:
    base = config.load("digits-dra", config.Experiment)
    same = config.override(
        base,
        {
            "pool.kind": "local",
            "pool.max_replicas": 9,
            "resources.cpus_per_worker": 2,
            "description": "x",
        },
    )
    assert base.digest() == same.digest()
    for field, value in {
        "seed": 1,
        "align.sigma": 0.31,
        "optim.epochs": 7,
        "teacher.layer": "dec.4x4_in0",
        "evaluation.batch": 7,
        "selection.weights": "better",
    }.items():
        assert config.override(base, {field: value}).digest() != base.digest(), field


def test_a_field_that_came_later_leaves_the_digest_of_older_runs() -> None:
    base = config.load("digits-dra", config.Experiment)
    older = without_added(base, base.model_dump(mode="json"))
    assert "data_seed" not in older
    assert "weights" not in older["selection"]
    assert config.base.digest_of(older) == base.digest()


def without_added(settings: config.base.Frozen, tree: dict[str, Any]) -> dict[str, Any]:
    """A config's tree as it was before its later fields came."""
    added: frozenset[str] = getattr(settings, "ADDED", frozenset())
    parts = {name: getattr(settings, name) for name in tree.keys() - added}
    return {
        name: without_added(part, tree[name])
        if isinstance(part, config.base.Frozen)
        else tree[name]
        for name, part in parts.items()
    }


def test_a_missing_teacher_is_told_with_the_commands_that_make_one() -> None:
    with pytest.raises(ConfigError, match=r"teacher.uri is not set.*dra teacher train"):
        config.load("digits-dra", config.Experiment).with_sources()
    config.load("digits-dm-at", config.Experiment).with_sources()


def test_sigma_makes_no_second_trial_where_there_is_no_alignment() -> None:
    trials = spaces.experiments(config.validate(config.Sweep, SMALL, "test"))
    assert sorted((e.align.weight, e.align.sigma) for e in trials.values()) == [
        (0.0, 0.1),
        (1.0, 0.1),
        (1.0, 0.5),
    ]


def test_drawn_trials_keep_the_baseline_and_are_the_same_every_time() -> None:
    sweep = config.validate(config.Sweep, {**SMALL, "trials": 2}, "test")
    assert spaces.experiments(sweep) == spaces.experiments(sweep)
    assert [e.align.weight for e in spaces.experiments(sweep).values()].count(0.0) == 1


def test_a_config_survives_json(tmp_path) -> None:
    sweep = config.load("digits-sweep", config.Sweep)
    store = Store(str(tmp_path)) / "sweep.json"
    store.write_json(sweep.model_dump(mode="json"))
    assert config.load(store.uri, config.Sweep) == sweep
