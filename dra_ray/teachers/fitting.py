"""Whether a teacher fits an experiment that aligns with it: its images, classes, layers and noise
levels, and the data that it has seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from dra_ray import config
from dra_ray.data import Shape
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint, targets
from dra_ray.teachers.network import Network


@dataclasses.dataclass(frozen=True)
class Known:
    """A teacher's shapes, and the data that it was trained on as its card has it."""

    net: Network
    trained_on: Mapping[str, Any]


def known(uri: str) -> Known:
    """Of the teacher at `uri`; `CheckpointError` where there is none."""
    card = checkpoint.read_card(Store(uri))
    with torch.device("meta"):
        net = checkpoint.build(card, uri)
    trained_on = card.get("data")
    return Known(net, trained_on if isinstance(trained_on, Mapping) else {})


def check(experiment: config.Experiment, teacher: Known, shape: Shape) -> None:
    """Raise `ConfigError` where the teacher does not fit the experiment, whose images have `shape`.

    It must take these images, know the noise levels and, unless it goes without them, the classes.
    One that was trained on another split of the same data may have seen our validation images;
    where the data has no official test images, also those.
    """
    net = teacher.net
    theirs, ours = ((of.channels, of.resolution, of.resolution) for of in (net, shape))
    if theirs != ours:
        raise ConfigError(
            f"teacher.uri='{experiment.teacher.uri}' takes images of {theirs}, but data.name="
            f"'{experiment.data.name}' has {ours} (channels, height, width); give a teacher of "
            "this data"
        )
    if experiment.teacher.label == "true":
        net.check_classes(shape.num_classes)
    for term, each in zip(experiment.align.targets, experiment.teachers, strict=True):
        _check_term(experiment.align, term, net, each.layer)
    _check_split(experiment, teacher.trained_on)


def _check_split(experiment: config.Experiment, theirs: Mapping[str, Any]) -> None:
    if theirs.get("name") != experiment.data.name:
        return
    for field in (
        ("split_seed", "test_images", "validation_images")
        if not experiment.data.known.official_test
        else ("split_seed", "validation_images")
    ):
        ours = getattr(experiment.data, field)
        if theirs.get(field) != ours:
            raise ConfigError(
                f"data.{field}={ours}, but the teacher '{experiment.teacher.uri}' was trained with "
                f"{theirs.get(field)}, so it may have seen your "
                f"held-out images; set data.{field}={theirs.get(field)} or train another teacher"
            )


def _check_term(align: config.Align, term: config.Term, net: Network, layer: str | None) -> None:
    """Raise `ConfigError` unless the teacher knows the term's layer and noise levels."""
    targets.transform(align, net.feature_dim(layer))
    if term.sigma is not None:
        net.check_sigma(torch.tensor([term.sigma]))
    elif net.sigma_range != (0.0, math.inf):
        field = "align.terms" if align.terms else f"align.extra_weight={align.extra_weight:g}"
        remedy = "give each a sigma" if align.terms else "set it to 0"
        raise ConfigError(
            f"{field} draws noise levels of any size, but the teacher knows only "
            f"{net.sigma_range[0]:.4g} to {net.sigma_range[1]:.4g}; {remedy} or use another teacher"
        )
