"""Clean against robust accuracy: which trials no other beats in both, and how sure that is.

Fronts are those of non-dominated sorting (Deb et al. 2002, NSGA-II): the first is beaten by none,
the second only by the first, and so on.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dra_ray.runs import RungRow
from dra_ray.sweeps import equal
from dra_ray.sweeps.equal import Fields, Refused
from dra_ray.sweeps.resample import accuracies, clean_accuracies, robust

DRAWS = 500


@dataclasses.dataclass(frozen=True)
class Place:
    """A trial, its accuracies as fractions, its front (1: beaten by none), and in what share of
    resamples of the validation images it was on the first front.
    """

    trial: str
    clean_accuracy: float
    robust_accuracy: float
    front: int
    share_on_front: float


@dataclasses.dataclass(frozen=True)
class Front:
    """All compared trials after `images_seen` images, the first front first, by clean accuracy."""

    images_seen: int
    places: tuple[Place, ...]

    @property
    def best(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if place.front == 1)


def front(trials: Mapping[str, Fields], rows: Sequence[RungRow], images: int) -> Front | Refused:
    """The Pareto front of trials that were trained to the end, compared at equal `images_seen`.

    Args:
        images: validation images of rows that do not say how many.
    """
    reports = equal.scored(rows)
    done = equal.finished(rows) & reports.keys() & trials.keys()
    names = equal.largest_task(trials, done)
    seen = equal.furthest({name: reports[name] for name in names})
    if seen is None:
        return Refused("there is no front: no trial was trained to the end")
    standing = list(equal.at(seen, {name: reports[name] for name in names}).values())
    standing = [row for row in standing if row.clean_accuracy is not None]
    if not standing:
        return Refused("there is no front: no trial has a clean accuracy")
    generator = np.random.default_rng(0)
    drawn = np.stack(
        [
            clean_accuracies(standing, images, DRAWS, generator),
            accuracies(standing, images, DRAWS, generator),
        ],
        axis=-1,
    )
    often = np.mean([undominated(scores) for scores in drawn], axis=0)
    points = [(row.clean_accuracy or 0.0, robust(row)) for row in standing]
    ranks = fronts(np.array(points)) + 1
    places = [
        Place(row.trial, row.clean_accuracy or 0.0, robust(row), int(rank), float(share))
        for row, rank, share in zip(standing, ranks, often, strict=True)
    ]
    places.sort(key=lambda place: (place.front, place.clean_accuracy, place.trial))
    return Front(seen, tuple(places))


def undominated(scores: ArrayLike) -> NDArray[np.bool_]:
    """bool [N] of scores [N, 2], higher ones better: whether no other is at least as good in both
    and better in one. Takes N log N: one pass from the best first score down.
    """
    points = np.asarray(scores, dtype=np.float64)
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    first, second = points[order].T
    before = np.concatenate([[-np.inf], np.maximum.accumulate(second)[:-1]])
    twin = np.concatenate([[False], (np.diff(first) == 0) & (np.diff(second) == 0)])
    kept = second > before
    for place in np.flatnonzero(twin):  # equal in both: neither beats the other
        kept[place] = kept[place - 1]
    result = np.empty(len(points), dtype=bool)
    result[order] = kept
    return result


def fronts(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Front [n] of each point [n, 2], both to be large; 0 is dominated by none. O(n log n): in
    descending order of one value, a point belongs to the first front whose other values are all
    below its own (Jensen 2003, IEEE TEC 7:503).
    """
    ranks = np.zeros(len(points), dtype=np.int64)
    tops: list[float] = []  # minus the largest second value of each front: ascending
    last, rank = (math.nan, math.nan), 0
    for index in np.lexsort((-points[:, 1], -points[:, 0])):
        point = (float(points[index, 0]), float(points[index, 1]))
        if point != last:  # equal points share a front
            rank = bisect.bisect_right(tops, -point[1])
            tops[rank : rank + 1] = [-point[1]]
        ranks[index], last = rank, point
    return ranks
