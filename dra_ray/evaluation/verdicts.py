"""The verdicts of an evaluation, gathered batch by batch, and the numbers that come of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dra_ray import config
from dra_ray.attacks import checks
from dra_ray.attacks.plan import Chunk, Plan
from dra_ray.config import catalogue
from dra_ray.config.catalogue import Effort
from dra_ray.data import corruptions
from dra_ray.evaluation.intervals import wilson
from dra_ray.evaluation.result import (
    Corrupted,
    Corruptions,
    Interval,
    Point,
    Result,
    Summary,
    Threat,
)

Arrays = Mapping[str, np.ndarray]


class Verdicts:
    """Of one model on `images` images; batches come in any order within a stage.

    Attributes:
        clean: bool [N], correct on the image.
        pgd: float [N], share of passes that are correct under PGD, 0 or 1 where the student is not
            randomised; pgd_worst: bool [N], all are.
        plan: AutoAttack's, once the clean images are done.
        curve: radius in 1/255 -> as `pgd`, there.
        corrupted: (name, severity, accuracy).
        seconds: stage -> work, summed over batches.
        numerics: the different ones that batches were computed with, the first batch's first.
    """

    def __init__(self, images: int, radii_255: Sequence[float] = ()) -> None:
        self.images = images
        self.clean, self.pgd_worst = (
            torch.zeros(images, dtype=torch.bool),
            torch.zeros(images, dtype=torch.bool),
        )
        self.pgd = torch.zeros(images)
        self.plan: Plan | None = None
        self.curve = {radius: torch.zeros(images) for radius in radii_255}
        self.corrupted: list[tuple[str, int, float]] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.numerics: list[dict[str, Any]] = []
        self.num_classes = 0
        self.randomised = False
        self._warnings: list[str] = []

    @property
    def standing(self) -> int:
        """Images not fooled so far."""
        return int(self.clean.sum()) if self.plan is None else self.plan.first_failure.count("")

    def spend(self, stage: str, outcome: Arrays) -> None:
        """Time and machine of a batch."""
        self.seconds[stage] += float(outcome["seconds"])
        numerics = json.loads(str(outcome["numerics"]))
        if numerics not in self.numerics:
            self.numerics.append(numerics)

    def take_clean(self, chunk: Chunk, outcome: Arrays) -> None:
        at = chunk.indices
        self.clean[at], self.pgd[at], self.pgd_worst[at] = (
            _tensor(outcome, name) for name in ("clean", "pgd", "pgd_worst")
        )
        self.num_classes = int(outcome["classes"])
        if chunk.k == 0:
            self._warnings = [str(flag) for flag in outcome["flags"]]
            self.randomised = bool(outcome["randomised"])

    def begin_attacks(self, images: Tensor, batch: int, evaluation: config.Evaluation) -> Plan:
        """AutoAttack on images float [N,C,H,W], once all clean batches are in."""
        attacks = catalogue.attacks(self.num_classes, evaluation.version, evaluation.level)
        self.plan = Plan(self.clean, images, batch, attacks)
        return self.plan

    def take_radius(self, radius: float, chunk: Chunk, outcome: Arrays) -> None:
        self.curve[radius][chunk.indices] = _tensor(outcome, "share")

    def take_attack(self, chunk: Chunk, outcome: Arrays) -> None:
        assert self.plan
        self.plan.merge(chunk, _tensor(outcome, "broken"), _tensor(outcome, "adversarial"))

    # -- what it comes to --------------------------------------------------------------------------
    def per_sample(self) -> dict[str, np.ndarray]:
        """Verdicts by image, bool [N]; `first_failure` is a name, "" for a robust image; pgd_share
        is `pgd`.
        """
        assert self.plan
        failed = np.array(self.plan.first_failure)
        arrays = {
            "clean_correct": self.clean.numpy(),
            "pgd_correct": (self.pgd > 0.5).numpy(),
            "robust": self.plan.alive.numpy(),
        }
        arrays |= {
            "first_failure": failed,
            "pgd_share": self.pgd.numpy(),
            "pgd_worst": self.pgd_worst.numpy(),
        }
        lost = failed == "clean"
        for attack in self.plan.robust_after:
            lost = lost | (failed == attack)
            arrays[f"after_{attack}"] = ~lost
        return arrays

    def summary(
        self, evaluation: config.Evaluation, threat: config.Threat, effort: Effort
    ) -> Summary:
        """Accuracies with their 95 % intervals, what they depend on, and what to know before
        believing them.
        """
        assert self.plan
        n = self.images
        clean, robust = int(self.clean.sum()), int(self.plan.alive.sum())
        measured: dict[str, Any] = {}
        if self.curve:
            measured["curve"] = [
                _point(radius, share) for radius, share in sorted(self.curve.items())
            ]
        if self.corrupted:
            measured["corruptions"] = self._corruptions(str(evaluation.corruptions))
        return Summary(
            images=n,
            clean_accuracy=clean / n,
            clean_interval=wilson(clean, n),
            pgd_accuracy=_mean(self.pgd),
            pgd_interval=_interval(_mean(self.pgd), n),
            pgd_worst_accuracy=int(self.pgd_worst.sum()) / n,
            autoattack_accuracy=robust / n,
            interval=wilson(robust, n),
            after_attack={attack: count / n for attack, count in self.plan.robust_after.items()},
            after_attack_interval={
                attack: wilson(count, n) for attack, count in self.plan.robust_after.items()
            },
            attack_s={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            threat=Threat(norm=threat.norm, eps_255=threat.eps_255),
            randomised=self.randomised,
            score=self.score(evaluation),
            flags=self._warnings + self._notes(evaluation, effort),
            numerics=self.numerics[0],
            version=evaluation.version,
            level=evaluation.level,
            streams=evaluation.streams,
            seed=evaluation.seed,
            pgd_steps=evaluation.pgd_steps,
            pgd_restarts=evaluation.pgd_restarts,
            eot=evaluation.eot,
            **measured,
        )

    def score(self, evaluation: config.Evaluation) -> str:
        """Which of the accuracies counts: against randomness, PGD that averages it out."""
        return "pgd_accuracy" if self.randomised and evaluation.eot > 1 else "autoattack_accuracy"

    def _corruptions(self, source: str) -> Corruptions:
        rows = sorted(self.corrupted)
        means = corruptions.summary(rows)
        return Corruptions(
            source=source,
            rows=[
                Corrupted(name=name, severity=severity, accuracy=accuracy)
                for name, severity, accuracy in rows
            ],
            mean=means["corruption_accuracy"],
            by_corruption=means["by_corruption"],
            published_sets=means["published_sets"],
        )

    def _notes(self, evaluation: config.Evaluation, effort: Effort) -> list[str]:
        assert self.plan
        notes = checks.effort_flags(effort) + checks.square_flags(
            self.plan.robust_after, self.images
        )
        notes += checks.notes(
            evaluation.version, evaluation.level, evaluation.streams, self.num_classes
        )
        if self.randomised:
            notes.append(_RANDOMISED[evaluation.eot > 1].format(eot=evaluation.eot))
        if len(self.numerics) > 1:
            kinds = "; ".join(json.dumps(machine, sort_keys=True) for machine in self.numerics)
            notes.append(
                "Batches were computed on machines that round differently, so the verdicts are no "
                f"single machine's: {kinds}."
            )
        return notes


_RANDOMISED = {
    True: "The student is randomised: the score that counts is PGD's, each gradient the sum of "
    "{eot} passes, and the accuracy that of fresh passes; "
    "AutoAttack takes an image for broken when one pass misclassifies it.",
    False: "The student is randomised, and no attack here averages its randomness out: set "
    "evaluation.eot, such as 20, and version rand.",
}


def table(result: Result) -> list[dict[str, object]]:
    """Rows {"what", "accuracy", "interval"} for printing: clean, PGD, after each attack,
    AutoAttack, further radii, corruptions.
    """
    pgd = f"PGD-{result.pgd_steps}"
    order = catalogue.in_order(set(result.after_attack), result.version)
    named = {"Clean": result.clean_accuracy}
    if result.pgd_accuracy is not None:
        named[pgd] = result.pgd_accuracy
    named |= {f"after {attack}": result.after_attack[attack] for attack in order[:-1]}
    named["AutoAttack"] = result.autoattack_accuracy
    named |= {f"{pgd} at {point.eps_255:g}/255": point.accuracy for point in result.curve}
    rows: list[dict[str, object]] = [
        {"what": what, "accuracy": accuracy, "interval": list(_interval(accuracy, result.images))}
        for what, accuracy in named.items()
    ]
    if result.corruptions:  # a mean over sets of the same images, so no binomial interval
        rows.append({"what": "corruptions", "accuracy": result.corruptions.mean, "interval": None})
    return rows


def _interval(accuracy: float, images: int) -> Interval:
    return wilson(round(accuracy * images), images)


def _point(radius: float, share: Tensor) -> Point:
    accuracy = _mean(share)
    return Point(eps_255=radius, accuracy=accuracy, interval=_interval(accuracy, len(share)))


def _mean(share: Tensor) -> float:
    return float(share.double().sum()) / len(share)


def _tensor(outcome: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.array(outcome[name]))
