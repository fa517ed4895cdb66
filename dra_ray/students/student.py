"""What every student is: images in, logits and penultimate features out, normalisation inside."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dra_ray.errors import ConfigError


class Normalise(nn.Module):
    """(x - mean) / std per channel, for x [B,C,H,W]; constants of the model that are no part of its
    state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.constants = {
            "mean": tuple(mean),
            "std": tuple(std),
        }  # also known where the student has shapes only
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._used: tuple[Tensor, ...] = ()

    def in_rows(self, width: int) -> None:
        """From now on for images of that width in channels_last, on this device: constants of a row
        of pixels, which lie as the images do. Vector instructions then take a row, not its pixels
        one by one; the same bits.
        """
        self._used = tuple(
            constant.expand(-1, -1, -1, width).contiguous(memory_format=torch.channels_last)
            for constant in (self.mean, self.std)
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self._used or (self.mean, self.std)
        return (x - mean) / std


class Student(nn.Module, abc.ABC):
    """A classifier: x float [B,C,H,W] in [0,1] -> logits [B,K].

    A subclass sets `feature_dim`, `normalise` and `classifier`, the prefix of its last layer's
    keys; `unused` are prefixes of keys that its checkpoints may hold in vain.
    """

    feature_dim: int
    normalise: Normalise
    classifier: str
    unused: tuple[str, ...] = ()

    @abc.abstractmethod
    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> (logits [B,K], what the last linear layer sees [B,feature_dim])."""

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> (logits [B,K], the feature map [B,feature_dim,h,w] before its mean is taken).

        Raises `ConfigError` for a student that has none.
        """
        features = self.feature_map(x)
        return self.get_submodule(self.classifier.rstrip("."))(features.mean((2, 3))), features

    def feature_map(self, x: Tensor) -> Tensor:
        """What `with_features` takes the mean of, [B,feature_dim,h,w]."""
        raise ConfigError(
            f"teacher.tokens=true needs a feature map, and {type(self).__name__} has none; choose "
            "another model.name or set teacher.tokens=false"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.with_features(x)[0]


def spread_convolutions(net: nn.Module) -> None:
    """Weights of every convolution from N(0, 2 / (k*k*out)), as Wide ResNets start (He et al.,
    arXiv 1502.01852, fan-out).
    """
    for module in net.modules():
        # without data there is nothing to draw, and torch would import its compiler to do so: 1 s
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
