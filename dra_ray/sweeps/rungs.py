"""Where asynchronous successive halving compares trials (ASHA; Li et al. 2020, arXiv 1810.05934),
as Ray Tune places it.
"""

from __future__ import annotations

import math

from dra_ray import config


def milestones(grace: int, factor: float, end: float) -> list[float]:
    """grace * factor**k below `end`, ascending, in the unit of `grace`: where ASHA's rungs begin.
    Empty where nothing is raced (no grace, or a factor of at most 1).
    """
    if grace < 1 or factor <= 1:
        return []
    heights: list[float] = []
    while (height := grace * factor ** len(heights)) < end:
        heights.append(float(height))
    return heights


def rung_epochs(
    epochs: int,
    grace_epochs: int,
    factor: float,
    every_epochs: int = 1,
    images_per_epoch: int = 1,
) -> list[int]:
    """Epochs after which a trial of `epochs` epochs can be stopped, ascending.

    ASHA's milestones lie at grace_epochs * factor**k. A trial is compared at the first validation
    that reaches one: after a multiple of `every_epochs`. Milestones between two validations share
    the later one. After the last epoch nothing is left to stop. `images_per_epoch` only matters for
    rounding, since Ray Tune counts images and not epochs.
    """
    step = every_epochs * images_per_epoch
    heights = milestones(grace_epochs * images_per_epoch, factor, epochs * images_per_epoch)
    reached = {every_epochs * math.ceil(height / step) for height in heights}
    return sorted(epoch for epoch in reached if epoch < epochs)


def of_sweep(sweep: config.Sweep, images_per_epoch: int = 1) -> list[int]:
    """`rung_epochs` of a sweep's settings."""
    base, asha = sweep.base, sweep.asha
    every = base.selection.every_epochs
    return rung_epochs(
        base.optim.epochs,
        asha.grace_epochs,
        asha.reduction_factor,
        every,
        images_per_epoch,
    )
