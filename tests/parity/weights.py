"""Weights that are not stored: the same on every machine, and made alike for an official
implementation when its outputs were taken.
"""

from __future__ import annotations

import numpy as np
import torch

FIXED = (
    "resample_filter",
    "pos_embed",
    "freqs_cos",
    "freqs_sin",
)  # tensors that a network's sizes decide


def fill(net: torch.nn.Module, seed: int) -> None:
    """Every tensor of the state dict but the fixed ones, in sorted key order from one generator,
    scaled so that activations stay near 1.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    for name, tensor in sorted(net.state_dict().items()):
        if name.endswith(FIXED):
            continue
        values = generator.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if tensor.ndim > 1:
            values /= np.sqrt(np.prod(tensor.shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            values = 1 + values / 4
        else:
            values /= 4
        tensor.copy_(torch.from_numpy(values))
