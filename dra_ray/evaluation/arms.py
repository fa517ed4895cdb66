"""Two ways of training compared over several training seeds, each pair of runs on the same images.

One run of each says whether two models differ; whether two ways of training do, only runs from
several seeds say. Runs are paired by their place: those of a sweep's `repeats` share batches and
augmentation with the repeat of the same seed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dra_ray.errors import ConfigError, DataError, nearest
from dra_ray.evaluation.compare import (
    LEVEL,
    SPELLED,
    VERDICTS,
    columns,
    different,
    read,
    span,
    titled,
)
from dra_ray.storage import Store

DRAWS = 10_000
MOST_SIGNS = 16  # pairs up to which every combination of signs is counted


@dataclasses.dataclass(frozen=True)
class Arms:
    """Arm B against arm A over pairs of runs; accuracies and differences B - A are fractions.

    Attributes:
        pairs, images: how many.
        accuracy_a, accuracy_b: means over the runs.
        differences: of each pair, in order.
        deviation: of the differences, with n - 1 (NaN for one pair).
        interval: 95 % of the mean difference by Student's t over the pairs: these test images.
        both: 95 % percentile bootstrap over pairs and images: other seeds and other test images.
        p_value: of the paired t-test over the pairs, two-sided.
        p_signs: of the exact sign-flip test over the pairs, whose smallest value is 2 / 2^pairs;
            None above `MOST_SIGNS` pairs.
    """

    pairs: int
    images: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    differences: tuple[float, ...]
    deviation: float
    interval: tuple[float, float]
    both: tuple[float, float]
    p_value: float
    p_signs: float | None

    @property
    def distinguishable(self) -> bool:
        """Whether the mean difference is more than the training seeds explain."""
        return self.p_value < LEVEL


def compare_arms(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Arms:
    """Compare verdicts bool [pairs,N] of two arms, row i of `a` with row i of `b`, on the same N
    images; `seed` is the bootstrap's. `ValueError` for other shapes, or fewer than two pairs.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2 or not a.shape[1]:
        raise ValueError(
            f"verdicts of shapes {a.shape} and {b.shape}: expected two of [pairs,N] with at least "
            "2 pairs"
        )
    from scipy import stats  # takes a second to load

    gains = b.astype(np.int8) - a.astype(np.int8)
    differences = gains.mean(1, dtype=np.float64)
    mean, pairs = float(differences.mean()), len(differences)
    deviation = float(differences.std(ddof=1))
    if deviation:
        half = float(stats.t.ppf(0.975, pairs - 1)) * deviation / pairs**0.5
        p_value = float(stats.ttest_1samp(differences, 0).pvalue)
    else:
        half, p_value = 0.0, float(mean == 0)
    return Arms(
        pairs,
        a.shape[1],
        float(a.mean()),
        float(b.mean()),
        mean,
        tuple(map(float, differences)),
        deviation,
        (mean - half, mean + half),
        _over_both(gains, seed),
        p_value,
        sign_flips(differences),
    )


def _over_both(gains: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `gains` [pairs,N] when rows and columns are drawn again,
    each for itself. Equal columns, of which there are many, are drawn together.
    """
    draws, (pairs, images) = np.random.default_rng(seed), gains.shape
    kinds, counts = np.unique(gains, axis=1, return_counts=True)
    rows = draws.multinomial(pairs, np.full(pairs, 1 / pairs), size=DRAWS) / pairs
    columns = draws.multinomial(images, counts / images, size=DRAWS) / images
    low, high = np.quantile(((rows @ kinds) * columns).sum(1), [0.025, 0.975])
    return float(low), float(high)


def sign_flips(differences: np.ndarray) -> float | None:
    """Two-sided p-value of the mean of `differences` if each could as well have had the other sign:
    counted over all combinations, None above `MOST_SIGNS` differences.
    """
    if len(differences) > MOST_SIGNS:
        return None
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    return float((sums >= abs(differences.sum()) - 1e-12).mean())


def sentence(found: Arms, what: str) -> str:
    """What the comparison says, and no more than that."""
    low, high = (f"{100 * edge:+.2f}" for edge in found.interval)
    told = (
        f"{what}: B is {abs(100 * found.difference):.2f} points "
        f"{'below' if found.difference < 0 else 'above'} A over {found.pairs} pairs of runs on "
        f"{found.images} images (95 % interval {low} to {high}, p = {found.p_value:.2g}): "
    )
    if found.distinguishable:
        return told + "more than the training seeds explain."
    return told + "training seeds alone may do that."


# -- runs ------------------------------------------------------------------------------------------
def compare_runs(
    a: Sequence[Store], b: Sequence[Store], what: str = "autoattack"
) -> dict[str, Any]:
    """A report of plain JSON values on the runs `a`, each with the run of `b` at its place.

    Returns: `a`, `b`, `what`, `images`; `rows`, one for clean, PGD and AutoAttack each, with the
        fields of `Arms` as far as all runs can be paired there; `sentence` on `what`; `notes`.
        Raises `DataError` where `what` cannot be paired: other numbers of runs, images, labels or
        settings, a run given twice, or no evaluation.
    """
    if what not in VERDICTS:
        raise ConfigError(f"--what {what}: {nearest(what, VERDICTS)}")
    _check(a, b)
    every = [read(run) for run in (*a, *b)]
    first, arms = every[0], (every[: len(a)], every[len(a) :])
    rows: dict[str, Arms] = {}
    notes = []
    for kind in VERDICTS:
        reasons = {run.run: different(first, run, kind) for run in every[1:]}
        if unlike := next((run for run, reason in reasons.items() if reason), None):
            if kind == what:
                raise DataError(
                    f"'{first.run}' and '{unlike}' cannot be compared image by image: "
                    f"{reasons[unlike]}; evaluate all runs alike"
                )
            notes.append(f"{SPELLED[kind]} is not compared: {reasons[unlike]}")
            continue
        one, two = (np.stack([run.verdicts(kind) for run in arm]) for arm in arms)
        rows[kind] = compare_arms(one, two)
    return {
        "a": [str(run) for run in a],
        "b": [str(run) for run in b],
        "what": what,
        "images": rows[what].images,
        "rows": [
            {"what": titled(first, kind), **dataclasses.asdict(row)} for kind, row in rows.items()
        ],
        "sentence": sentence(rows[what], titled(first, what)),
        "notes": notes,
    }


def _check(a: Sequence[Store], b: Sequence[Store]) -> None:
    if len(a) != len(b):
        raise DataError(
            f"A has {len(a)} runs and B {len(b)}; give as many of each, those of one seed at the "
            "same place"
        )
    given = [run.uri for run in (*a, *b)]
    if again := next((uri for uri in given if given.count(uri) > 1), None):
        raise DataError(f"'{again}' is given twice; give each run once")


def table(report: Mapping[str, Any]) -> list[dict[str, object]]:
    """The rows of `compare_runs` for printing: accuracies in percent, differences in points."""
    return [
        columns(row)
        | {
            "95 % over seeds": span(row["interval"]),
            "and over images": span(row["both"]),
            "pairs with B above": f"{sum(d > 0 for d in row['differences'])} of {row['pairs']}",
            "p (t-test)": row["p_value"],
            "p (signs)": row["p_signs"],
        }
        for row in report["rows"]
    ]
