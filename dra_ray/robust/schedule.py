"""Learning rate and momentum per epoch."""

from __future__ import annotations

import math

from dra_ray import config


def one_cycle(epoch: int, optim: config.Optim) -> tuple[float, float]:
    """(learning rate, momentum) of epoch 0, 1, ...: torch's OneCycleLR(max_lr, pct_start, total_steps=epochs), as DM-AT uses it.

    The rate rises by a cosine from lr/25 to lr, then falls to lr/250,000; momentum runs against it from 0.95 to 0.85 and back.
    """
    peak = optim.pct_start * optim.epochs - 1
    low, final = optim.lr / 25, optim.lr / 25 / 1e4
    if epoch <= peak:
        return _cosine(low, optim.lr, epoch / peak), _cosine(0.95, 0.85, epoch / peak)
    # peak lies at or before epoch 0 where the rise is shorter than one epoch: the run then starts on the way down
    share = min(1.0, (epoch - peak) / (optim.epochs - 1 - peak))
    return _cosine(optim.lr, final, share), _cosine(0.85, 0.95, share)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
