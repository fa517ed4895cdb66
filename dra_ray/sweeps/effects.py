"""How accuracy follows one axis of a sweep at equal fidelity: over lambda (figure 8 of arXiv
2602.19931), the timestep, the synthetic scale.

A level is a value of the axis, or a range of values where there are many. Its accuracy is the mean
over its trials, whatever their other fields are, and its interval covers both the choice of the
validation images and the choice of those trials.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dra_ray.evaluation import intervals
from dra_ray.runs import RungRow
from dra_ray.sweeps import equal
from dra_ray.sweeps.equal import Fields
from dra_ray.sweeps.resample import Floats, accuracies, clean_accuracies, robust, span

LEVELS = 6  # numbers up to which each is a level of its own; more are cut into as many ranges
DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Level:
    """Trials of one value, or of the values low..high; accuracies are fractions with 95 %
    intervals.

    `difference` is robust accuracy minus that of the axis' first level; None for the first.
    """

    low: Any
    high: Any
    centre: Any
    trials: tuple[str, ...]
    robust_accuracy: float
    robust_interval: tuple[float, float]
    clean_accuracy: float | None
    clean_interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Curve:
    """Levels in ascending order, all after about `images_seen` images and of one task.

    `left_out` trials stopped before; `unequal` are other axes whose values are not spread alike
    over the levels, so that their effect may be in the curve.
    """

    field: str
    images_seen: int
    task: Fields
    levels: tuple[Level, ...]
    left_out: tuple[str, ...]
    unequal: tuple[str, ...]


def curves(
    field: str,
    trials: Mapping[str, Fields],
    rows: Sequence[RungRow],
    images: int,
    most: int = LEVELS,
) -> list[Curve]:
    """The effect of `field`, once per task; none where its values are tasks themselves or fewer
    than two compare.

    Trials are judged at the most `images_seen` that some trial of every level reached. Trials in
    which the field has no effect are left aside: without alignment, no sigma counts.

    Args:
        images: validation images of rows that do not say how many.
        most: numbers up to which each is a level of its own.
    """
    if field in equal.TASK:
        return []
    active = {name: equal.active(fields) for name, fields in trials.items()}
    reports = equal.scored(rows)
    by_task: dict[str, list[str]] = {}
    for name in sorted(active):
        if field in active[name] and name in reports:
            by_task.setdefault(repr(equal.task(active[name])), []).append(name)
    found = []
    for names in by_task.values():
        groups = levels({name: active[name][field] for name in names}, most)
        found.append(_curve(field, active, groups, reports, images))
    return [curve for curve in found if curve is not None]


def _curve(
    field: str,
    trials: Mapping[str, Fields],
    groups: list[list[str]],
    reports: Mapping[str, Sequence[RungRow]],
    images: int,
) -> Curve | None:
    names = [name for group in groups for name in group]
    if len(groups) < 2:
        return None
    seen = min(max(reports[name][-1].images_seen for name in group) for group in groups)
    standing = equal.at(seen, {name: reports[name] for name in names})
    groups = [[name for name in group if name in standing] for group in groups]
    if not all(groups):
        return None
    ordered = [name for group in groups for name in group]
    rows = [standing[name] for name in ordered]
    generator = np.random.default_rng(0)
    drawn = accuracies(rows, images, DRAWS, generator)
    drawn_clean = clean_accuracies(rows, images, DRAWS, generator)
    places = np.split(np.arange(len(rows)), np.cumsum([len(group) for group in groups])[:-1])
    means = [_resampled(drawn[:, place], generator) for place in places]
    cleans = [_resampled(drawn_clean[:, place], generator) for place in places]
    first = float(np.mean([robust(rows[k]) for k in places[0]]))
    built = []
    for number, (place, group) in enumerate(zip(places, groups, strict=True)):
        values = sorted(trials[name][field] for name in group)
        average = float(np.mean([robust(rows[k]) for k in place]))
        clean = [rows[k].clean_accuracy for k in place]
        known = [accuracy for accuracy in clean if accuracy is not None]
        built.append(
            Level(
                values[0],
                values[-1],
                float(np.median(values)) if values[0] != values[-1] else values[0],
                tuple(group),
                average,
                _interval([rows[k] for k in place], means[number], images),
                float(np.mean(known)) if len(known) == len(clean) else None,
                span(cleans[number]) if len(known) == len(clean) else None,
                average - first if number else None,
                span(means[number] - means[0]) if number else None,
            )
        )
    return Curve(
        field,
        seen,
        equal.task(trials[names[0]]),
        tuple(built),
        tuple(sorted(set(names) - standing.keys())),
        _unequal(field, trials, groups),
    )


def _interval(rows: Sequence[RungRow], drawn: Floats, images: int) -> tuple[float, float]:
    """Wilson's of a single trial, which also holds near 0 and 1; the bootstrap's of several."""
    if len(rows) > 1:
        return span(drawn)
    count = rows[0].images or images
    return intervals.wilson(round(robust(rows[0]) * count), count)


def levels(values: Mapping[str, Any], most: int = LEVELS) -> list[list[str]]:
    """Trials by their value, ascending; many different numbers are cut into `most` ranges of
    about as many trials each. Zero stays alone: it is the baseline.
    """
    by_value: dict[Any, list[str]] = {}
    for name in sorted(values):
        by_value.setdefault(_key(values[name]), []).append(name)
    ordered = sorted(by_value, key=lambda key: (isinstance(key, str), key))
    numbers = [key for key in ordered if not isinstance(key, str) and key != 0]
    if len(ordered) <= most or len(numbers) < len(ordered) - 1:
        return [by_value[key] for key in ordered]
    baseline = [by_value[key] for key in ordered if key == 0]
    parts = np.array_split(np.array(numbers), most - len(baseline))
    return baseline + [[name for key in part for name in by_value[key]] for part in parts]


def _key(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else str(value)


def _resampled(drawn: Floats, generator: np.random.Generator) -> Floats:
    """[draws]: the mean of resampled trials, given each trial's draws [draws, trials]."""
    if drawn.shape[1] == 1:
        return drawn[:, 0]
    picks: NDArray[np.int64] = generator.integers(drawn.shape[1], size=drawn.shape)
    return np.asarray(np.take_along_axis(drawn, picks, axis=1).mean(axis=1))


def _unequal(
    field: str, trials: Mapping[str, Fields], groups: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """Other axes of few values whose shares differ from level to level; axes of drawn values are
    alike up to chance.
    """
    names = [name for group in groups for name in group]
    fields = sorted({other for name in names for other in trials[name]} - {field} - equal.SEEDS)

    def shares(other: str, group: Sequence[str]) -> dict[str, float]:
        listed = [repr(trials[name].get(other)) for name in group]
        return {value: listed.count(value) / len(listed) for value in set(listed)}

    few = [f for f in fields if len({repr(trials[n].get(f)) for n in names}) <= LEVELS]
    return tuple(f for f in few if any(shares(f, g) != shares(f, groups[0]) for g in groups))
