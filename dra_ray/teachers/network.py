"""What every teacher is: a network over noisy inputs, from whose layers features are taken, and
that a card describes.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dra_ray.config import Synthesis
from dra_ray.errors import CheckpointError, ConfigError, nearest
from dra_ray.teachers.pixels import to_signed


class Network(nn.Module, abc.ABC):
    """A frozen encoder of noisy images.

    A subclass sets `resolution` in pixels a side and `channels` of the images, `num_classes` of the
    labels that it takes as input (0 for none), `sigma_range`, the noise levels it was trained on,
    and `default_layer`.
    """

    kind: ClassVar[str]  # in the architecture on a checkpoint's card
    resolution: int
    channels: int
    num_classes: int
    sigma_range: tuple[float, float]
    default_layer: str

    @abc.abstractmethod
    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        layer: str | None = None,
        pooled: bool = True,
    ) -> Tensor:
        """The feature at `layer` of a noisy `x` (`clean` plus noise of deviation `sigma` [B]):
        [B,D], or a map [B,D,h,w].
        """

    @abc.abstractmethod
    def layers(self) -> dict[str, int]:
        """Names of the layers whose output can be a feature, in the order of computation, with
        their widths.
        """

    @property
    @abc.abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What, with the weights, makes the function: plain data that `from_architecture`
        accepts.
        """

    @classmethod
    @abc.abstractmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> Self:
        """Build the network of `architecture`; KeyError, TypeError, ValueError or `ConfigError` if
        it is not one.
        """

    def clean(self, images: Tensor) -> Tensor:
        """What noise is added to: images uint8 [B,C,H,W] as float32 in [-1,1]."""
        return to_signed(images)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Shape [C,H,W] of what noise is added to."""
        return self.channels, self.resolution, self.resolution

    def check_layer(self, layer: str | None) -> str:
        """The layer's full name; `ConfigError` with the nearest name if there is no such layer."""
        name = layer or self.default_layer
        if name not in self.layers():
            raise ConfigError(
                f"teacher.layer='{name}' is not a layer of this network; "
                f"{nearest(name, self.layers())}"
            )
        return name

    def check_sigma(self, sigma: Tensor) -> None:
        """`ConfigError` unless every noise level, on the CPU, is one that the network was trained
        on; rounding is forgiven.
        """
        low, high = self.sigma_range
        for value in (float(sigma.min()), float(sigma.max())) if sigma.numel() else ():
            if not (0 < value < math.inf and low * (1 - 1e-6) <= value <= high * (1 + 1e-6)):
                raise ConfigError(
                    f"sigma={value:g} is outside of what the teacher knows, {low:.4g} to "
                    f"{high:.4g}; choose a noise level inside"
                )

    def check_classes(self, num_classes: int) -> None:
        """`ConfigError` unless labels of `num_classes` classes are what the network takes; one
        without labels takes any data.
        """
        if self.num_classes not in (0, num_classes):
            raise ConfigError(
                f"teacher.uri: the teacher knows {self.num_classes} classes, but the data has "
                f"{num_classes}; "
                "use a teacher of this data, or one without classes"
            )

    def feature_dim(self, layer: str | None = None) -> int:
        return self.layers()[self.check_layer(layer)]

    def one_hot(self, labels: Tensor) -> Tensor:
        """Class indices int64 [B] as float32 [B,K]."""
        return F.one_hot(labels, self.num_classes).to(torch.float32)


# -- what some networks can do besides -------------------------------------------------------------
@runtime_checkable
class ImageSampler(Protocol):
    """A network that makes images of a class. What of `config` it heeds is its own affair."""

    def check_sampling(self, config: Synthesis) -> None:
        """`ConfigError` unless `config` can be sampled."""

    def sampler_facts(self, config: Synthesis) -> dict[str, Any]:
        """Name and settings of the sampler, for a manifest."""

    def calls_per_image(self, config: Synthesis) -> int:
        """Network calls that one image takes; a call with guidance counts twice."""

    def decoding(self) -> Callable[[Tensor], Tensor] | None:
        """What turns the sampler's last state [B,*noise_shape] into pixels; None where it is the
        pixels.
        """

    def sample_images(
        self, config: Synthesis, seeds: Sequence[int], labels: Tensor | None
    ) -> Tensor:
        """Images uint8 [B,C,R,R] on the CPU for `seeds` and class indices `labels` int64 [B]; equal
        for equal batches.
        """

    def to_images(self, state: Tensor) -> Tensor:
        """Images uint8 [B,C,R,R] of what the sampler ends with [B,*noise_shape], on its device."""


@runtime_checkable
class Classifier(Protocol):
    """A network that classifies noisy images."""

    def classify(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits [B,K] of noisy images `x` float32 [B,C,H,W] whose noise has deviation
        `sigma` [B].
        """


@runtime_checkable
class TokenStream(Protocol):
    """A transformer, whose residual stream may have massive channels."""

    def stream(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, layer: str | None = None
    ) -> Tensor:
        """The residual stream [B,N,D] that enters `layer`."""


def image_sampler(net: Network, teacher: str) -> ImageSampler:
    """`net` as a sampler; `ConfigError` naming `teacher`, its URI, where it makes no images."""
    if not isinstance(net, ImageSampler):
        raise ConfigError(
            f"teacher='{teacher}' is of kind '{net.kind}', which makes no images; give the "
            "folder of an EDM or a LightningDiT"
        )
    return net


def check_fit(weights: Mapping[str, Tensor], net: nn.Module, complaint: str) -> None:
    """`CheckpointError` that begins with `complaint` and names keys, unless names and shapes are
    exactly those of `net`.
    """
    wanted = net.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - weights.keys()]
    problems += [f"unknown {name}" for name in weights.keys() - wanted.keys()]
    shared = wanted.keys() & weights.keys()
    misshapen = [name for name in shared if weights[name].shape != wanted[name].shape]
    problems += [
        f"{name} is {list(weights[name].shape)} instead of {list(wanted[name].shape)}"
        for name in misshapen
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + (
            f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        )
        raise CheckpointError(f"{complaint}: {shown}")
