"""Students: `student(x)` gives logits, `student.with_features(x)` gives (logits, penultimate
feature).

| name | network | features |
|---|---|---|
| wrn-DEPTH-WIDTH | DM-AT's Wide ResNet, SiLU | 64 WIDTH |
| relu-wrn-DEPTH-WIDTH | TRADES' Wide ResNet, ReLU | 64 WIDTH |
| rawrn-70-16 | RaWRN | 864 |
| vit-SIZE-PATCH | ViT for small images; sizes t, s and b | 192, 384, 768 |
| resnet-18 | CIFAR's ResNet-18 | 512 |
| timm/NAME | any timm model that ends in a linear layer | its own |
"""

from __future__ import annotations

import re

import torch

from dra_ray import config
from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.students.relu_wrn import ReluWideResNet
from dra_ray.students.resnet import ResNet18
from dra_ray.students.student import Student
from dra_ray.students.weights import fitted, load_into, read_weights
from dra_ray.students.wrn import RaWRN, WideResNet

__all__ = ["Student", "build", "check", "initialise"]

# the deepest residual network and the largest classifier of images that were ever published have
# 1001 layers and 7e9 parameters (arXiv 1603.05027; DINOv3, arXiv 2508.10104)
MOST_LAYERS, MOST_PARAMETERS = 1001, 10**10


def build(settings: config.Model, shape: Shape) -> Student:
    """The student that `settings.name` names, for images of `shape`; its initial weights come from
    torch's global generator.

    Raises `ConfigError`. Under `torch.device("meta")` it has shapes only.
    """
    name, mean, std = settings.name, *_normalisation(settings, shape)
    if match := re.fullmatch(r"(relu-)?wrn-(\d{1,9})-(\d{1,9})", name):
        depth, width = int(match[2]), int(match[3])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ConfigError(
                f"model.name='{name}': depth must be 6n+4, such as 10, 16, 28 or 34, and width at "
                "least 1"
            )
        if depth > MOST_LAYERS:
            raise ConfigError(
                f"model.name='{name}': depth {depth} is above {MOST_LAYERS}; choose less, such as "
                "wrn-28-10"
            )
        _bound(name, _wide_parameters((depth - 4) // 6, width, shape.num_classes))
        return (ReluWideResNet if match[1] else WideResNet)(
            depth, width, shape.num_classes, mean, std
        )
    if name == "rawrn-70-16":
        return RaWRN(shape.num_classes, mean, std)
    if name == "resnet-18":
        return ResNet18(shape.num_classes, mean, std)
    if match := re.fullmatch(r"vit-([tsb])-([1-9]\d{0,8})", name):
        from dra_ray.students import backbone

        return backbone.vit(match[1], int(match[2]), settings.pooling, shape, mean, std)
    if name.startswith("timm/"):
        from dra_ray.students import backbone

        return backbone.named(name.removeprefix("timm/"), shape, mean, std)
    known = (
        "wrn-DEPTH-WIDTH, such as wrn-28-10, relu-wrn-DEPTH-WIDTH, rawrn-70-16, vit-b-2, resnet-18 "
        "or timm/NAME"
    )
    raise ConfigError(f"model.name='{name}' is not known; write {known}")


def check(settings: config.Model, shape: Shape) -> Student:
    """Raise whatever `build` and `initialise` would raise, but build shapes only and load nothing;
    returns these shapes.
    """
    with torch.device("meta"):
        student = build(settings, shape)
    _bound(settings.name, sum(parameter.numel() for parameter in student.parameters()))
    if settings.weights is not None:
        weights = read_weights(Store(settings.weights))
        fitted(
            student,
            weights,
            settings.name,
            settings.weights,
            new_classifier=settings.name.startswith("timm/"),
        )
    return student


def _wide_parameters(blocks: int, width: int, num_classes: int) -> int:
    """Of a Wide ResNet, without its norms: two 3x3 convolutions a block."""
    convolutions, before = 0, 16
    for channels in (16 * width, 32 * width, 64 * width):
        convolutions += 9 * channels * (before + (2 * blocks - 1) * channels)
        before = channels
    return convolutions + before * num_classes


def _bound(name: str, parameters: int) -> None:
    if parameters > MOST_PARAMETERS:
        raise ConfigError(
            f"model.name='{name}' has {parameters:.2g} parameters, and at most "
            f"{MOST_PARAMETERS:.0e} are allowed; choose a smaller network"
        )


def _normalisation(
    settings: config.Model, shape: Shape
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not settings.normalise:
        return (0.0,) * shape.channels, (1.0,) * shape.channels
    mean, std = settings.mean or shape.mean, settings.std or shape.std
    for field, values in (("mean", mean), ("std", std)):
        if len(values) != shape.channels:
            raise ConfigError(
                f"model.{field} has {len(values)} values, but images have {shape.channels} "
                "channels; give one for each"
            )
    return mean, std


def initialise(student: Student, settings: config.Model) -> str:
    """Load `settings.weights`, where there are any, into a student just built; returns a sentence
    that says what it starts from.

    A timm backbone's classifier may be missing there or have other classes: it then starts anew,
    and the sentence says so. Raises `CheckpointError` naming whatever else differs.
    """
    if settings.weights is None:
        return "random initialisation"
    weights = read_weights(Store(settings.weights))
    return load_into(
        student,
        weights,
        settings.name,
        settings.weights,
        new_classifier=settings.name.startswith("timm/"),
    )
