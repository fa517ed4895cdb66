"""Points of a search space: the trials of plain lists by an independent expansion, draws and
conditions by what must hold for every one of them.
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from dra_ray import config
from dra_ray.config import Sweep
from dra_ray.errors import ConfigError
from dra_ray.sweeps import spaces
from dra_ray.sweeps.spaces import Point, Space

LISTS = {
    "three axes": {
        "align.weight": [0.0, 0.5, 2],
        "align.sigma": [0.1, 0.5],
        "optim.lr": [0.2, 0.1],
    },
    "seeds": {"align.weight": [0, 1.0, 2], "align.sigma": [0.5, 0.1], "seed": [0, 1]},
    "no weight": {"align.sigma": [1, 2]},
    "no baseline": {"align.weight": [1, 2, 3], "optim.lr": [0.1, 0.2, 0.3]},
    "lists as values": {"align.weight": [0.0, 1], "evaluation.curve_255": [[4.0], [2.0, 8.0]]},
    "twice the same": {"seed": [3, 1, 1, 2]},
}
MIXED = {
    "align.weight": {"log_uniform": [0.1, 10]},
    "align.sigma": {"uniform": [0.05, 0.5], "when": "align.weight > 0"},
    "loss.beta": {"integer": [1, 9], "step": 2},
    "optim.batch": [64, 128],
}


RANDOM = {"method": "random"}


def sweep(space: dict[str, Any], **fields: Any) -> Sweep:
    return config.validate(Sweep, {"space": space, **fields}, "test")


def expanded(sweep: Sweep) -> dict[str, config.Experiment]:
    """Plain lists, spelt out: every combination in order of the fields' names; sigma counts where
    there is alignment; a draw keeps one baseline and sorts.
    """
    axes: dict[str, list[Any]] = {field: sweep.axes[field].choice or [] for field in sweep.axes}
    unique: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        if "align.sigma" in chosen and config.override(sweep.base, chosen).align.weight == 0:
            chosen["align.sigma"] = axes["align.sigma"][0]
        unique.setdefault(json.dumps(chosen), chosen)
    picked = list(unique.values())
    if sweep.trials is not None and sweep.trials < len(picked):
        baseline = [c for c in picked if c.get("align.weight") == 0][:1]
        rest = [c for c in picked if c not in baseline]
        picked = baseline + random.Random(sweep.seed).sample(rest, sweep.trials - len(baseline))
        picked.sort(key=json.dumps)
    return {f"trial-{n:03d}": config.override(sweep.base, c) for n, c in enumerate(picked)}


@pytest.mark.parametrize("trials", [None, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", LISTS)
def test_plain_lists_give_the_trials_they_always_gave(name: str, trials: int | None) -> None:
    for seed in (0, 2):
        lists = sweep(LISTS[name], trials=trials, seed=seed)
        assert spaces.experiments(lists) == expanded(lists)


def test_recipes_give_the_trials_they_always_gave() -> None:
    quickstart = config.load("quickstart", config.Quickstart).sweep
    for recipe in (config.load("digits-sweep", config.Sweep), quickstart):
        assert spaces.experiments(recipe) == expanded(recipe)


def test_digests_of_recorded_sweeps_stay() -> None:
    """Computed before a sweep had a search, repeats, a scheduler and a budget."""
    recorded = {
        "digits-sweep": "075e587eedcef0c01d76ce28eb728a958c05f6befe29d90b17af49cd5c29a380",
        "cifar10-wrn-28-10-1m-sigma-sweep": "4e8f074bcaf49063695a385b4c897eb8"
        "cbf57a8b78c2df94ae4886c415444162",
    }
    since = {
        "digits-sweep": {"base.optim.norm_momentum": 0.01, "space.align.weight": [0.0, 0.5, 2.0]}
    }
    for name, digest in recorded.items():
        recipe = config.override(config.load(name, Sweep), since.get(name, {}))
        assert recipe.digest() == digest
        for raised in ({"budget.trials": 3}, {"max_failures": 2}, {"asha.max_concurrent": 9}):
            assert config.override(recipe, raised).digest() == digest
        for field, value in {
            "search.method": "random",
            "constraints": ["align.sigma > 0.01"],
            "scheduler": "asha",
            "asha.level": 0.1,
            "repeats.seeds": 2,
            "base.data_seed": 1,
        }.items():
            assert config.override(recipe, {field: value}).digest() != digest, field


def test_what_only_alignment_reads_makes_one_trial_without_it() -> None:
    space = Space(
        sweep(
            {
                "align.weight": [0, 1],
                "align.hidden": [64, 128],
                "teacher.label": ["true", "null"],
                "pool.ahead": [0, 1],
                "optim.lr": [0.1, 0.2],
            }
        )
    )
    points = space.grid()
    assert len(points) == 2 + 2**4
    baselines = [point for point in points if not point["align.weight"]]
    assert baselines == [{"align.weight": 0, "optim.lr": lr} for lr in (0.1, 0.2)]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("align.sigma", [0.1, 0.3]),
        ("align.transform", ["none", "whiten"]),
        ("align.terms", [[], [{"sigma": 0.1, "share": 0.5}, {"layer": "mid", "share": 0.5}]]),
        ("align.loss", ["cosine", "cka"]),
        ("align.decay", ["none", "cosine"]),
        ("align.projector_lr", [0.1, None]),
        ("teacher.tokens", [False, True]),
        ("teacher.layer", ["one", "other"]),
    ],
)
def test_every_option_of_alignment_leaves_one_baseline(field: str, values: list[Any]) -> None:
    trials = spaces.experiments(sweep({"align.weight": [0, 1], field: values}))
    weights = [experiment.align.weight for experiment in trials.values()]
    assert sorted(weights) == [0, 1, 1]
    assert len({experiment.digest() for experiment in trials.values()}) == 3


def test_an_axis_that_nothing_reads_makes_no_trials_of_its_own() -> None:
    """IKL's alpha in TRADES, the share of a set of which no image is used, the size of a whitening
    that is off, and what alignment alone reads without alignment.
    """
    space = {
        "loss.name": ["trades", "ikl"],
        "loss.alpha": [1, 2],
        "align.weight": [0, 1],
        "align.transform": ["centre", "whiten"],
        "align.whiten_dim": [8, 16],
        "synthetic.images": [0, 1000],
        "synthetic.fraction": [0.3, 0.7],
    }
    points = Space(sweep(space)).grid()
    losses, aligned, synthetic = 1 + 2, 1 + 1 + 2, 1 + 2
    assert len(points) == losses * aligned * synthetic
    for point in points:
        assert ("loss.alpha" in point) == (point["loss.name"] == "ikl")
        assert ("align.whiten_dim" in point) == (point.get("align.transform") == "whiten")
        assert ("align.transform" in point) == (point["align.weight"] > 0)
        assert ("synthetic.fraction" in point) == (point["synthetic.images"] > 0)


@pytest.mark.parametrize(
    ("space", "base", "words"),
    [
        ({"loss.alpha": [1, 2]}, {}, "loss.alpha changes no trial: it is read where loss.name is "),
        ({"align.sigma": [0.1, 1]}, {"align": {"weight": 0}}, "align.weight is above 0"),
        ({"align.sigma": [0.1, 1], "align.weight": [0]}, {}, "align.weight is above 0"),
        ({"optim.betas": [[0.9, 0.9], [0.9, 0.99]]}, {}, "optim.name is lion or adamw"),
        ({"optim.momentum": [0.8, 0.9]}, {}, "optim.schedule is not one-cycle"),
        ({"data.split_seed": [0, 1]}, {"data": {"name": "cifar10"}}, "data.name is digits"),
        ({"synthetic.fraction": {"uniform": [0.1, 0.9]}}, {}, "synthetic.images is above 0"),
    ],
)
def test_an_axis_that_no_trial_reads_is_refused(
    space: dict[str, Any], base: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match="take the axis out") as refused:
        sweep(space, base=base, trials=2, search=RANDOM)
    assert words in str(refused.value)


def test_an_axis_is_read_where_one_trial_reads_it() -> None:
    sweep({"loss.name": ["trades", "ikl"], "loss.alpha": [1, 2]})
    sweep({"align.weight": {"uniform": [0, 1]}, "align.sigma": [0.1, 1]}, trials=2, search=RANDOM)


def test_a_condition_leaves_an_idle_axis_out_of_the_point_and_at_base_in_the_experiment() -> None:
    lists = {
        "loss.name": ["trades", "ikl"],
        "loss.alpha": {"choice": [1, 2], "when": "loss.name == 'ikl'"},
        "loss.temperature": {"choice": [1, 2], "when": "loss.alpha > 1"},
    }
    space = Space(sweep(lists))
    assert space.grid() == [
        {"loss.name": "trades"},
        {"loss.alpha": 1, "loss.name": "ikl"},
        {"loss.alpha": 2, "loss.name": "ikl", "loss.temperature": 1},
        {"loss.alpha": 2, "loss.name": "ikl", "loss.temperature": 2},
    ]
    idle = space.experiment(space.grid()[0])
    assert (idle.loss.alpha, idle.loss.temperature) == (4.0, 4.0)  # the defaults


@pytest.mark.parametrize("seed", range(5))
def test_draws_lie_in_their_axes_and_keep_the_constraints(seed: int) -> None:
    rule = "align.sigma * optim.batch <= 20"
    space = Space(
        sweep(MIXED, search={"method": "random"}, trials=9, seed=seed, constraints=[rule])
    )
    points = space.random(300, seed)
    assert points == space.random(300, seed)
    assert points[:50] == space.random(50, seed)
    assert points != space.random(300, seed + 1)
    assert len({space.key(point) for point in points}) == len(points) == 300
    for point in points:
        assert all(value in space.axes[field] for field, value in point.items())
        assert point["align.sigma"] * point["optim.batch"] <= 20
        assert space.experiment(point).loss.beta in (1, 3, 5, 7, 9)
    below_one = sum(point["align.weight"] < 1 for point in points)
    assert 110 < below_one < 190  # half of a logarithmic axis from 0.1 to 10: 150 +- 4 sigma


def test_a_random_search_of_lists_ends_with_its_last_combination() -> None:
    space = Space(sweep(LISTS["three axes"], search={"method": "random"}))
    points = list(space.trials().values())
    assert {space.key(point) for point in points} == {space.key(point) for point in space.grid()}
    assert len(points) == len(space.grid()) == 10


def test_a_space_of_few_whole_numbers_ends() -> None:
    space = Space(sweep({"seed": {"integer": [1, 3]}}, search={"method": "random"}, trials=100))
    assert sorted(point["seed"] for point in space.trials().values()) == [1, 2, 3]


@pytest.mark.parametrize("method", ["random", "tpe", "gp"])
def test_the_baseline_comes_first_and_points_to_try_after_it(method: str) -> None:
    tried: list[Point] = [{"align.weight": 2.0, "align.sigma": 0.2}, {"align.weight": 1.0}]
    searched = sweep(MIXED, search={"method": method, "points": tried}, trials=6)
    trials = list(Space(searched).trials().values())
    assert trials[0] == {"align.weight": 0, "loss.beta": 5.0, "optim.batch": 128}
    assert [t["align.weight"] for t in trials[1:3]] == [2.0, 1.0]
    assert trials[2]["align.sigma"] == searched.base.align.sigma
    assert len(trials) == 6
    first = next(iter(spaces.experiments(searched).values()))
    assert first.align.weight == 0


def test_a_baseline_satisfies_the_constraints() -> None:
    searched = sweep(
        MIXED, search={"method": "random"}, trials=5, constraints=["loss.beta * optim.batch < 200"]
    )
    baseline = Space(searched).baseline()
    assert baseline is not None
    assert not baseline["align.weight"]
    assert baseline["loss.beta"] * baseline["optim.batch"] < 200
    forbidden = sweep(
        MIXED, search={"method": "random"}, trials=5, constraints=["align.weight > 0"]
    )
    assert Space(forbidden).baseline() is None


def test_a_point_has_a_baseline_of_its_own() -> None:
    space = Space(sweep(MIXED, search={"method": "random"}, trials=5))
    point = space.random(1, 0)[0]
    own = space.without_alignment(point)
    kept = {field: point[field] for field in ("loss.beta", "optim.batch")}
    assert own == {"align.weight": 0, **kept}


def test_repeats_differ_in_the_training_seed_alone() -> None:
    space = Space(sweep(LISTS["three axes"], base={"seed": 7}))
    point = space.grid()[3]
    runs = [space.experiment(point, repeat) for repeat in range(3)]
    assert [run.seed for run in runs] == [7, 8, 9]
    assert {run.shared_seed for run in runs} == {7}
    assert runs[0] == space.experiment(point)
    same = {"seed": 7, "data_seed": None}
    assert all(config.override(run, same) == runs[0] for run in runs)


def test_an_invalid_value_names_trial_field_and_value() -> None:
    with pytest.raises(ConfigError, match=r"^trial-001: .*align\.weight=-1: "):
        spaces.experiments(sweep({"align.weight": [1, -1]}))
    excluded = {"loss.name": ["trades", "fgsm-rs"], "threat.steps": [10]}
    with pytest.raises(ConfigError, match=r"^trial-001: loss.name=fgsm-rs, threat.steps=10: "):
        spaces.experiments(sweep(excluded))
    ranged = {"optim.averaging_decay": {"uniform": [0.5, 1.5]}}
    drawn = sweep(ranged, search={"method": "random"}, trials=20)
    with pytest.raises(ConfigError, match=r"^trial-\d+: optim.averaging_decay=1\.\d+"):
        spaces.experiments(drawn)
    learnt = sweep(ranged, search={"method": "tpe"}, trials=3)
    with pytest.raises(ConfigError, match=r"space.optim.averaging_decay: .*averaging_decay=1.5"):
        spaces.experiments(learnt)


def test_a_space_that_constraints_leave_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match="constraints allow no point"):
        Space(sweep({"seed": [1, 2]}, constraints=["seed > 5"])).trials()
    point = {"search": {"points": [{"seed": 2}]}, "constraints": ["seed < 2"]}
    with pytest.raises(ConfigError, match=r"search.points.0=.*violates the constraint 'seed < 2'"):
        Space(sweep({"seed": [1, 2]}, **point)).trials()


def test_trials_of_different_length_are_points_like_others() -> None:
    lengths = Space(sweep({"optim.epochs": [4, 8], "optim.batch": [32, 64]}))
    assert [e.optim.epochs for e in map(lengths.experiment, lengths.grid())] == [4, 8, 4, 8]
