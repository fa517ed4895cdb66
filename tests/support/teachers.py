"""Teachers of a few lines for the pool, and what goes wrong with real ones.

Replicas of a test's cluster do not have the tests: `travel` lets these go there by value.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import Tensor

from dra_ray.errors import DataError
from dra_ray.teachers.source import Request
from tests.support import requests
from tests.support.requests import request

FATAL, ENDLESS = 667, 666  # labels of images that end, or stop, the process that encodes them


def travel() -> None:
    """Pickle what is defined here, and requests, by value from now on."""
    import ray

    for module in (requests, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)


def sums(request: Request) -> Tensor:
    """Features float32 [B,4] that depend on all of a request, each row on its own."""
    pixels = request.images.double().flatten(1)
    weighted = pixels @ torch.arange(pixels.shape[1]).double()
    columns = [pixels.sum(1), weighted, request.labels * request.sigma, request.noise_seeds]
    return torch.stack([column.double() for column in columns], 1).float()


def expected(number: int, count: int, label: int | None = None) -> Tensor:
    """Features of `request(number, count, label)`."""
    return sums(request(number, count, label))


class Sums:
    """A teacher whose features are `sums`; it takes `service_s` a micro-batch."""

    feature_dim = 4

    def __init__(self, service_s: float = 0.0, micro_batch: int = 16) -> None:
        self.service_s, self.micro_batch = service_s, micro_batch

    def check(self, request: Request) -> None:
        if request.images.shape[1:] != (1, 4, 4) or not request.sigma.isfinite().all():
            shape = list(request.images.shape)
            raise DataError(f"images {shape} or sigma are not what the teacher takes")

    def encode(self, request: Request) -> Tensor:
        assert 0 < len(request) <= self.micro_batch
        if self.service_s:
            time.sleep(self.service_s)
        return sums(request)

    def sample(self) -> Request:
        return request(0, self.micro_batch)


class Mortal(Sums):
    """Ends its process at a FATAL image, and stops at an ENDLESS one.

    Args:
        once: a file; it does so only while the file does not exist, and makes it.
    """

    def __init__(self, service_s: float = 0.0, once: str | None = None) -> None:
        super().__init__(service_s)
        self.once = once

    def encode(self, request: Request) -> Tensor:
        if (request.labels == FATAL).any() and self._first():
            os._exit(1)  # as the kernel ends a process that takes too much memory
        if (request.labels == ENDLESS).any() and self._first():
            time.sleep(3600)
        return super().encode(request)

    def _first(self) -> bool:
        if self.once is None:
            return True
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
