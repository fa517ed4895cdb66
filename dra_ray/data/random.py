"""Random streams: every draw is a function of (seed, purpose, number), so nothing depends on who
draws it, or when.
"""

from __future__ import annotations

import torch


def generator(seed: int, *path: int) -> torch.Generator:
    """A CPU generator for one purpose, a pure function of (seed, path) (splitmix64 finaliser over
    each part).
    """
    return torch.Generator().manual_seed(derive(seed, *path))


def derive(seed: int, *path: int) -> int:
    """A well-mixed 63-bit seed from a seed and the steps that lead to its use."""
    mask = (1 << 64) - 1
    state = 0
    for part in (
        seed,
        *path,
    ):  # the seed is mixed before the path joins it, or (0, 1) and (1, 0) would meet
        state = (state ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
