"""Two evaluated runs compared image by image, as gains of 0.3 to 2 points on 10,000 images demand
(see `intervals`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dra_ray import config, runs
from dra_ray.errors import ConfigError, DataError, nearest
from dra_ray.evaluation.intervals import Flags, bootstrap_difference, discordant, mcnemar
from dra_ray.storage import Store

LEVEL = 0.05  # below it a p-value counts as more than chance
# array of per_sample.npz that holds the verdicts, and the settings on which they depend
VERDICTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clean": ("clean_correct", ()),
    "pgd": ("pgd_correct", ("threat", "seed", "pgd_steps", "pgd_restarts", "pgd_start", "eot")),
    "autoattack": ("robust", ("threat", "seed", "batch", "version", "level", "streams", "effort")),
}
SPELLED = {"clean": "Clean", "pgd": "PGD", "autoattack": "AutoAttack"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Model B against model A on the same images; accuracies and the difference B - A are
    fractions.

    `interval` is the 95 % percentile bootstrap interval of the difference; `only_a` and `only_b`
    count the images that only one of them gets right; `p_value` is McNemar's exact one, `mid_p` its
    less cautious form.
    """

    images: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    p_value: float
    mid_p: float

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is more than the choice of these images explains: by the test and
        by the interval.
        """
        return self.p_value < LEVEL and self.interval[0] * self.interval[1] > 0

    @property
    def needed(self) -> float:
        """About the smallest difference that would have been distinguishable with as many
        disagreements (normal approximation).
        """
        return 1.96 * math.sqrt(self.only_a + self.only_b) / self.images


def compare(a: Flags, b: Flags, seed: int = 0) -> Comparison:
    """Compare verdicts bool [N] of two models on the same images; `seed` is the bootstrap's.
    `ValueError` where lengths differ.
    """
    only_a, only_b = discordant(a, b)
    difference, low, high = bootstrap_difference(a, b, seed=seed)
    tests = mcnemar(a, b), mcnemar(a, b, mid_p=True)
    return Comparison(
        len(a),
        float(np.mean(a)),
        float(np.mean(b)),
        difference,
        (low, high),
        only_a,
        only_b,
        *tests,
    )


def sentence(found: Comparison, what: str) -> str:
    """What the comparison says, and no more than that."""
    if not found.only_a + found.only_b:
        return f"{what}: A and B have the same verdict on each of the {found.images} images."
    if found.only_a == found.only_b:
        return (
            f"{what}: A and B are equal on {found.images} images, though they disagree on "
            f"{found.only_a + found.only_b} of them."
        )
    low, high = (f"{100 * edge:+.2f}" for edge in found.interval)
    told = (
        f"{what}: B is {abs(100 * found.difference):.2f} points "
        f"{'above' if found.difference > 0 else 'below'} A on {found.images} images"
    )
    told += (
        f" (95 % interval {low} to {high}, McNemar p = {found.p_value:.2g}, mid-p "
        f"{found.mid_p:.2g}): "
    )
    if found.distinguishable:
        return told + "more than the choice of the images explains."
    return (
        told + "noise of this size is to be expected; with as many disagreements, it takes about "
        f"{100 * found.needed:.2f} points to stand out."
    )


# -- runs ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What `dra evaluate` left in a run: the result, and one verdict per test image."""

    run: Store
    result: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def verdicts(self, what: str) -> np.ndarray:
        """bool [N]: correct when clean, under PGD, or under AutoAttack."""
        name = VERDICTS[what][0]
        if name not in self.arrays:
            raise DataError(
                f"'{self.run}' has no array '{name}' in per_sample.npz; evaluate it again"
            )
        return self.arrays[name].astype(bool)

    def setting(self, field: str) -> Any:
        """Of the evaluation; one that the file does not name has the value that was once the only
        one.
        """
        default = getattr(config.Evaluation(), field, None)
        return self.result.get("settings", {}).get(field, self.result.get(field, default))

    @property
    def images_sha256(self) -> str | None:
        """Of the test images; None where the result does not record it."""
        images: str | None = self.result.get("settings", {}).get("images")
        return images


