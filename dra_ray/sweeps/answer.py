"""What a sweep ends in: its best trial, how sure that is, and the recipe to train it again.

Only trials that were trained to their end compete, at the most `images_seen` that all of them
reached. The best of many is flattered by its noise, so every trial that cannot be told apart from
it is named too, and nothing is called better that chance explains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dra_ray import config
from dra_ray.evaluation import intervals
from dra_ray.runs import RungRow
from dra_ray.storage import Store
from dra_ray.sweeps import equal
from dra_ray.sweeps.equal import SEED, Fields, Refused
from dra_ray.sweeps.resample import Difference, accuracies, difference, robust, span

WINNER = "winner.yaml"  # in the sweep's folder: the best trial as a recipe
DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best of the trials that were trained to the end; accuracies are fractions on validation
    images.

    Attributes:
        trial: the winner; of repeats, the first.
        repeats: the winner under every training seed, itself included.
        fields: what it changes in the sweep's base, without the seed.
        images_seen: at which all competitors are compared.
        robust_accuracy: mean over the repeats; interval: Wilson's 95 %, of repeats the
            bootstrap's over seeds and images.
        competitors: trials that competed, repeats counted once; left_out: finished trials of
            another task.
        ties: competitors that chance in the images may have put behind it.
        baseline: the best competitor without alignment, None where there is none or it won itself.
        over_baseline: the winner minus that.
        confounded: fields besides alignment in which the two differ, with their values.
    """

    trial: str
    repeats: tuple[str, ...]
    fields: Fields
    images_seen: int
    images: int
    robust_accuracy: float
    interval: tuple[float, float]
    clean_accuracy: float | None
    trials: int
    competitors: int
    left_out: tuple[str, ...]
    ties: tuple[str, ...]
    baseline: str | None
    over_baseline: Difference | None
    confounded: Mapping[str, tuple[object, object]]


def answer(trials: Mapping[str, Fields], rows: Sequence[RungRow], images: int) -> Answer | Refused:
    """The answer of a sweep, or why it has none.

    Args:
        trials: name -> the fields that it changes.
        rows: of rungs.jsonl, in any order.
        images: validation images of rows that do not say how many.
    """
    reports = equal.scored(rows)
    done = equal.finished(rows) & reports.keys() & trials.keys()
    competing = equal.largest_task(trials, done)
    seen = equal.furthest({name: reports[name] for name in competing})
    if seen is None:
        return Refused(
            f"none of the {len(trials)} trials was trained to the end, so there is no winner yet; "
            "start the same command again to go on"
        )
    standing = equal.at(seen, {name: reports[name] for name in competing})
    groups = _repeats(trials, competing)
    means = {first: _mean(standing, members) for first, members in groups.items()}
    best = max(groups, key=lambda first: (*means[first], first))
    gaps = {
        first: _gap([standing[n] for n in groups[best]], [standing[n] for n in members], images)
        for first, members in groups.items()
        if first != best
    }
    plain = [name for name in groups if trials[name].get("align.weight") == 0]
    baseline = max(plain, key=lambda first: (*means[first], first), default=None)
    baseline = None if baseline == best else baseline
    return Answer(
        best,
        groups[best],
        _point(trials[best]),
        seen,
        standing[best].images or images,
        means[best][0],
        _interval([standing[name] for name in groups[best]], images),
        means[best][1] if standing[best].clean_accuracy is not None else None,
        len(trials),
        len(groups),
        tuple(sorted(done - set(competing))),
        tuple(name for name, gap in gaps.items() if not gap.is_clear),
        baseline,
        gaps[baseline] if baseline else None,
        equal.differing(trials[best], trials[baseline]) if baseline else {},
    )


def _point(fields: Fields) -> dict[str, object]:
    return {field: value for field, value in fields.items() if field != SEED}


def _repeats(trials: Mapping[str, Fields], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """First trial of every point -> all trials of it, which differ in the training seed."""
    points: dict[str, list[str]] = {}
    for name in sorted(names):
        point = _point(trials[name])
        points.setdefault(repr(sorted(point.items())), []).append(name)
    return {members[0]: tuple(members) for members in points.values()}


def _mean(standing: Mapping[str, RungRow], members: Sequence[str]) -> tuple[float, float]:
    """Robust and clean accuracy."""
    clean = [standing[name].clean_accuracy for name in members]
    known = [accuracy for accuracy in clean if accuracy is not None]
    average = float(np.mean([robust(standing[name]) for name in members]))
    return average, float(np.mean(known)) if known else 0.0


def _interval(rows: Sequence[RungRow], images: int) -> tuple[float, float]:
    if len(rows) == 1:
        count = rows[0].images or images
        return intervals.wilson(round(robust(rows[0]) * count), count)
    generator = np.random.default_rng(0)
    drawn = accuracies(rows, images, DRAWS, generator)
    picks = generator.integers(len(rows), size=drawn.shape)
    return span(np.take_along_axis(drawn, picks, axis=1).mean(axis=1))


def _gap(first: Sequence[RungRow], second: Sequence[RungRow], images: int) -> Difference:
    """Mean of `first` minus mean of `second`; of repeats by a bootstrap over their seeds and the
    images that all share.
    """
    if len(first) == len(second) == 1:
        return difference(first[0], second[0], images)
    generator = np.random.default_rng(0)
    drawn = accuracies([*first, *second], images, DRAWS, generator)
    sides = []
    for side in (drawn[:, : len(first)], drawn[:, len(first) :]):
        picks = generator.integers(side.shape[1], size=side.shape)
        sides.append(np.take_along_axis(side, picks, axis=1).mean(axis=1))
    means = [float(np.mean([robust(row) for row in side])) for side in (first, second)]
    paired = all(row.verdicts for row in (*first, *second))
    return Difference(means[0] - means[1], span(sides[0] - sides[1]), paired, None)


# -- as a recipe -----------------------------------------------------------------------------------
def recipe(sweep: config.Sweep, found: Answer, name: str) -> config.Experiment:
    """The winner as an experiment: the sweep's base with the winner's fields. `name` is the
    sweep's, for the description.
    """
    changes = dict(found.fields) | {
        "description": f"{found.trial}, the best of {found.competitors} finished trials of the "
        f"sweep {name}",
        "paper": None,  # the base's published numbers are not of these settings
    }
    return config.override(sweep.base, changes)


def write_recipe(folder: Store, sweep: config.Sweep, found: Answer) -> Store:
    """Write the winner to winner.yaml in the sweep's folder; `dra train` takes that file."""
    file = folder / WINNER
    file.write_text(config.to_yaml(recipe(sweep, found, folder.name)))
    return file
