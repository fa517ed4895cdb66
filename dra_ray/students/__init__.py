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
| diffusion/TEACHER | a teacher's encoder up to its feature layer, TEACHER being its URI | its own |
"""

from __future__ import annotations

import importlib

import torch

from dra_ray import config
from dra_ray.config import networks
from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.students.relu_wrn import ReluWideResNet
from dra_ray.students.student import Student
from dra_ray.students.weights import fitted, load_into, read_weights
from dra_ray.students.wrn import WideResNet

__all__ = ["Student", "build", "check", "initialise"]


def build(settings: config.Model, shape: Shape) -> Student:
    """The student that `settings.name` names, for images of `shape`; its initial weights come from
    torch's global generator.

    Raises `ConfigError`. Under `torch.device("meta")` it has shapes only.
    """
    name, mean, std = settings.name, *_normalisation(settings, shape)
    if size := networks.wide(name):
        kind = ReluWideResNet if name.startswith("relu-") else WideResNet
        return kind(*size, shape.num_classes, mean, std)
    if name in networks.PLAIN:
        module, kind_name = networks.PLAIN[name]
        plain = getattr(importlib.import_module(f"{__name__}.{module}"), kind_name)
        student: Student = plain(shape.num_classes, mean, std)
        return student
    if (uri := networks.teacher_of(name)) is not None:
        from dra_ray.students import diffusion

        return diffusion.of_teacher(uri, shape, settings.sigma, settings.layer)
    from dra_ray.students import backbone

    if tokens := networks.vit(name):
        return backbone.vit(*tokens, settings.pooling, shape, mean, std)
    return backbone.named(name.removeprefix(networks.TIMM), shape, mean, std)


def check(settings: config.Model, shape: Shape) -> Student:
    """Raise whatever `build` and `initialise` would raise, but build shapes only and load nothing;
    returns these shapes.
    """
    with torch.device("meta"):
        student = build(settings, shape)
    if problem := networks.too_large(sum(p.numel() for p in student.parameters())):
        raise ConfigError(f"model.name='{settings.name}': {problem}")
    if settings.weights is not None:
        weights = read_weights(Store(settings.weights))
        fitted(
            student,
            weights,
            settings.name,
            settings.weights,
            new_classifier=settings.name.startswith(networks.TIMM),
        )
    return student


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
    uri = networks.teacher_of(settings.name)
    if settings.weights is None and uri is not None:
        from dra_ray.students import diffusion

        assert isinstance(student, diffusion.DiffusionStudent)
        return diffusion.load_teacher(student, uri)
    if settings.weights is None:
        return "random initialisation"
    weights = read_weights(Store(settings.weights))
    return load_into(
        student,
        weights,
        settings.name,
        settings.weights,
        new_classifier=settings.name.startswith(networks.TIMM),
    )
