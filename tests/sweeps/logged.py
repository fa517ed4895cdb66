"""Rows of a sweep's log whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dra_ray.runs import Decision, RungRow, pack_verdicts

IMAGES = 1000


def row(
    trial: str,
    epoch: int,
    robust: float | Sequence[bool] | np.ndarray,
    *,
    clean: float | None = 0.8,
    decision: Decision = "continue",
    images: int | None = None,
    per_epoch: int = 100,
) -> RungRow:
    """A validation; `robust` is an accuracy, or a verdict per image."""
    scored = {"images": images}
    if not isinstance(robust, float):
        flags = np.asarray(robust, dtype=bool)
        scored = {"images": len(flags), "verdicts": pack_verdicts(flags)}
        robust = float(flags.mean())
    return RungRow(
        trial=trial,
        epoch=epoch,
        images_seen=epoch * per_epoch,
        clean_accuracy=clean,
        robust_accuracy=robust,
        decision=decision,
        **scored,
    )


def first(count: int, images: int = IMAGES) -> np.ndarray:
    """Verdicts of a trial that withstands on the first `count` images."""
    return np.arange(images) < count


def ended(scores: Mapping[str, float | np.ndarray], epoch: int = 4) -> list[RungRow]:
    """Trials that were trained to the end."""
    return [row(trial, epoch, score, decision="done") for trial, score in scores.items()]
