"""What more would buy: accuracy against synthetic images or compute as a saturating power law.

accuracy(x) = ceiling - gain * x**-exponent, the form in which errors of neural networks fall with
data and compute (Hestness et al. 2017, arXiv 1712.00409; Rosenfeld et al. 2020, arXiv 1909.12673).
Three parameters from a handful of noisy points promise little, so the interval is the
parametric bootstrap's, and where points cannot carry a fit none is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from dra_ray.runs import RungRow
from dra_ray.sweeps import effects, equal
from dra_ray.sweeps.equal import Fields, Refused
from dra_ray.sweeps.resample import Floats, robust, span

What = Literal["robust", "clean"]
WHATS: tuple[What, ...] = ("robust", "clean")
SCALES = 4  # distinct positive x: one more than the law has parameters
RATIO = 4.0  # of largest to smallest x
FAR = (2.0, 4.0, 10.0)  # times the largest x, to which the law is extrapolated
WIDEST = 0.3  # interval of an extrapolation from which it says nothing
LEVEL = 0.01  # at which a fall between scales is more than noise
MISFIT = 0.001  # at which the law's misfit is: its parameters are bounded, so less than 3 are free
EXPONENTS = np.geomspace(0.03, 3.0, 70)
DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Point:
    """Mean accuracy of the trials at x, a fraction, and its standard error."""

    x: float
    accuracy: float
    error: float


@dataclasses.dataclass(frozen=True)
class Guess:
    """The law's accuracy at x, a fraction, with its 95 % interval."""

    x: float
    accuracy: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Fit:
    """accuracy(x) = ceiling - gain * x**-exponent, with 95 % intervals.

    `line` follows the law over the measured range, `beyond` extrapolates it.
    """

    of: str
    what: What
    points: tuple[Point, ...]
    ceiling: float
    gain: float
    exponent: float
    exponent_interval: tuple[float, float]
    line: tuple[Guess, ...]
    beyond: tuple[Guess, ...]
    notes: tuple[str, ...]


def synthetic(
    trials: Mapping[str, Fields], rows: Sequence[RungRow], images: int, what: What = "robust"
) -> Fit | Refused:
    """Accuracy against `synthetic.images` at equal `images_seen`."""
    field = "synthetic.images"
    curves = effects.curves(field, trials, rows, images, most=len(trials))
    if not curves:
        return Refused(
            f"no fit of {what} accuracy over synthetic images: fewer than two amounts compare"
        )
    curve = max(curves, key=lambda curve: sum(len(level.trials) for level in curve.levels))
    points, notes = [], []
    for level in curve.levels:
        interval = level.robust_interval if what == "robust" else level.clean_interval
        accuracy = level.robust_accuracy if what == "robust" else level.clean_accuracy
        if interval is not None and accuracy is not None:
            error = (interval[1] - interval[0]) / (2 * 1.96)
            points.append(Point(float(level.centre), accuracy, error))
    if any(point.x == 0 for point in points):
        notes.append("trials without synthetic images are no part of the fit: x = 0 has no power")
    if curve.unequal:
        notes.append(
            f"{' and '.join(curve.unequal)} differ between the scales, which the fit cannot tell "
            "from scale"
        )
    return power_law([point for point in points if point.x > 0], field, what, tuple(notes))


def compute(
    trials: Mapping[str, Fields], rows: Sequence[RungRow], images: int, what: What = "robust"
) -> Fit | Refused:
    """Accuracy against `images_seen` over trials that were trained to ends of different length;
    with one length, over the course of the best trial.
    """
    reports = equal.scored(rows)
    done = equal.finished(rows) & reports.keys() & trials.keys()
    names = equal.largest_task(trials, done)
    ends = {name: reports[name][-1] for name in names}
    notes: tuple[str, ...] = ()
    if len({row.images_seen for row in ends.values()}) >= SCALES:
        by_length: dict[int, list[RungRow]] = {}
        for row in ends.values():
            by_length.setdefault(row.images_seen, []).append(row)
        groups = [by_length[seen] for seen in sorted(by_length)]
    elif names:
        best = max(names, key=lambda name: (robust(ends[name]), name))
        groups = [[row] for row in reports[best] if row.images_seen]
        notes = (
            f"the points are the course of one trial, {best}: its learning rate was not annealed "
            "at any but the last, so a longer training of its own would do better than this line",
        )
    else:
        groups = []
    points = [_mean(group, images, what) for group in groups]
    return power_law([point for point in points if point], "images_seen", what, notes)


def _mean(rows: Sequence[RungRow], images: int, what: What) -> Point | None:
    """Mean of trials at one x. Its error is the trials' own spread, and at least the images'
    binomial noise, which trials on the same images share.
    """
    scores = [robust(row) if what == "robust" else row.clean_accuracy for row in rows]
    known = np.array([score for score in scores if score is not None])
    if not len(known):
        return None
    average, count = float(known.mean()), rows[0].images or images
    smoothed = (average * count + 2) / (count + 4)  # Agresti and Coull: an error even at 0 and 1
    binomial = math.sqrt(smoothed * (1 - smoothed) / count)
    spread = float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return Point(float(rows[0].images_seen), average, math.hypot(binomial, spread))


