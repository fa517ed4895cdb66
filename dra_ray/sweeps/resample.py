"""Scores of trials had other validation images been drawn: the noise of a rung, with what trials
share of it.

All trials of a task are judged on the same images, so their scores rise and fall together. Where
both have a verdict per image, one draw of images serves both, and their difference has only the
noise of the images on which they disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dra_ray.evaluation import intervals
from dra_ray.evaluation.compare import LEVEL, compare
from dra_ray.runs import RungRow, unpack_verdicts

Floats = NDArray[np.float64]


def verdicts(row: RungRow) -> NDArray[np.bool_] | None:
    """bool [images], whether each validation image withstood the attack; None in older logs."""
    return unpack_verdicts(row.verdicts, row.images) if row.verdicts and row.images else None


def robust(row: RungRow) -> float:
    """Robust accuracy of a validation, as a fraction; failed trials without one have no place
    here.
    """
    if row.robust_accuracy is None:
        raise ValueError(f"{row.trial} has no robust accuracy after epoch {row.epoch}")
    return row.robust_accuracy


def accuracies(
    rows: Sequence[RungRow], images: int, draws: int, generator: np.random.Generator
) -> Floats:
    """[draws, trials]: robust accuracy of each row under resampled validation images.

    Rows with verdicts of equally many images share their draws; the others have binomial noise of
    their own.

    Args:
        images: validation images of rows that do not say how many.
    """
    drawn = np.empty((draws, len(rows)))
    paired: dict[int, list[tuple[int, NDArray[np.bool_]]]] = {}
    for column, row in enumerate(rows):
        flags = verdicts(row)
        if flags is None:
            count = row.images or images
            drawn[:, column] = generator.binomial(count, robust(row), draws) / count
        else:
            paired.setdefault(len(flags), []).append((column, flags))
    for count, members in paired.items():
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws) / count
        matrix = np.array([flags for _, flags in members], dtype=np.float64)
        drawn[:, [column for column, _ in members]] = weights @ matrix.T
    return drawn


def clean_accuracies(
    rows: Sequence[RungRow], images: int, draws: int, generator: np.random.Generator
) -> Floats:
    """[draws, trials] of clean accuracy, binomial: no log has clean verdicts. NaN where a row has
    none.
    """
    scores = np.array([np.nan if r.clean_accuracy is None else r.clean_accuracy for r in rows])
    counts = np.array([row.images or images for row in rows])
    drawn = generator.binomial(counts, np.nan_to_num(scores), (draws, len(rows))) / counts
    return np.where(np.isnan(scores), np.nan, drawn)


def span(values: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of draws."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Robust accuracy of one trial minus another's, fractions, with a 95 % interval.

    `paired` where both have a verdict per image: the bootstrap interval of image pairs then has
    McNemar's exact test beside it. Otherwise Newcombe's interval of two independent proportions,
    which is wider.
    """

    value: float
    interval: tuple[float, float]
    paired: bool
    p_value: float | None

    @property
    def is_clear(self) -> bool:
        """Whether it is more than the choice of the validation images explains."""
        low, high = self.interval
        return low * high > 0 and (self.p_value is None or self.p_value < LEVEL)


def difference(first: RungRow, second: RungRow, images: int) -> Difference:
    """`first` minus `second`, paired where their verdicts allow it; `images` as in
    `accuracies`.
    """
    one, two = verdicts(first), verdicts(second)
    if one is not None and two is not None and len(one) == len(two):
        compared = compare(two, one)
        return Difference(compared.difference, compared.interval, True, compared.p_value)
    counts = [
        (round(robust(row) * (row.images or images)), row.images or images)
        for row in (first, second)
    ]
    interval = intervals.newcombe(counts[0], counts[1])
    return Difference(robust(first) - robust(second), interval, False, None)
