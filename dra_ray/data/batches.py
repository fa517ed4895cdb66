"""The batch plan: batch t is a pure function of (seed, t), so resuming needs no sampler state and
workers take slices.

An epoch counts as DM-AT's does (arXiv 2302.04638): ceil(N/B) batches of B, where N counts the
training images before any were held out for validation. int(B*fraction) images of a batch are
synthetic, drawn uniformly with replacement or by windows (`windows`); the real ones are consecutive
slices of a permutation that is fresh every epoch, and a short last slice is topped up with
synthetic images (with the next permutation's where there are none, so that every batch is full:
DM-AT's last one is short).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from dra_ray.data.random import Stream, generator
from dra_ray.data.windows import Windows


def part_of(batch: int, rank: int, world: int) -> slice:
    """What worker `rank` of `world` takes of a batch: the parts follow each other and differ by one
    image at most.
    """
    return slice(rank * batch // world, (rank + 1) * batch // world)


# an epoch's batches share a permutation, and ImageNet's takes longer than slicing it
@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int, number: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, Stream.BATCH_ORDER, epoch, number))


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Indices of every batch; an index below `real_images` is real, the rest count from there into
    the synthetic set.

    `epoch_images` is the number that an epoch counts, `real_images` by default.
    """

    seed: int
    real_images: int
    synthetic_images: int
    batch: int
    fraction: float
    epoch_images: int | None = None
    windows: Windows | None = None  # which synthetic images are drawn; default: all alike

    @property
    def synthetic_per_batch(self) -> int:
        return int(self.batch * self.fraction) if self.synthetic_images else 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-(self.epoch_images or self.real_images) // self.batch)

    def indices(self, step: int) -> Tensor:
        """int64 [batch], shuffled."""
        real = self._real(*divmod(step, self.steps_per_epoch))
        draws = generator(self.seed, Stream.BATCH_DRAWS, step)
        count = self.batch - len(real)
        if self.windows:
            synthetic = self.windows.draws(self._drawn_before(step), count)
        else:
            most = max(self.synthetic_images, 1)
            synthetic = torch.randint(most, (count,), generator=draws)
        chosen = torch.cat([real, synthetic + self.real_images])
        return chosen[torch.randperm(self.batch, generator=draws)]

    def near(self, step: int) -> list[int]:
        """Numbers of the synthetic set's shards that step `step` and those after it need."""
        return self.windows.near(self._drawn_before(step)) if self.windows else []

    def _drawn_before(self, step: int) -> int:
        """Synthetic images of all steps before."""
        epoch, position = divmod(step, self.steps_per_epoch)
        real = epoch * self._real_before(self.steps_per_epoch) + self._real_before(position)
        return step * self.batch - real

    def _real_before(self, position: int) -> int:
        """Real images of an epoch's first batches, where batches have synthetic ones."""
        wanted = self.batch - self.synthetic_per_batch
        number, part = divmod(position, -(-self.real_images // wanted))
        return number * self.real_images + min(part * wanted, self.real_images)

    def _real(self, epoch: int, position: int) -> Tensor:
        """The real images of an epoch's batch `position`."""
        wanted = self.batch - self.synthetic_per_batch
        if self.synthetic_per_batch:
            number, part = divmod(position, -(-self.real_images // wanted))
            return _permutation(self.real_images, self.seed, epoch, number)[
                part * wanted : (part + 1) * wanted
            ]
        start = (
            position * wanted
        )  # passes are chained where an epoch asks for more real images than there are
        first, last = start // self.real_images, (start + wanted - 1) // self.real_images
        order = torch.cat(
            [
                _permutation(self.real_images, self.seed, epoch, number)
                for number in range(first, last + 1)
            ]
        )
        return order[start - first * self.real_images :][:wanted]