# -- the law ---------------------------------------------------------------------------------------
def power_law(
    points: Sequence[Point],
    of: str,
    what: What = "robust",
    notes: tuple[str, ...] = (),
    seed: int = 0,
) -> Fit | Refused:
    """The law through points in any order, or why they cannot carry it. `of` names x."""
    points = sorted(points, key=lambda point: point.x)
    if reason := _unfit(points):
        return Refused(f"no fit of {what} accuracy over {of}: {reason}")
    x, y, error = np.array([(point.x, point.accuracy, point.error) for point in points]).T
    unit = float(x[-1])  # in units of the largest x, powers stay near 1
    fitted, misfit = _least_squares(x / unit, y[None], error)
    chance = float(stats.chi2.sf(misfit[0], len(x) - 3))
    if chance < MISFIT:
        return Refused(
            f"no fit of {what} accuracy over {of}: the points are further from a power law than "
            f"their noise explains (p = {chance:.1g})"
        )
    noise = np.random.default_rng(seed).normal(size=(DRAWS, len(x))) * error
    drawn, _ = _least_squares(x / unit, _law(fitted, x / unit) + noise, error)
    far = [_guess(fitted, drawn, unit * times, unit) for times in FAR]
    far = [guess for guess in far if guess.interval[1] - guess.interval[0] <= WIDEST]
    if not far:
        return Refused(
            f"no fit of {what} accuracy over {of}: already at {FAR[0]:g} times the largest scale "
            f"the interval would be wider than {100 * WIDEST:.0f} points; add scales, trials or "
            "validation images"
        )
    inside = np.geomspace(x[0], x[-1], 25)
    return Fit(
        of,
        what,
        tuple(points),
        float(fitted[0, 0]),
        float(fitted[0, 1] * unit ** fitted[0, 2]),
        float(fitted[0, 2]),
        span(drawn[:, 2]),
        tuple(_guess(fitted, drawn, float(at), unit) for at in inside),
        tuple(far),
        notes,
    )


def _unfit(points: Sequence[Point]) -> str | None:
    """Why points ascending in x cannot carry the law; None where they can."""
    scales = len({point.x for point in points})
    if scales < SCALES:
        return (
            f"{scales} distinct scale{'s' * (scales != 1)} above 0, and it takes {SCALES} to see a "
            "bend and its noise"
        )
    if points[-1].x < RATIO * points[0].x:
        return (
            f"the scales reach from {points[0].x:g} to {points[-1].x:g}, less than a factor of "
            f"{RATIO:g}"
        )
    pairs = [(a, b) for k, a in enumerate(points) for b in points[k + 1 :]]
    limit = float(stats.norm.isf(LEVEL / len(pairs)))
    for a, b in pairs:
        if a.accuracy - b.accuracy > limit * math.hypot(a.error, b.error):
            return (
                f"accuracy falls from {100 * a.accuracy:.1f} % at {a.x:g} to "
                f"{100 * b.accuracy:.1f} % at {b.x:g}, more than noise explains, and a power law "
                "only rises"
            )
    rise = points[-1].accuracy - points[0].accuracy
    if rise < float(stats.norm.isf(0.05)) * math.hypot(points[0].error, points[-1].error):
        return (
            f"from the smallest scale to the largest accuracy changes by {100 * rise:+.1f} points, "
            "which noise explains: there is no trend to extend"
        )
    return None


def _law(parameters: Floats, x: Floats) -> Floats:
    """[fits, x] of parameters [fits, 3]: ceiling, gain, exponent."""
    ceiling, gain, exponent = parameters.T[:, :, None]
    return np.asarray(ceiling - gain * x[None] ** -exponent)


def _least_squares(x: Floats, y: Floats, error: Floats) -> tuple[Floats, Floats]:
    """Weighted least squares with gain >= 0 and ceiling <= 1, for all rows of y [fits, x] at once.

    For a given exponent the law is a line in x**-exponent, whose best ceiling and gain are known
    in closed form, so that only the exponent is searched: over a grid, which has no local minima.

    Returns: parameters [fits, 3] and weighted squares [fits].
    """
    weight = 1 / error**2
    best = np.full(len(y), np.inf)
    parameters = np.zeros((len(y), 3))
    for exponent in EXPONENTS:
        power = x**-exponent
        middle = (weight * power).sum() / weight.sum()
        height = (y @ weight) / weight.sum()
        slope = ((y - height[:, None]) * weight) @ (power - middle)
        slope = slope / (weight * (power - middle) ** 2).sum()
        gain = np.maximum(-slope, 0.0)
        ceiling = height + gain * middle
        over = ceiling > 1  # on that edge the best gain is that of a line through (0, 1)
        edge = np.maximum(((1 - y) * weight) @ power / (weight * power**2).sum(), 0.0)
        gain, ceiling = np.where(over, edge, gain), np.where(over, 1.0, ceiling)
        squares = ((y - (ceiling[:, None] - gain[:, None] * power)) ** 2) @ weight
        better = squares < best
        best[better] = squares[better]
        parameters[better] = np.stack([ceiling, gain, np.full(len(y), exponent)], axis=1)[better]
    return parameters, best


def _guess(fitted: Floats, drawn: Floats, x: float, unit: float) -> Guess:
    at = np.array([x / unit])
    low, high = span(_law(drawn, at)[:, 0])
    accuracy = float(_law(fitted, at)[0, 0])
    return Guess(x, accuracy, (max(0.0, min(low, accuracy)), min(1.0, max(high, accuracy))))
