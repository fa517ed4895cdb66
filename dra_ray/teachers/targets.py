"""What alignment makes of a teacher's feature: its target.

A transform acts where the target is used, after the pool: features stay what their request says,
and runs that differ in it alone share them. Its statistics are measured once, before the first
step, and checkpoints hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dra_ray import config, data
from dra_ray.data import random
from dra_ray.errors import ConfigError
from dra_ray.teachers.diffusion import draw_sigma
from dra_ray.teachers.source import FeatureSource, Request

FLAT = 1e-10  # variance, relative to the largest, below which a direction says nothing
EPS = 1e-6
_REQUEST = 256  # images: equal parts, so that runs that measure the same share the answers


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of features: mean float64 [D], covariance float64 [D,D]."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, *parts: Tensor) -> Statistics:
        """Of features [N,D] or tokens [N,P,D], which may come in parts; each position counts."""
        sums, squares, count = torch.zeros(()), torch.zeros(()), 0
        for part in parts:
            rows = part.flatten(0, -2).double()
            sums, squares = sums + rows.sum(0), squares + rows.T @ rows
            count += len(rows)
        mean = sums / count
        return cls(mean, squares / count - mean[:, None] * mean)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(variances float64 [D], the largest first; their directions [D,D], a column each).

        A direction's largest entry is positive, so that equal statistics give equal ones.
        """
        variances, directions = torch.linalg.eigh(self.covariance)
        directions = directions.flip(1)
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return variances.flip(0).clamp_min(0), directions * largest.sign()


def request(images: data.Pictures, sigma: float | None, images_measured: int, seed: int) -> Request:
    """What statistics are measured on: random training images as they are, at most as many as there
    are. A pure function; `sigma` None draws noise levels as EDM trains.
    """
    order = torch.randperm(
        len(images), generator=random.generator(seed, random.Stream.TARGET_STATISTICS)
    )
    pixels, labels = images.take(order[:images_measured])
    noise_seed = random.derive(seed, random.Stream.TARGET_STATISTICS, 1) // 2
    levels = (
        draw_sigma(len(labels), random.generator(seed, random.Stream.TARGET_STATISTICS, 2))
        if sigma is None
        else torch.full((len(labels),), sigma)
    )
    return Request.seeded(pixels, labels, levels, noise_seed)


def measured(source: FeatureSource, request: Request, align: config.Align) -> Statistics:
    """Of the targets before their transform, from what `source` has for a request."""
    return Statistics.of(*(untransformed(part, align) for part in answers(source, request)))


def answers(source: FeatureSource, request: Request) -> Iterator[Tensor]:
    """Features of a long request, in parts that each have the pool's time."""
    return (source.submit(part).result().cpu() for part in request.split(_REQUEST))


# -- from features to targets ----------------------------------------------------------------------
def positions(features: Tensor) -> Tensor:
    """A map [B,D,h,w] as tokens [B,h*w,D]; pooled features [B,D] as they are."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def spatially_normalised(tokens: Tensor) -> Tensor:
    """Tokens [B,P,D] less each image's mean over positions, by its deviation (arXiv 2512.10794):
    what is left is where things are.
    """
    return (tokens - tokens.mean(1, keepdim=True)) / (
        tokens.std(1, correction=0, keepdim=True) + EPS
    )


def untransformed(features: Tensor, align: config.Align) -> Tensor:
    """What a transform is applied to: [B,D], or tokens [B,P,D]."""
    tokens = positions(features)
    return spatially_normalised(tokens) if align.spatial_norm else tokens


class Transform(nn.Module):
    """(x - mean) times a factor per feature or, whitening, times a matrix [D,k], for x [...,D].

    Raises `ConfigError` for a whitening to more dimensions than features have.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, align: config.Align, width: int) -> None:
        super().__init__()
        self.name, self.width = align.transform, align.target_width(width)
        if self.width > width:
            raise ConfigError(
                f"align.whiten_dim={self.width} is above the feature's width {width}; lower it"
            )
        shape = (width, self.width) if self.name == "whiten" else (width,)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("factor", torch.zeros(shape))

    def fit(self, statistics: Statistics) -> Transform:
        """Take over statistics of the features; raises `ConfigError` where fewer directions vary
        than whitening needs.
        """
        self.mean.copy_(statistics.mean)
        self.factor.copy_(self._factor(statistics))
        return self

    def _factor(self, statistics: Statistics) -> Tensor:
        if self.name == "centre":
            return torch.ones_like(statistics.mean)
        if self.name == "standardise":
            variance = statistics.covariance.diagonal()
            varies = variance > FLAT * variance.max()
            return torch.where(varies, variance.clamp_min(1e-300).rsqrt(), 0.0)
        variances, directions = statistics.spectrum()
        varying = int((variances > FLAT * variances[0]).sum())
        if varying < self.width:
            raise ConfigError(
                f"align.whiten_dim={self.width}, but the teacher's features vary along {varying} "
                "directions only; lower it"
            )
        return directions[:, : self.width] * variances[: self.width].rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        return centred @ self.factor if self.factor.ndim == 2 else centred * self.factor


def transform(align: config.Align, width: int) -> Transform | nn.Identity:
    """The transform that a config names, for features of `width`; without statistics yet."""
    return nn.Identity() if align.transform == "none" else Transform(align, width)
