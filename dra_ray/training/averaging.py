"""Weight averaging: after every step as DM-AT does it (Gowal et al., arXiv 2010.03593, section
4.3), or after every epoch (IKL, arXiv 2305.13948).
"""

from __future__ import annotations

import torch
from torch import nn


def decay(step: int, warmup_steps: float, limit: float, ramp: bool = True) -> float:
    """Decay after update number `step` (from 1): 0 during the warm-up, then min(limit,
    (1+d)/(10+d)) with d steps since.

    Without the ramp it is `limit` from the end of the warm-up on.
    """
    since = step - warmup_steps
    if since < 0:
        return 0.0
    return min(limit, (1 + since) / (10 + since)) if ramp else limit


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, parameters only."""
    kept: list[torch.Tensor] = list(average.parameters())
    live: list[torch.Tensor] = list(model.parameters())
    torch._foreach_lerp_(kept, live, 1 - decay)


@torch.no_grad()
def update_all(average: nn.Module, model: nn.Module, decay: float) -> None:
    """As `update`, BatchNorm's running statistics included; its counts are copied (IKL averages an
    epoch's end so).
    """
    update(average, model, decay)
    for kept, live in zip(average.buffers(), model.buffers(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(live, 1 - decay)
        else:
            kept.copy_(live)


@torch.no_grad()
def copy_buffers(average: nn.Module, model: nn.Module) -> None:
    """BatchNorm statistics of the live model, taken over once an epoch: neither averaged nor
    estimated anew.
    """
    for kept, live in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(live)
