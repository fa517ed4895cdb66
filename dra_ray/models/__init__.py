"""Students: `student(x)` gives logits, `student.with_features(x)` gives (logits, penultimate feature)."""

from __future__ import annotations

import re
from typing import Protocol

import torch
from torch import Tensor

from dra_ray import config
from dra_ray.data import Images
from dra_ray.errors import ConfigError
from dra_ray.models.wrn import WideResNet


class Student(Protocol):
    """x float [B,C,H,W] in [0,1]; logits [B,K]; features [B,feature_dim]. Normalisation happens inside."""

    feature_dim: int

    def __call__(self, x: Tensor) -> Tensor: ...

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


def build(settings: config.Model, data: Images) -> WideResNet:
    """The student that `settings.name` names, for images of `data`; weights come from torch's global generator."""
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", settings.name)
    if not match:
        raise ConfigError(f"model.name='{settings.name}' is not known; write wrn-DEPTH-WIDTH, such as wrn-28-10")
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ConfigError(f"model.name='{settings.name}': depth must be 6n+4, such as 10, 16, 28 or 34, and width at least 1")
    mean, std = (normalisation(data.train.images)) if settings.normalise else ([0.0] * data.channels, [1.0] * data.channels)
    student = WideResNet(depth, width, data.num_classes, mean, std)
    return student.to(memory_format=torch.channels_last) if settings.channels_last else student  # type: ignore[call-overload]


def normalisation(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of uint8 images [N,C,H,W], in [0,1] units, to 4 digits as the field quotes them."""
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return [round(float(m), 4) for m in mean], [round(float(s), 4) for s in std]
