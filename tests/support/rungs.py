"""Rows of a sweep's rungs, and Ray Tune's own ASHA on the same reports."""

from __future__ import annotations

import dataclasses

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from dra_ray.runs import RungRow

IMAGES_PER_EPOCH = 1181


def rung(trial: int, epoch: int, robust: float | None, decision: str, at: float) -> RungRow:
    """A report of trial number `trial`, at `at` seconds since 1970; `robust` is None, and so are
    its scores, where it failed before it had any.
    """
    return RungRow.model_validate(
        {
            "trial": f"trial-{trial:03d}",
            "epoch": epoch,
            "images_seen": 100 * epoch,
            "clean_accuracy": robust,
            "robust_accuracy": robust,
            "decision": decision,
            "reason": "the loss is nan" if decision == "failed" else None,
            "at": at,
        }
    )


@dataclasses.dataclass
class Trial:
    """As much of a trial of Ray Tune as its schedulers ask for."""

    trial_id: str


class RayAsha:
    """Ray Tune's ASHA on `images_seen`, for the named trials."""

    def __init__(self, epochs: int, grace: int, factor: float, trials: list[str]) -> None:
        self._asha = ASHAScheduler(
            time_attr="images_seen",
            metric="score",
            mode="max",
            max_t=epochs * IMAGES_PER_EPOCH,
            grace_period=grace * IMAGES_PER_EPOCH,
            reduction_factor=factor,
            stop_last_trials=False,
        )
        self._trials = {name: Trial(name) for name in trials}
        for trial in self._trials.values():
            self._asha.on_trial_add(None, trial)

    def stops(self, trial: str, epoch: int, score: float) -> bool:
        """Its decision on one report."""
        row = {"images_seen": epoch * IMAGES_PER_EPOCH, "score": score}
        decision = self._asha.on_trial_result(None, self._trials[trial], row)
        return decision == TrialScheduler.STOP
