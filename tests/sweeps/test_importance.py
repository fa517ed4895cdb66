"""Importance against Optuna's own study, and against truths that are known."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from dra_ray.runs import RungRow
from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.importance import BEST, Importance, importance
from tests.sweeps.logged import ended, row

Trials = dict[str, dict[str, object]]


def drawn(count: int, noise: float, seed: int = 0) -> tuple[Trials, list[RungRow]]:
    """Lambda matters, the learning rate a little less, the name of the schedule not at all."""
    generator = np.random.default_rng(seed)
    trials: Trials = {}
    scores = {}
    for number in range(count):
        weight, rate = generator.uniform(0.1, 4), generator.uniform(0.01, 0.2)
        name = f"trial-{number:03d}"
        trials[name] = {
            "align.weight": weight,
            "optim.lr": rate,
            "optim.schedule": ("one", "two")[number % 2],
        }
        scores[name] = float(0.5 - 0.02 * (weight - 2) ** 2 + noise * generator.normal())
    return trials, ended(scores)


def the_importance(trials: Trials, rows: list[RungRow], **more: int) -> Importance:
    found = importance(trials, rows, **more)
    assert isinstance(found, Importance)
    return found


def test_the_axis_that_decides_comes_first_and_stands_out() -> None:
    found = the_importance(*drawn(40, 0.005), draws=60)
    assert found.axes[0].field == "align.weight"
    assert found.axes[0].stands_out
    assert not any(axis.stands_out for axis in found.axes[1:])
    assert sum(axis.share for axis in found.axes) == pytest.approx(1)
    assert all(axis.interval[0] <= axis.interval[1] for axis in found.axes)
    assert found.trials == 40


def test_shares_are_optunas_own() -> None:
    """A study that Optuna made itself, from the same trials."""
    trials, rows = drawn(30, 0.01)
    weights = [float(fields["align.weight"]) for fields in trials.values()]
    rates = [float(fields["optim.lr"]) for fields in trials.values()]
    ranges = {
        "align.weight": optuna.distributions.FloatDistribution(
            min(weights), max(weights), log=max(weights) / min(weights) >= 30
        ),
        "optim.lr": optuna.distributions.FloatDistribution(min(rates), max(rates)),
        "optim.schedule": optuna.distributions.CategoricalDistribution(["'one'", "'two'"]),
    }
    study = optuna.create_study(direction="maximize")
    for (name, fields), scored in zip(trials.items(), rows, strict=True):
        assert name == scored.trial
        study.add_trial(
            optuna.trial.create_trial(
                params={**fields, "optim.schedule": repr(fields["optim.schedule"])},
                distributions=ranges,
                value=scored.robust_accuracy,
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST)
    theirs = optuna.importance.get_param_importances(study, evaluator=evaluator)
    ours = {axis.field: axis.share for axis in the_importance(trials, rows, draws=2).axes}
    assert ours == pytest.approx(theirs)


@pytest.mark.seconds
def test_noise_stands_out_no_more_often_than_it_may() -> None:
    """Scores without any cause: at level 0.05, of 3 axes and 12 sweeps about 2 stand out."""
    found = 0
    for seed in range(12):
        trials, rows = drawn(24, 0.0, seed)
        chance = np.random.default_rng(seed + 100).uniform(0.3, 0.5, len(rows))
        rows = ended({name: float(score) for name, score in zip(trials, chance, strict=True)})
        found += sum(axis.stands_out for axis in the_importance(trials, rows, draws=40).axes)
    assert found <= 7  # binomial(36, 0.05) passes 7 less than once in 1,000


def test_few_trials_are_refused_in_words() -> None:
    refused = importance(*drawn(9, 0.01))
    assert isinstance(refused, Refused)
    assert "9 trials have comparable scores, and it takes 10" in refused.reason


def test_equal_scores_and_single_values_are_refused() -> None:
    trials, _ = drawn(12, 0.01)
    assert isinstance(importance(trials, ended(dict.fromkeys(trials, 0.3))), Refused)
    alike: Trials = {f"t{n}": {"x": 1} for n in range(12)}
    assert isinstance(
        importance(alike, ended({name: n / 100 for n, name in enumerate(alike)})), Refused
    )


def test_an_axis_without_effect_where_lambda_is_0_does_not_count_there() -> None:
    """Baselines carry a sigma in older sweeps; it must not look good because baselines do."""
    trials: Trials = {}
    scores = {}
    for number in range(24):
        plain = number % 2 == 0
        name = f"trial-{number:03d}"
        trials[name] = {
            "align.weight": 0.0 if plain else 1.0,
            "align.sigma": 0.1 if plain else (0.1, 0.2, 0.3)[number % 3],
        }
        scores[name] = 0.5 + number / 1000 if plain else 0.2 + number / 1000
    found = the_importance(trials, ended(scores), draws=40)
    assert found.axes[0].field == "align.weight"


def test_trials_are_compared_where_half_of_them_got() -> None:
    trials, rows = drawn(20, 0.01)
    early = [row(r.trial, 1, float(r.robust_accuracy or 0)) for r in rows]
    found = the_importance(trials, [*early, *rows[:9]], draws=2)
    assert (found.images_seen, found.trials) == (100, 20)
    found = the_importance(trials, [*early, *rows[:10]], draws=2)
    assert (found.images_seen, found.trials) == (400, 10)
