"""What each axis of a sweep is worth: how much choosing its value well raises the odds of being
among the best.

PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255; conditional axes: arXiv 2601.20800), as Optuna
computes it: the Pearson divergence between where the best quarter of the trials lie on an axis and
where all of them lie. It needs no model, and an axis that only some trials have counts as far as
they are.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dra_ray.runs import RungRow
from dra_ray.sweeps import equal
from dra_ray.sweeps.equal import SEEDS, TASK, Fields, Refused
from dra_ray.sweeps.resample import robust, span

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LEAST = 10  # comparable trials; with fewer, the best quarter is two trials
BEST = 0.25  # share of the trials that are the best ones
CHOICES = 6  # distinct numbers up to which an axis is a choice and not a range
LOG_RANGE = 30  # ratio of largest to smallest value from which a range is read as log-uniform
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis' share of the importance of all, 0..1, with its 95 % bootstrap interval over trials.

    `p_value`: how often an axis of the same values would weigh as much were the scores dealt out
    at random.
    """

    field: str
    share: float
    interval: tuple[float, float]
    p_value: float

    @property
    def stands_out(self) -> bool:
        return self.p_value < LEVEL


@dataclasses.dataclass(frozen=True)
class Importance:
    """Axes, the most important first, of `trials` trials after `images_seen` images."""

    axes: tuple[Axis, ...]
    images_seen: int
    trials: int


def importance(
    trials: Mapping[str, Fields], rows: Sequence[RungRow], draws: int = 100, seed: int = 0
) -> Importance | Refused:
    """Importance of every axis, or why it cannot be told; the same for the same rows."""
    broad = equal.broad(trials, rows, LEAST)
    if isinstance(broad, Refused):
        return Refused(f"importance is not estimated: {broad.reason}")
    seen, standing = broad
    points = {name: equal.active(trials[name]) for name in sorted(standing)}
    ranges = _ranges(list(points.values()))
    if not ranges:
        return Refused("importance is not estimated: no axis has two values that compare")
    scores = np.array([robust(standing[name]) for name in points])
    if np.ptp(scores) == 0:
        return Refused(f"importance is not estimated: all {len(points)} trials have the same score")
    generator, count = np.random.default_rng(seed), len(scores)
    divergences = _Divergences(list(points.values()), ranges)
    everyone = np.arange(count)
    measured = divergences(everyone, scores)
    picks = generator.integers(count, size=(draws, count))
    shares = np.array([_shares(divergences(pick, scores[pick])) for pick in picks])
    shuffled = np.array(
        [divergences(everyone, generator.permutation(scores)) for _ in range(draws)]
    )
    axes = [
        Axis(
            field,
            float(_shares(measured)[place]),
            span(shares[:, place]),
            float((1 + (shuffled[:, place] >= measured[place]).sum()) / (1 + draws)),
        )
        for place, field in enumerate(ranges)
    ]
    axes.sort(key=lambda axis: (-axis.share, axis.field))
    return Importance(tuple(axes), seen, count)


def _ranges(points: Sequence[Fields]) -> dict[str, BaseDistribution]:
    """Axis -> its range as Optuna describes one, from the values that trials have of it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    ranges: dict[str, BaseDistribution] = {}
    for field in sorted({field for point in points for field in point} - {*SEEDS, *TASK}):
        values = {_plain(point[field]) for point in points if field in point}
        everywhere = all(field in point for point in points)
        if len(values) < 2 and everywhere:
            continue
        numbers = sorted(v for v in values if isinstance(v, float))
        if len(numbers) < len(values) or len(values) <= CHOICES:
            ranges[field] = CategoricalDistribution(sorted(values, key=str))
        else:
            log = numbers[0] > 0 and numbers[-1] / numbers[0] >= LOG_RANGE
            ranges[field] = FloatDistribution(numbers[0], numbers[-1], log=log)
    return ranges


def _plain(value: Any) -> float | str:
    """A value that Optuna can hold: a number, or text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else repr(value)


def _shares(weights: np.ndarray) -> np.ndarray:
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(weights), 1 / len(weights))


class _Divergences:
    """The divergence of every axis, in the order of `ranges`, of a resample of the trials under
    given scores.

    Optuna checks and copies each trial that joins a study, and a bootstrap makes hundreds of
    studies; this one hands out the trials that it is told to.
    """

    def __init__(self, points: Sequence[Fields], ranges: Mapping[str, BaseDistribution]) -> None:
        self._fields = list(ranges)
        known = [{f: point[f] for f in ranges if f in point} for point in points]
        self._params = [{f: _plain(value) for f, value in point.items()} for point in known]
        self._ranges = [{f: ranges[f] for f in point} for point in known]
        self._study = _study()

    def __call__(self, picks: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """[axes], of the trials `picks` with `scores`, higher ones better."""
        from optuna.importance import PedAnovaImportanceEvaluator
        from optuna.trial import FrozenTrial, TrialState

        self._study.listed = [
            FrozenTrial(
                number=number,
                trial_id=number,
                state=TrialState.COMPLETE,
                value=float(score),
                params=self._params[pick],
                distributions=self._ranges[pick],
                datetime_start=None,
                datetime_complete=None,
                user_attrs={},
                system_attrs={},
                intermediate_values={},
            )
            for number, (pick, score) in enumerate(zip(picks, scores, strict=True))
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental, and of regimes with few trials
            evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
            weights = evaluator.evaluate(self._study, self._fields)
        return np.array([weights.get(field, 0.0) for field in self._fields])


def _study() -> Any:
    """An Optuna study, in memory, of the trials in its attribute `listed`."""
    import optuna
    from optuna.trial import FrozenTrial, TrialState

    class Listed(optuna.Study):
        listed: Sequence[FrozenTrial] = ()

        def get_trials(
            self, deepcopy: bool = True, states: Container[TrialState] | None = None
        ) -> list[FrozenTrial]:
            return list(self.listed)

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce the study
    storage = optuna.storages.InMemoryStorage()
    storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "importance")
    optuna.logging.set_verbosity(before)
    return Listed("importance", storage)
