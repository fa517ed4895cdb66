"""Requests for teacher features, and the teacher that answers them in its own process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dra_ray import memory
from dra_ray.config import Teacher
from dra_ray.data.canonical import CanonicalImages, of_class
from dra_ray.data.random import derive
from dra_ray.errors import DataError
from dra_ray.teachers.network import Network

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Request:
    """Clean images to encode, each with its label, noise level and noise seed.

    A row's feature depends on that row alone: requests may be cut, joined, repeated and answered
    anywhere. On the wire a request is four arrays (`__reduce__`), whichever device it came from.

    Attributes:
        images: uint8 [B,C,H,W].
        labels: int64 [B].
        sigma: float32 [B].
        noise_seeds: int64 [B]; see `noise_of`.
    """

    images: Tensor
    labels: Tensor
    sigma: Tensor
    noise_seeds: Tensor

    @classmethod
    def seeded(cls, images: Tensor, labels: Tensor, sigma: Tensor, noise_seed: int) -> Request:
        """The request in which position p has the noise seed `noise_seed + p`."""
        return cls(images, labels, sigma, noise_seed + torch.arange(len(images)))

    @classmethod
    def joined(cls, parts: Sequence[Request]) -> Request:
        """The rows of `parts`, of which there is at least one, in their order."""
        return cls(*map(torch.cat, zip(*(part.tensors for part in parts), strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.labels, self.sigma, self.noise_seeds

    @property
    def arrays(self) -> tuple[Array, ...]:
        """`tensors` as arrays in main memory."""
        return tuple(tensor.cpu().numpy() for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Request:
        return Request(*(tensor[rows] for tensor in self.tensors))

    def __reduce__(self) -> tuple[Callable[..., Request], tuple[Array, ...]]:
        return _from_arrays, self.arrays

    def split(self, size: int) -> list[Request]:
        """Requests of at most `size` rows; an empty request gives one, which is empty."""
        return [self[at : at + size] for at in range(0, max(len(self), 1), size)]

    def digest(self) -> bytes:
        """SHA-256 of all that features depend on; consecutive seeds count as the first of them."""
        seeds = self.noise_seeds.tolist()
        consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds))) if seeds else False
        state = hashlib.sha256(str(seeds[0] if consecutive else seeds).encode())
        for array in self.arrays[:3]:
            state.update(f"{array.dtype}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).data)
        return state.digest()

    def check(self, net: Network, labelled: bool) -> None:
        """Raises `DataError` unless `net` can encode the images, and knows the labels where it is
        `labelled`; `ConfigError` for a noise level that it does not know.
        """
        images, labels = self.images, self.labels
        shape = (net.channels, net.resolution, net.resolution)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape:
            raise DataError(
                f"images are {images.dtype} {list(images.shape)}, but the teacher encodes "
                f"torch.uint8 [B, {', '.join(map(str, shape))}]; "
                "use a teacher that was trained on this data"
            )
        if len({len(tensor) for tensor in self.tensors}) > 1:
            raise DataError(
                f"{len(images)} images came with {len(labels)} labels, {len(self.sigma)} sigmas "
                f"and {len(self.noise_seeds)} noise seeds; send one of each per image"
            )
        net.check_sigma(self.sigma)
        known = net.num_classes if labelled else 0
        if known and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but the teacher "
                f"knows classes 0 to {known - 1}"
            )


def _from_arrays(*arrays: Array) -> Request:
    # what Ray hands over may lie in its object store and be read-only, which a tensor cannot be
    return Request(*(torch.from_numpy(np.require(array, requirements="W")) for array in arrays))


class Pending(Protocol):
    """A feature under way."""

    def result(self, timeout_s: float | None = None) -> Tensor:
        """Features float32 [B,D], or [B,D,h,w] of a teacher with `tokens`; raises `PoolError` if
        they do not come in time.
        """
        ...


class FeatureSource(Protocol):
    """Encodes clean images with a frozen teacher."""

    @property
    def feature_dim(self) -> int: ...

    def submit(self, request: Request) -> Pending: ...

    def close(self) -> None: ...


class Ready:
    """A feature that is already there."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def result(self, timeout_s: float | None = None) -> Tensor:
        return self._features


class CanonicalFeatures:
    """A `FeatureSource` of class-matched targets: for each image the canonical feature of one of
    its class, drawn by the image's noise seed. `DataError` for a class without samples.
    """

    def __init__(self, samples: CanonicalImages) -> None:
        self._samples = samples

    @property
    def feature_dim(self) -> int:
        return self._samples.features.shape[1]

    def submit(self, request: Request) -> Pending:
        at = of_class(self._samples.members, request.labels.cpu(), request.noise_seeds.cpu())
        return Ready(self._samples.features[at])

    def close(self) -> None:
        """Nothing to release."""


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
        memory.keep_freed()
        self.net = net.to(device).eval().requires_grad_(False)
        if config.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self._features = torch.compile(net.features) if config.compile else net.features
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

    @property
    def _wire(self) -> torch.dtype:
        return torch.float16 if self.config.wire == "float16" else torch.float32

    def sample(self) -> Request:
        """A micro-batch of random rows, to try what the kernels do."""
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
        sigma = torch.linspace(0.05, 0.5, count).clamp(low, high)
        return Request.seeded(images, labels, sigma, 0)

    def submit(self, request: Request) -> Pending:
        return Ready(self.encode(request).float())

    def close(self) -> None:
        """Nothing to release."""

    def check(self, request: Request) -> None:
        """Raises `DataError` or `ConfigError` for a request that cannot be encoded."""
        request.check(self.net, self.config.label == "true")

    @torch.no_grad()
    def encode(self, request: Request) -> Tensor:
        """Features [B,D] on the CPU, or maps [B,D,h,w] with `config.tokens`, of the type that
        `config.wire` names. Raises as `check` does, and `DataError` for features that float16
        cannot hold.
        """
        self.check(request)
        if not len(request):
            return torch.empty(0, self.feature_dim, dtype=self._wire)
        with _threads(self.threads):
            return torch.cat(list(map(self._encode_part, request.split(self.micro_batch))))

    def _encode_part(self, request: Request) -> Tensor:
        count, size = len(request), self.micro_batch
        noise = _padded(noise_of(request.noise_seeds.tolist(), self.net.noise_shape), size, 0.0).to(
            self.device
        )
        sigma = _padded(request.sigma.to(torch.float32), size, 1.0).to(self.device)
        noisy = (
            self.net.clean(_padded(request.images, size, 0)).to(self.device)
            + sigma.reshape(-1, 1, 1, 1) * noise
        )
        one_hot = None
        if self.net.num_classes and self.config.label == "true":
            one_hot = _padded(self.net.one_hot(request.labels), size, 0.0).to(self.device)
        if self.config.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(noisy.device.type, torch.bfloat16, self.config.precision == "bf16"):
            features = self._features(noisy, sigma, one_hot, self.layer, not self.config.tokens)
        features = features[:count].to("cpu", torch.float32)
        sent = features.to(self._wire)
        if self._wire is torch.float16 and bool((sent.isinf() & features.isfinite()).any()):
            raise DataError(
                f"the teacher's features reach {features.abs().max():.3g}, which float16 cannot "
                "hold; set teacher.wire=float32"
            )
        return sent


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
