"""Requests to a teacher."""

from __future__ import annotations

import torch

from dra_ray.teachers.source import Request


def request(number: int, count: int, label: int | None = None, resolution: int = 4) -> Request:
    """`count` grey images, all of class `label` or of any of ten; another `number`, another
    request.
    """
    draws = torch.Generator().manual_seed(number)
    shape = (count, 1, resolution, resolution)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=draws)
    labels = torch.randint(10, (count,), generator=draws)
    if label is not None:
        labels = torch.full((count,), label)
    sigma = 0.05 + torch.rand(count, generator=draws)
    return Request.seeded(images, labels, sigma, 10_000 * number)
