"""Power laws against scipy's own fit and against laws that are known, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from dra_ray.runs import RungRow
from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.fits import Fit, Point, compute, power_law, synthetic
from tests.sweeps.logged import IMAGES, ended, row

X = np.array([1e3, 3e3, 1e4, 3e4, 1e5, 3e5])


def law(x: np.ndarray | float) -> np.ndarray | float:
    return 0.6 - 3.0 * np.asarray(x) ** -0.35


def points(y: np.ndarray, error: float = 0.005, x: np.ndarray = X) -> list[Point]:
    return [Point(float(a), float(b), error) for a, b in zip(x, y, strict=True)]


def the_fit(found: Fit | Refused) -> Fit:
    assert isinstance(found, Fit), found
    return found


def test_an_exact_law_is_found_again() -> None:
    fit = the_fit(power_law(points(law(X)), "x"))
    assert fit.exponent == pytest.approx(0.35, rel=0.05)  # the grid's step
    assert fit.ceiling == pytest.approx(0.6, abs=0.01)
    for guess in fit.beyond:
        assert guess.accuracy == pytest.approx(law(guess.x), abs=0.003)


def test_the_fit_is_scipys() -> None:
    y = law(X) + np.random.default_rng(3).normal(size=len(X)) * 0.005
    fit = the_fit(power_law(points(y), "x"))
    theirs, _ = optimize.curve_fit(
        lambda x, a, b, c: a - b * x**-c, X, y, p0=(0.6, 3.0, 0.35), maxfev=20_000
    )
    for guess in (*fit.line, *fit.beyond):
        assert guess.accuracy == pytest.approx(
            theirs[0] - theirs[1] * guess.x ** -theirs[2], abs=2e-3
        )


@pytest.mark.seconds
def test_the_interval_of_an_extrapolation_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    held = total = 0
    for _ in range(60):
        found = power_law(points(law(X) + generator.normal(size=len(X)) * 0.005), "x")
        for guess in the_fit(found).beyond[:2]:
            total += 1
            held += guess.interval[0] <= law(guess.x) <= guess.interval[1]
    assert held >= 0.85 * total


def test_extrapolations_grow_less_sure_the_further_they_reach() -> None:
    fit = the_fit(power_law(points(law(X)), "x"))
    widths = [guess.interval[1] - guess.interval[0] for guess in fit.beyond]
    assert widths == sorted(widths)
    assert widths[0] > 0


def test_a_ceiling_stays_below_one() -> None:
    """A straight line in log x fits any ceiling; accuracy has one."""
    x = np.array([1e2, 1e3, 1e4, 1e5])
    found = power_law(points(np.array([0.3, 0.5, 0.66, 0.78]), 0.02, x), "x")
    fit = the_fit(found)
    assert fit.ceiling <= 1
    assert all(guess.interval[1] <= 1 for guess in fit.beyond)


@pytest.mark.parametrize(
    ("y", "x", "error", "reason"),
    [
        ([0.3, 0.4, 0.45], [1, 10, 100], 0.01, "3 distinct scales"),
        ([0.3, 0.4, 0.42, 0.45], [1, 1.5, 2, 3], 0.01, "factor of 4"),
        ([0.3, 0.5, 0.35, 0.55], [1, 10, 100, 1000], 0.01, "falls from 50.0 % at 10 to 35.0 %"),
        ([0.30, 0.31, 0.30, 0.31], [1, 10, 100, 1000], 0.02, "noise explains"),
        ([0.1, 0.101, 0.102, 0.8], [1, 10, 100, 1000], 0.005, "further from a power law"),
        ([0.1, 0.3, 0.5, 0.6], [1, 1.6, 2.5, 4.1], 0.12, "wider than 30 points"),
    ],
)
def test_what_points_cannot_carry_is_refused(
    y: list[float], x: list[float], error: float, reason: str
) -> None:
    found = power_law(points(np.array(y), error, np.array(x, dtype=float)), "x")
    assert isinstance(found, Refused), found
    assert reason in found.reason


def grown(seed: int = 0) -> tuple[dict[str, dict[str, object]], list[RungRow]]:
    """A sweep over the synthetic scale, with three seeds each and one trial without."""
    generator = np.random.default_rng(seed)
    trials: dict[str, dict[str, object]] = {"none": {"synthetic.images": 0, "seed": 0}}
    scores = {"none": 0.2}
    for scale in X:
        for repeat in range(3):
            name = f"{scale:g}-{repeat}"
            trials[name] = {"synthetic.images": int(scale), "seed": repeat}
            scores[name] = float(generator.binomial(10_000, law(scale)) / 10_000)
    return trials, ended(scores)


def test_accuracy_over_synthetic_images_is_fitted_from_a_sweep() -> None:
    trials, rows = grown()
    fit = the_fit(synthetic(trials, rows, 10_000))
    assert [point.x for point in fit.points] == list(X)
    assert any("x = 0" in note for note in fit.notes)
    assert fit.beyond[0].interval[0] <= law(fit.beyond[0].x) <= fit.beyond[0].interval[1]
    flat = synthetic(trials, rows, 10_000, "clean")
    assert isinstance(flat, Refused)  # clean accuracy is 0.8 everywhere
    assert "no trend" in flat.reason


def test_a_sweep_without_scales_is_refused() -> None:
    assert isinstance(synthetic({"a": {"x": 1}}, ended({"a": 0.3}), IMAGES), Refused)
    assert isinstance(compute({"a": {"x": 1}}, [], IMAGES), Refused)


def test_compute_is_trained_lengths_or_the_course_of_the_best() -> None:
    epochs = (1, 3, 10, 30, 100)
    trials = {str(n): {"optim.epochs": n} for n in epochs}
    lengths = [row(str(n), n, float(law(1000 * n)), decision="done", images=10_000) for n in epochs]
    fit = the_fit(compute(trials, lengths, IMAGES))
    assert not fit.notes
    assert [point.x for point in fit.points] == [100.0 * n for n in epochs]
    course = [row("a", n, float(law(1000 * n)), images=10_000) for n in epochs[:-1]]
    course += [row("a", 100, float(law(1e5)), decision="done", images=10_000)]
    fit = the_fit(compute({"a": {}}, course, IMAGES))
    assert "course of one trial, a" in fit.notes[0]
