"""What a training step asks a teacher for, and the teacher that answers in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from dra_ray.config import Teacher
from dra_ray.data.random import derive
from dra_ray.errors import DataError
from dra_ray.teachers.network import Network


class Pending(Protocol):
    """A feature under way."""

    def result(self, timeout_s: float | None = None) -> Tensor:
        """Features float32 [B,D]; raises `PoolError` if they do not come in time."""
        ...


class FeatureSource(Protocol):
    """Encodes clean images with a frozen teacher."""

    @property
    def feature_dim(self) -> int: ...

    def submit(self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seed: int) -> Pending:
        """`images` uint8 [B,C,H,W]; `labels` int64 [B]; `sigma` float32 [B]; position p's noise has
        seed `noise_seed + p`.
        """
        ...

    def close(self) -> None: ...


class Ready:
    """A feature that is already there."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def result(self, timeout_s: float | None = None) -> Tensor:
        return self._features


class LocalTeacher:
    """A `FeatureSource` in this process, and the pure function that every replica of the pool
    calls.

    It runs the network at one batch size only, `config.micro_batch`, because kernels round
    differently at different shapes; so a feature depends on nothing but its own request. Raises
    `ConfigError` for an unknown `config.layer`.
    """

    def __init__(
        self, net: Network, config: Teacher, threads: int = 1, device: str = "cpu"
    ) -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.config = config
        self.threads = threads
        self.device = device
        self.layer = net.check_layer(config.layer)

    @property
    def feature_dim(self) -> int:
        return self.net.feature_dim(self.layer)

    @property
    def micro_batch(self) -> int:
        return self.config.micro_batch

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A micro-batch of made-up arguments of `encode_each`."""
        count, net = self.micro_batch, self.net
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(
            256,
            (count, net.channels, net.resolution, net.resolution),
            dtype=torch.uint8,
            generator=draws,
        )
        labels = torch.randint(max(net.num_classes, 1), (count,), generator=draws)
        low, high = net.sigma_range
        return (
            images,
            labels,
            torch.linspace(0.05, 0.5, count).clamp(low, high),
            torch.arange(count),
        )

    def submit(self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seed: int) -> Pending:
        return Ready(self.encode(images, labels, sigma, noise_seed))

    def close(self) -> None:
        """Nothing to release."""

    def encode(self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seed: int) -> Tensor:
        """Features float32 [B,D] on the CPU; position p's noise has seed `noise_seed + p`. See
        `FeatureSource.submit`.
        """
        return self.encode_each(images, labels, sigma, noise_seed + torch.arange(len(images)))

    @torch.no_grad()
    def encode_each(
        self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seeds: Tensor
    ) -> Tensor:
        """`encode` with a noise seed per image, int64 [B]: what lets equal-shaped requests be
        merged.
        """
        self.check(images, labels, sigma)
        parts = zip(
            *(
                tensor.split(self.config.micro_batch)
                for tensor in (images, labels, sigma, noise_seeds)
            ),
            strict=True,
        )
        with _threads(self.threads):
            features = [self._encode_part(*part) for part in parts]
        return torch.cat(features) if features else torch.empty(0, self.feature_dim)

    def _encode_part(
        self, images: Tensor, labels: Tensor, sigma: Tensor, noise_seeds: Tensor
    ) -> Tensor:
        count, size = len(images), self.config.micro_batch
        noise = _padded(noise_of(noise_seeds.tolist(), self.net.noise_shape), size, 0.0).to(
            self.device
        )
        sigma = _padded(sigma.to(torch.float32), size, 1.0).to(self.device)
        noisy = (
            self.net.clean(_padded(images, size, 0)).to(self.device)
            + sigma.reshape(-1, 1, 1, 1) * noise
        )
        one_hot = None
        if self.net.num_classes and self.config.label == "true":
            one_hot = _padded(self.net.one_hot(labels), size, 0.0).to(self.device)
        return self.net.features(noisy, sigma, one_hot, self.layer)[:count].to("cpu", torch.float32)

    def check(self, images: Tensor, labels: Tensor, sigma: Tensor) -> None:
        """`DataError` unless a request can be encoded."""
        wanted = (self.net.channels, self.net.resolution, self.net.resolution)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
            raise DataError(
                f"images are {images.dtype} {list(images.shape)}, but the teacher encodes "
                f"torch.uint8 [B, {', '.join(map(str, wanted))}]; "
                "use a teacher that was trained on this data"
            )
        if not len(images) == len(labels) == len(sigma):
            raise DataError(
                f"{len(images)} images came with {len(labels)} labels and {len(sigma)} sigmas; "
                "send one of each per image"
            )
        self.net.check_sigma(sigma)
        known = self.net.num_classes if self.config.label == "true" else 0
        if known and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but the teacher "
                f"knows classes 0 to {known - 1}"
            )


def noise_of(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [len(seeds), *shape]; each row depends on its own seed only."""
    generator = torch.Generator()
    return torch.stack(
        [torch.randn(shape, generator=generator.manual_seed(derive(seed, 0))) for seed in seeds]
    )


def _padded(tensor: Tensor, size: int, value: float) -> Tensor:
    """`tensor` with rows of `value` added up to `size` rows."""
    missing = size - len(tensor)
    return (
        torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])
        if missing
        else tensor
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
