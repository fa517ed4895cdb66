"""The batch plan: batch t is a pure function of (seed, t), so resuming needs no sampler state and workers take slices.

An epoch counts as DM-AT's does (arXiv 2302.04638): ceil(N/B) batches of B, of which int(B*fraction) are synthetic,
drawn uniformly with replacement; the real images are a fresh permutation every epoch, taken in consecutive slices,
and a short last slice is topped up with synthetic images (with real ones where there are none).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


def generator(seed: int, *path: int) -> torch.Generator:
    """A CPU generator for one purpose, a pure function of (seed, path) (splitmix64 finaliser over each part)."""
    return torch.Generator().manual_seed(derive(seed, *path))


def derive(seed: int, *path: int) -> int:
    """A well-mixed 63-bit seed from a seed and the steps that lead to its use."""
    mask = (1 << 64) - 1
    state = 0
    for part in (seed, *path):  # the seed is mixed before the path joins it, or (0, 1) and (1, 0) would meet
        state = (state ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Indices of every batch; an index below `real_images` is real, the rest count from there into the synthetic set."""

    seed: int
    real_images: int
    synthetic_images: int
    batch: int
    fraction: float

    @property
    def synthetic_per_batch(self) -> int:
        return int(self.batch * self.fraction) if self.synthetic_images else 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.real_images // self.batch)

    def indices(self, step: int) -> Tensor:
        """int64 [batch], shuffled."""
        epoch, position = divmod(step, self.steps_per_epoch)
        real_per_batch = self.batch - self.synthetic_per_batch
        start = position * real_per_batch
        # several passes are chained where an epoch asks for more real images than there are
        passes = range(start // self.real_images, (start + real_per_batch - 1) // self.real_images + 1)
        order = torch.cat([torch.randperm(self.real_images, generator=generator(self.seed, 1, epoch, p)) for p in passes])
        real = order[start - passes.start * self.real_images :][:real_per_batch]
        draws = generator(self.seed, 2, step)
        synthetic = torch.randint(max(self.synthetic_images, 1), (self.batch - len(real),), generator=draws) + self.real_images
        chosen = torch.cat([real, synthetic])
        return chosen[torch.randperm(self.batch, generator=draws)]
