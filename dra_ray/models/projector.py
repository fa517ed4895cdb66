"""The projection head of the alignment loss: dropped after training."""

from __future__ import annotations

from torch import nn


def projector(wide_in: int, wide_out: int, hidden: int) -> nn.Sequential:
    """REPA's 3-layer head (arXiv 2410.06940, which arXiv 2602.19931 follows): Linear, SiLU, Linear, SiLU, Linear.

    Xavier-uniform weights, zero biases. [B,wide_in] -> [B,wide_out].
    """
    head = nn.Sequential(nn.Linear(wide_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, wide_out))
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return head
