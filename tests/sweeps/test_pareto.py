"""Non-dominated sorting against the definition, and against Optuna's."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.pareto import Front, front, fronts, undominated
from tests.sweeps.logged import IMAGES, ended, first, row


def beaten(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((other >= one).all() and (other > one).any())


@pytest.mark.parametrize("steps", [3, 10, 10_000])
def test_the_front_is_what_the_definition_says(steps: int) -> None:
    """Few steps make many ties."""
    generator = np.random.default_rng(steps)
    for count in (1, 2, 7, 60):
        scores = generator.integers(steps, size=(count, 2)) / steps
        plain = [not any(beaten(one, other) for other in scores) for one in scores]
        assert undominated(scores).tolist() == plain


def test_fronts_are_optunas() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(30, size=(80, 2)) / 30
    study = optuna.create_study(directions=["maximize", "maximize"])
    for clean, robust in scores:
        study.add_trial(optuna.trial.create_trial(values=[clean, robust]))
    best = {trial.number for trial in study.best_trials}
    assert {int(k) for k in np.flatnonzero(fronts(scores) == 0)} == best
    ranks = fronts(scores)
    for number in range(1, ranks.max() + 1):  # each front is beaten by the one before
        before = scores[ranks == number - 1]
        assert all(any(beaten(one, other) for other in before) for one in scores[ranks == number])


def test_a_sweep_has_its_front_of_finished_trials() -> None:
    trials = {name: {"x": place} for place, name in enumerate("abcd")}
    rows = [
        *ended({"a": first(300)}),
        row("b", 4, first(500), clean=0.7, decision="done"),
        row("c", 4, first(200), clean=0.7, decision="done"),
        row("d", 2, first(900), clean=0.95, decision="stop"),
    ]
    found = front(trials, rows, IMAGES)
    assert isinstance(found, Front)
    assert [place.trial for place in found.best] == ["b", "a"]
    assert [(place.trial, place.front) for place in found.places if place.front > 1] == [("c", 2)]
    shares = {place.trial: place.share_on_front for place in found.places}
    assert shares["b"] == 1.0
    assert shares["c"] < 0.01


def test_nothing_finished_is_refused() -> None:
    assert isinstance(front({"a": {}}, [row("a", 1, 0.2)], IMAGES), Refused)
