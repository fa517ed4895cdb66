"""The simulation against what must hold of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dra_ray.bench import sweep
from dra_ray.sweeps import simulate
from dra_ray.sweeps.simulate import Curves, World

SMALL = World(trials=16, epochs=9, validation_images=256, concurrent=4)


def test_scores_are_binomial_around_the_truth() -> None:
    world = dataclasses.replace(SMALL, wobble=0.0, trials=4)
    draws = [Curves(world, seed) for seed in range(150)]
    off = np.array([c.verdicts(2)[-1].mean() - c.truth[2, -1] for c in draws])
    variance = np.mean([c.truth[2, -1] * (1 - c.truth[2, -1]) / 256 for c in draws])
    assert abs(off.mean()) < 4 * (variance / 150) ** 0.5
    assert off.var() == pytest.approx(variance, rel=0.4)


def test_without_stopping_everything_is_trained() -> None:
    outcome = simulate.play(Curves(SMALL, 0), simulate.rules_of(SMALL)["none"].build())
    assert outcome.images == 1
    assert outcome.finished == outcome.started == SMALL.trials


def test_a_budget_is_spent_and_not_passed() -> None:
    world = dataclasses.replace(SMALL, budget=4)
    for rules in simulate.rules_of(world).values():
        assert simulate.play(Curves(world, 1), rules.build()).images <= 4 / 16


def test_equal_seeds_equal_rows_and_noise_aware_loses_less_than_asha() -> None:
    rules = simulate.rules_of(SMALL, grace_epochs=1)
    rows = {row.scheduler: row for row in simulate.compare(SMALL, rules, repeats=40)}
    again = {row.scheduler: row for row in simulate.compare(SMALL, rules, repeats=40)}
    assert rows == again
    assert rows["asha"].images < rows["noise_aware"].images < rows["none"].images == 1
    assert rows["noise_aware"].regret < rows["asha"].regret


@pytest.mark.seconds
def test_the_table_has_a_row_for_each() -> None:
    rows = sweep.compare(trials=4, repeats=2, grace_epochs=3, level=0.05)
    keys = {(row["question"], row["validation_images"], row["scheduler"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 3 * 5
