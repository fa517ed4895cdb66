"""Weight averaging as DM-AT does it (Gowal et al., arXiv 2010.03593, section 4.3)."""

from __future__ import annotations

import torch
from torch import nn


def decay(step: int, warmup_steps: float, limit: float) -> float:
    """Decay after update number `step` (from 1): 0 during the warm-up, then min(limit, (1+d)/(10+d)) with d steps since."""
    since = step - warmup_steps
    return 0.0 if since < 0 else min(limit, (1 + since) / (10 + since))


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, parameters only."""
    kept: list[torch.Tensor] = list(average.parameters())
    live: list[torch.Tensor] = list(model.parameters())
    torch._foreach_lerp_(kept, live, 1 - decay)


@torch.no_grad()
def copy_buffers(average: nn.Module, model: nn.Module) -> None:
    """BatchNorm statistics of the live model, taken over once an epoch: neither averaged nor estimated anew."""
    for kept, live in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(live)