def read(run: Store) -> Evaluated:
    """The finished evaluation in a run, or in a folder of its own; `DataError` where there is none,
    or half of one.
    """
    folder = next(
        (place for place in (run / "evaluation", run) if (place / "autoattack.json").exists()), None
    )
    if folder is None:
        runs.require_folder(run)
        raise DataError(
            f"'{run}' has no autoattack.json, also not in evaluation/, so it is not evaluated yet; "
            f"run `dra evaluate {run}`"
        )
    if not (folder / "per_sample.npz").exists():
        raise DataError(
            f"'{folder}' has no per_sample.npz beside autoattack.json; evaluate it again"
        )
    result, arrays = (
        (folder / "autoattack.json").read_json(),
        (folder / "per_sample.npz").read_npz(),
    )
    if not isinstance(result, dict) or "labels" not in arrays:
        raise DataError(
            f"'{folder}': autoattack.json or per_sample.npz is damaged or from elsewhere; evaluate "
            "the run again"
        )
    return Evaluated(run, result, arrays)


def different(a: Evaluated, b: Evaluated, what: str) -> str | None:
    """Why the verdicts of A and B on `what` cannot be paired; None where they can."""
    if len(a.arrays["labels"]) != len(b.arrays["labels"]):
        return (
            f"they were evaluated on {len(a.arrays['labels'])} and {len(b.arrays['labels'])} images"
        )
    if not np.array_equal(a.arrays["labels"], b.arrays["labels"]):
        return "the labels of their test images differ"
    if a.images_sha256 and b.images_sha256 and a.images_sha256 != b.images_sha256:
        return "their test images differ"
    fields = [field for field in VERDICTS[what][1] if a.setting(field) != b.setting(field)]
    return (
        f"{fields[0]} is {a.setting(fields[0])} in one and {b.setting(fields[0])} in the other"
        if fields
        else None
    )


def pair(a: Evaluated, b: Evaluated, what: str = "autoattack") -> Comparison:
    """Compare two evaluations on `what`. Raises `DataError` where they cannot be paired: other
    images, labels or settings.
    """
    if reason := different(a, b, what):
        raise DataError(
            f"'{a.run}' and '{b.run}' cannot be compared image by image: {reason}; evaluate both "
            "alike"
        )
    return compare(a.verdicts(what), b.verdicts(what))


def compare_runs(a: Store, b: Store, what: str = "autoattack") -> dict[str, Any]:
    """A report of plain JSON values on two evaluated runs, as `dra compare` prints and writes it.

    Returns: `a`, `b`, `what`, `images`; `rows`, one for clean, PGD and AutoAttack each, with the
        fields of `Comparison` as far
    as the runs can be paired there; `sentence` on `what`; `notes`. Raises `DataError` when `what`
    cannot be paired: other images, labels or settings, or no evaluation.
    """
    if what not in VERDICTS:
        raise ConfigError(f"--what {what}: {nearest(what, VERDICTS)}")
    one, two = read(a), read(b)
    found = {what: pair(one, two, what)}
    reasons = {kind: different(one, two, kind) for kind in VERDICTS}
    found = {
        kind: found.get(kind) or pair(one, two, kind)
        for kind, reason in reasons.items()
        if reason is None
    }
    notes = [
        f"{SPELLED[kind]} is not compared: {reason}" for kind, reason in reasons.items() if reason
    ]
    if not (one.images_sha256 and two.images_sha256):
        notes.append(
            "a result records no digest of its images, so that only labels and settings were "
            "checked; evaluate both again to be sure"
        )
    return {
        "a": str(a),
        "b": str(b),
        "what": what,
        "images": found[what].images,
        "rows": [
            {"what": titled(one, kind), **dataclasses.asdict(row), "interval": list(row.interval)}
            for kind, row in found.items()
        ],
        "sentence": sentence(found[what], titled(one, what)),
        "notes": notes,
    }


def columns(row: Mapping[str, Any]) -> dict[str, object]:
    """First columns of a printed comparison: accuracies in percent, the difference in points."""
    return {
        "what": row["what"],
        "A_accuracy": row["accuracy_a"],
        "B_accuracy": row["accuracy_b"],
        "B - A, points": f"{100 * row['difference']:+.2f}",
    }


def span(interval: Sequence[float]) -> str:
    """An interval of fractions in points."""
    return " to ".join(f"{100 * edge:+.2f}" for edge in interval)


def table(report: Mapping[str, Any]) -> list[dict[str, object]]:
    """The rows of `compare_runs` for printing: accuracies in percent, differences in points."""
    return [
        columns(row)
        | {
            "95 % interval": span(row["interval"]),
            "only A right": row["only_a"],
            "only B right": row["only_b"],
            "p (McNemar)": row["p_value"],
            "mid-p": row["mid_p"],
        }
        for row in report["rows"]
    ]


def titled(evaluated: Evaluated, what: str) -> str:
    """A kind of verdicts as tables name it, such as PGD-20."""
    return f"PGD-{evaluated.setting('pgd_steps')}" if what == "pgd" else SPELLED[what]
