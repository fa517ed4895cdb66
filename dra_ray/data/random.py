"""Random streams: every draw is a function of (seed, purpose, number), so nothing depends on who
draws it, or when.
"""

from __future__ import annotations

import enum

import torch


class Stream(enum.IntEnum):
    """What random numbers are for. A value is part of every seed derived with it: never change one.

    Attacks number their own streams by attack, below a seed of their own (`attacks.draws`).
    """

    BATCH_ORDER = 1
    BATCH_DRAWS = 2
    AUGMENT = 3
    ATTACK = 4
    TEACHER_NOISE = 5
    VALIDATION = 6
    EXTRA_NOISE = 7
    EXTRA_SIGMA = 8
    STUDENT = 9
    TEACHER_INIT = 10
    TEACHER_TRAINING = 11
    TEACHER_DROPOUT = 12
    TEACHER_AUGMENT = 13
    TEACHER_VALIDATION = 14
    PROBE_STUDENT = 30
    LABEL_LEAK = 31
    TARGET_STATISTICS = 32
    ANALYSIS = 33
    CANONICAL = 34
    CANONICAL_BATCH = 35
    CANONICAL_AUGMENT = 36
    BACKGROUND = 37
    WINDOW_ORDER = 38
    WINDOW_ROWS = 39
    WINDOW_DRAWS = 40
    CONVERT_BLOCKS = 41
    CONVERT_ROWS = 42


def generator(seed: int, *path: int) -> torch.Generator:
    """A CPU generator for one purpose, a pure function of (seed, path) (splitmix64 finaliser over
    each part).
    """
    return torch.Generator().manual_seed(derive(seed, *path))


def derive(seed: int, *path: int) -> int:
    """A well-mixed 63-bit seed from a seed and the steps that lead to its use."""
    mask = (1 << 64) - 1
    state = 0
    # the seed is mixed before the path joins it, or (0, 1) and (1, 0) would meet
    for part in (seed, *path):
        state = (state ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1
