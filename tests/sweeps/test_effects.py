"""Effect curves: on grids whose answer is plain, and their intervals on known truths."""

from __future__ import annotations

import numpy as np
import pytest

from dra_ray.evaluation import intervals
from dra_ray.runs import RungRow
from dra_ray.sweeps.effects import LEVELS, Curve, curves, levels
from tests.sweeps.logged import IMAGES, ended, first, row


def one(field: str, trials: dict, rows: list[RungRow]) -> Curve:
    (curve,) = curves(field, trials, rows, IMAGES)
    return curve


def test_a_level_is_the_mean_of_its_trials() -> None:
    trials = {
        f"{w}-{n}": {"align.weight": w, "synthetic.images": n} for w in (0, 1) for n in (0, 9)
    }
    rows = ended({"0-0": 0.2, "0-9": 0.4, "1-0": 0.5, "1-9": 0.5})
    curve = one("align.weight", trials, rows)
    assert [level.centre for level in curve.levels] == [0, 1]
    assert [level.robust_accuracy for level in curve.levels] == pytest.approx([0.3, 0.5])
    assert curve.levels[1].difference == pytest.approx(0.2)
    assert curve.unequal == ()


def test_a_single_trial_has_wilsons_interval() -> None:
    trials = {"a": {"x": 1}, "b": {"x": 2}}
    curve = one("x", trials, ended({"a": first(300), "b": first(400)}))
    assert curve.levels[0].robust_interval == intervals.wilson(300, IMAGES)


def test_trials_are_compared_where_every_level_got() -> None:
    trials = {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}
    rows = [row("a", n, 0.1 * n) for n in (1, 2, 3)] + [row("b", 1, 0.3), row("c", 2, 0.1)]
    rows += [row("c", 1, 0.05)]
    curve = one("x", trials, rows)
    assert (curve.images_seen, curve.left_out) == (200, ("b",))
    assert [level.robust_accuracy for level in curve.levels] == pytest.approx([0.2, 0.1])


def test_a_paired_difference_has_less_noise_than_its_ends() -> None:
    """On the same images: 10 of 1,000 more, all of them images where the other is wrong."""
    trials = {"a": {"x": 1}, "b": {"x": 2}}
    paired = one("x", trials, ended({"a": first(400), "b": first(410)})).levels[1]
    alone = one("x", trials, ended({"a": 0.40, "b": 0.41})).levels[1]
    assert paired.difference_interval is not None
    assert alone.difference_interval is not None
    assert paired.difference_interval[0] > 0 > alone.difference_interval[0]


@pytest.mark.seconds
def test_the_interval_of_a_difference_covers_the_truth() -> None:
    """Verdicts that trials share in part, as models on the same images do; the truth is +5
    points.
    """
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(80):
        hard = generator.random(400)
        verdicts = {
            name: hard + 0.1 * generator.normal(size=400) < level
            for name, level in (("a", 0.40), ("b", 0.45))
        }
        curve = one("x", {"a": {"x": 1}, "b": {"x": 2}}, ended(verdicts))
        low, high = curve.levels[1].difference_interval or (0, 0)
        held += low <= 0.05 <= high
    assert held >= 70


def test_many_numbers_become_ranges_and_zero_stays_alone() -> None:
    values = {f"t{n:03d}": 0.0 if n < 5 else n / 10 for n in range(41)}
    groups = levels(values)
    assert len(groups) == LEVELS
    assert groups[0] == [f"t{n:03d}" for n in range(5)]
    assert sorted(name for group in groups for name in group) == sorted(values)
    assert [max(values[n] for n in g) for g in groups] == sorted(
        max(values[n] for n in g) for g in groups
    )
    assert levels({"a": "tokens", "b": "mean", "c": True}) == [["c"], ["b"], ["a"]]


def test_an_axis_that_travels_along_is_named() -> None:
    trials = {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 2}, "c": {"x": 2, "y": 2}}
    assert one("x", trials, ended({"a": 0.1, "b": 0.2, "c": 0.2})).unequal == ("y",)


def test_sigma_without_alignment_is_left_aside() -> None:
    trials = {
        "a": {"align.weight": 0.0, "align.sigma": 0.1},
        "b": {"align.weight": 1.0, "align.sigma": 0.1},
        "c": {"align.weight": 1.0, "align.sigma": 0.2},
    }
    curve = one("align.sigma", trials, ended({"a": 0.9, "b": 0.2, "c": 0.3}))
    assert [level.trials for level in curve.levels] == [("b",), ("c",)]


def test_tasks_are_never_joined() -> None:
    trials = {f"{x}{eps}": {"x": x, "threat.eps_255": eps} for x in (1, 2) for eps in (4, 8)}
    rows = ended(dict.fromkeys(trials, 0.3))
    assert [curve.task for curve in curves("x", trials, rows, IMAGES)] == [
        {"threat.eps_255": 4},
        {"threat.eps_255": 8},
    ]
    assert curves("threat.eps_255", trials, rows, IMAGES) == []
    assert curves("z", trials, rows, IMAGES) == []
