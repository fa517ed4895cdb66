"""Teachers of a few lines that do to a replica what goes wrong in life. They travel to replicas by
value.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

FATAL, ENDLESS = 9, 8  # labels of images that end, or stop, the replica that encodes them


class Sums:
    """A feature that depends on all of its request, and takes `service_s` a micro-batch.

    Args:
        once: a file; what is FATAL or ENDLESS is so until it exists, and makes it.
    """

    feature_dim = 4

    def __init__(
        self, service_s: float = 0.0, micro_batch: int = 16, once: str | None = None
    ) -> None:
        self.service_s, self.micro_batch, self.once = service_s, micro_batch, once

    def check(self, images: Tensor, labels: Tensor, sigma: Tensor) -> None:
        from dra_ray.errors import DataError

        if images.shape[1:] != (1, 4, 4) or not sigma.isfinite().all():
            raise DataError(f"images {list(images.shape)} or sigma are not what the teacher takes")

    def encode_each(
        self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seeds: Tensor
    ) -> Tensor:
        if self.service_s:
            time.sleep(self.service_s)
        if (labels == FATAL).any() and self._first():
            os._exit(1)  # as the kernel ends a process that takes too much memory
        if (labels == ENDLESS).any() and self._first():
            time.sleep(3600)
        flat = images.double().flatten(1)
        return torch.stack(
            [flat.sum(1), flat @ torch.arange(16.0).double(), labels * sigma, noise_seeds.double()],
            1,
        ).float()

    def _first(self) -> bool:
        if self.once is None:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return request(0, self.micro_batch)[:3] + (torch.arange(self.micro_batch),)


def request(number: int, count: int, label: int = 1) -> tuple[Tensor, Tensor, Tensor, int]:
    draws = torch.Generator().manual_seed(number)
    images = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=draws)
    return images, torch.full((count,), label), torch.rand(count, generator=draws), 10_000 * number


def expected(number: int, count: int, label: int = 1) -> Tensor:
    images, labels, sigma, seed = request(number, count, label)
    flat = images.double().flatten(1)
    seeds = (seed + torch.arange(count)).double()
    return torch.stack(
        [flat.sum(1), flat @ torch.arange(16.0).double(), labels * sigma, seeds], 1
    ).float()
