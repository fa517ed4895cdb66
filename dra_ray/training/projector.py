"""The projection head of the alignment loss: dropped after training."""

from __future__ import annotations

from typing import Literal

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


def projector(
    wide_in: int, wide_out: int, hidden: int, activation: Literal["silu", "relu", "gelu"] = "silu"
) -> nn.Sequential:
    """REPA's 3-layer head (arXiv 2410.06940, which arXiv 2602.19931 follows): linear, activation,
    linear, activation, linear.

    Xavier-uniform weights, zero biases. [B,wide_in] -> [B,wide_out].
    """
    between = ACTIVATIONS[activation]
    head = nn.Sequential(
        nn.Linear(wide_in, hidden),
        between(),
        nn.Linear(hidden, hidden),
        between(),
        nn.Linear(hidden, wide_out),
    )
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return head
