"""Learning rate and momentum of every step."""

from __future__ import annotations

import math

from dra_ray import config


def at(step: int, steps_per_epoch: int, optim: config.Optim) -> tuple[float, float]:
    """(learning rate, momentum) of step 0, 1, ...

    one-cycle, both cosines and drops change once an epoch, warmup-cosine at every step; only
    one-cycle changes the momentum.
    """
    epoch = step // steps_per_epoch
    if optim.schedule == "one-cycle":
        return one_cycle(epoch, optim)
    if optim.schedule == "cosine":
        return _cosine(optim.lr, 0.0, epoch / optim.epochs), optim.momentum
    if optim.schedule == "ikl-cosine":
        return _cosine(optim.lr, 0.0, (epoch + 1) / (optim.epochs + 1)), optim.momentum
    if optim.schedule == "drops":
        return optim.lr * 0.1 ** sum(drop <= epoch for drop in optim.lr_drops), optim.momentum
    return warmup_cosine(step, steps_per_epoch, optim), optim.momentum


def one_cycle(epoch: int, optim: config.Optim) -> tuple[float, float]:
    """(learning rate, momentum) of epoch 0, 1, ...: torch's OneCycleLR(max_lr, pct_start,
    total_steps=epochs), as DM-AT uses it.

    The rate rises by a cosine from lr/25 to lr, then falls to lr/250,000; momentum runs against it
    from 0.95 to 0.85 and back.
    """
    peak = optim.pct_start * optim.epochs - 1
    low, final = optim.lr / 25, optim.lr / 25 / 1e4
    if epoch <= peak:
        return _cosine(low, optim.lr, epoch / peak), _cosine(0.95, 0.85, epoch / peak)
    # peak lies at or before epoch 0 where the rise is shorter than one epoch: the run then starts
    # on the way down
    share = min(1.0, (epoch - peak) / (optim.epochs - 1 - peak))
    return _cosine(optim.lr, final, share), _cosine(0.85, 0.95, share)


def warmup_cosine(step: int, steps_per_epoch: int, optim: config.Optim) -> float:
    """Learning rate of step 0, 1, ...: linear from lr_start to lr, then a cosine that would reach
    lr_end one step after the last.

    Counted as optax's warmup_cosine_decay_schedule does, which the ViT recipe of Wu et al. (AAAI
    2025) uses.
    """
    warmup, total = optim.warmup_epochs * steps_per_epoch, optim.epochs * steps_per_epoch
    if step < warmup:
        return optim.lr_start + (optim.lr - optim.lr_start) * step / warmup
    return _cosine(optim.lr, optim.lr_end, (step - warmup) / (total - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
