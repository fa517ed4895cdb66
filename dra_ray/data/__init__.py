"""Labelled images in memory or on disk, the stateless batch plan, and batched augmentation."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
from collections.abc import Callable

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from dra_ray import config
from dra_ray.data import backgrounds
from dra_ray.data.batches import BatchPlan
from dra_ray.data.pictures import (
    OFFICIAL,
    OnDisk,
    Parts,
    Pictures,
    Shape,
    Split,
    in_memory,
    reduced,
)
from dra_ray.data.rows import RowSet
from dra_ray.data.windows import WHOLE_BYTES, Windows, suited
from dra_ray.errors import DataError

__all__ = [
    "OFFICIAL",
    "Images",
    "OnDisk",
    "Outline",
    "Pictures",
    "Shape",
    "Split",
    "batch_plan",
    "in_memory",
    "load",
    "normalisation",
    "outline",
    "picture_facts",
    "to_float",
    "windowed",
]


@dataclasses.dataclass(frozen=True)
class Outline:
    """A data set's shape and the number of images in each split, as far as they are known without
    reading it.
    """

    shape: Shape
    train: int
    validation: int
    test: int


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set split into training, validation (for selection and sweeps) and test images."""

    name: str
    shape: Shape
    train: Pictures
    validation: Pictures
    test: Pictures

    @property
    def num_classes(self) -> int:
        return self.shape.num_classes

    @property
    def channels(self) -> int:
        return self.shape.channels

    @property
    def resolution(self) -> int:
        return self.shape.resolution

    @property
    def sha256(self) -> str:
        """Of the pixels and labels where they are in memory; otherwise of what stands for them, see
        `Pictures.hashed`.
        """
        return _sha256(self.train, self.validation, self.test)

    def facts(self) -> dict[str, JsonValue]:
        """What a manifest records; a run goes on only where it finds the same."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "sha256_of": self.train.hashed,
            "parts": {
                name: _sha256(part)
                for name, part in (
                    ("train", self.train),
                    ("validation", self.validation),
                    ("test", self.test),
                )
            },
            "num_classes": self.num_classes,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
        }


def picture_facts(pictures: Pictures) -> dict[str, JsonValue]:
    """What a manifest records of a synthetic set."""
    return {"images": len(pictures), "sha256": _sha256(pictures), "sha256_of": pictures.hashed}


def _sha256(*parts: Pictures) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part.hash_into(digest)
    return digest.hexdigest()


def load(settings: config.Data) -> Images:
    """Read and split the data set that `settings` names; images of files are listed, and decoded
    only when they are used.

    Raises `DataError` when files are missing, damaged or do not fit the set, or when it is too
    small for the split.
    """
    # the table of data sets lies below this room, so it names its reader's module
    reader = importlib.import_module(f"dra_ray.data.{settings.known.reader}")
    parts = _painted(settings, _reduced(settings, reader.read(settings)))
    return SPLITS[settings.known.split](settings, parts)


def _painted(settings: config.Data, parts: Parts) -> Parts:
    """With `data.background` behind the objects."""
    kind = settings.background
    if kind == "none":
        return parts
    classes = parts.num_classes or OFFICIAL[settings.name][0].num_classes
    train, *test = (
        backgrounds.painted(in_memory(part), kind, classes, number)
        for number, part in enumerate(part for part in (parts.train, parts.test) if part)
    )
    return parts._replace(train=train, test=test[0] if test else None)


def _reduced(settings: config.Data, parts: Parts) -> Parts:
    """At `data.resolution`, where the reader has not resized by it."""
    resolution, given = settings.resolution, parts.train.picture_shape[1]
    if resolution is None or resolution == given:
        return parts
    _require_smaller(settings, given)
    test = parts.test and reduced(parts.test, resolution)
    return parts._replace(train=reduced(parts.train, resolution), test=test)


def _require_smaller(settings: config.Data, given: int) -> None:
    if settings.resolution and settings.resolution > given:
        raise DataError(
            f"data.resolution={settings.resolution}, but images of '{settings.name}' have {given} "
            "pixels a side and are only ever reduced; lower it or leave it out"
        )


def outline(settings: config.Data) -> Outline:
    """What is known of the data set without reading it; one that has no official size is read, or
    listed if it is a folder.
    """
    if settings.name not in OFFICIAL:
        images = load(settings)
        return Outline(images.shape, len(images.train), len(images.validation), len(images.test))
    shape, train, test = OFFICIAL[settings.name]
    if settings.resolution:
        if settings.known.split != "by_class":
            _require_smaller(settings, shape.resolution)
        shape = dataclasses.replace(shape, resolution=settings.resolution)
    train -= settings.validation_images
    return Outline(
        shape,
        min(train, settings.train_images or train),
        settings.validation_images,
        min(test, settings.test_images or test),
    )


def _official(settings: config.Data, parts: Parts) -> Images:
    """The first training images are the validation set (DM-AT); official test images stay apart.

    Mean and deviation are those of the official size, also where images are reduced.
    """
    train, test = parts.train, _test(parts)
    _require(settings, len(train))
    held_out, resolution = settings.validation_images, train.picture_shape[1]
    shape = dataclasses.replace(OFFICIAL[settings.name][0], resolution=resolution)
    used = slice(held_out, held_out + settings.train_images if settings.train_images else None)
    return Images(settings.name, shape, train[used], train[:held_out], test[: settings.test_images])


def _in_class_order(settings: config.Data, parts: Parts) -> Images:
    """ImageNet and folders lie in the order of their classes, so that their first images are of one
    class. So validation and training images are the first of a permutation that `data.split_seed`
    alone decides, and so are fewer than all test images.

    A folder's mean and deviation are those of ImageNet, the custom for natural images: its own are
    known only once all is decoded.
    """
    train, test = parts.train, _test(parts)
    _require(settings, len(train))
    held_out = settings.validation_images
    order, test_order = (
        torch.randperm(len(part), generator=torch.Generator().manual_seed(settings.split_seed))
        for part in (train, test)
    )
    used = order[held_out : held_out + settings.train_images if settings.train_images else None]
    tested = (
        test[test_order[: settings.test_images].sort().values] if settings.test_images else test
    )
    num_classes, resolution = parts.num_classes, train.picture_shape[1]
    assert num_classes
    shape = dataclasses.replace(
        OFFICIAL["imagenet"][0], num_classes=num_classes, resolution=resolution
    )
    return Images(settings.name, shape, train[used], train[order[:held_out]], tested)


def _require(settings: config.Data, count: int) -> None:
    if settings.validation_images >= count:
        raise DataError(
            f"data.validation_images={settings.validation_images}, but '{settings.name}' has "
            f"{count} training images; lower it"
        )


def _test(parts: Parts) -> Pictures:
    assert parts.test is not None, "the table of data sets says that there is a test part"
    return parts.test


def _split_at_random(settings: config.Data, parts: Parts) -> Images:
    """Without an official test set: test, validation and training images of one random order."""
    assert settings.test_images
    assert parts.num_classes
    whole = in_memory(parts.train)
    held_out = settings.validation_images + settings.test_images
    if held_out >= len(whole):
        raise DataError(
            f"data.validation_images + data.test_images = {held_out}, but '{settings.name}' has "
            f"{len(whole)} images; lower one of them"
        )
    whole = whole[
        torch.randperm(len(whole), generator=torch.Generator().manual_seed(settings.split_seed))
    ]
    test, train = settings.test_images, whole[held_out:]
    used = train[: settings.train_images]
    mean, std = normalisation(used.images)
    channels, resolution = whole.picture_shape[:2]
    shape = Shape(parts.num_classes, channels, resolution, mean, std)
    return Images(settings.name, shape, used, whole[test:held_out], whole[:test])


SPLITS: dict[str, Callable[[config.Data, Parts], Images]] = {
    "official": _official,
    "by_class": _in_class_order,
    "whole": _split_at_random,
}


def batch_plan(
    experiment: config.Experiment, train: int, synthetic: int, windows: Windows | None = None
) -> BatchPlan:
    """The batches of a run over `train` real and `synthetic` images, which `windows` draws where
    it is given.

    An epoch counts the training images before any were held out for validation, as DM-AT's does,
    unless the config limits them or, as with digits, no training set is given by others.
    """
    settings, optim = experiment.data, experiment.optim
    limited = settings.train_images or not settings.known.official_test
    held_out = 0 if limited else settings.validation_images
    return BatchPlan(
        experiment.shared_seed,
        train,
        synthetic,
        optim.batch,
        experiment.synthetic.fraction,
        train + held_out,
        windows,
    )


def windowed(experiment: config.Experiment, synthetic: Pictures | None) -> Windows | None:
    """How a run draws its synthetic images; None where all are drawn alike, with replacement.

    That follows from the config and the set alone, never from the machine: a run goes on elsewhere
    with the same batches.
    """
    settings = experiment.synthetic
    if synthetic is None:
        return None
    per_batch = int(experiment.optim.batch * settings.fraction)
    row_bytes = math.prod(synthetic.picture_shape)
    offsets = synthetic.offsets if isinstance(synthetic, RowSet) else None
    if settings.window_images:
        images = settings.window_images
    elif offsets is not None and len(synthetic) * row_bytes > WHOLE_BYTES:
        images = suited(row_bytes, per_batch, settings.replace)
    elif settings.replace:
        return None
    else:
        images = len(synthetic)
    shards = np.array([0, len(synthetic)]) if offsets is None else offsets
    return Windows(experiment.shared_seed, shards, images, settings.replace)


def images_per_epoch(experiment: config.Experiment) -> int:
    """Training images that a run sees in an epoch, from the data's outline alone."""
    plan = batch_plan(experiment, outline(experiment.data).train, 0)
    return plan.steps_per_epoch * experiment.optim.batch


def normalisation(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of uint8 images [N,C,H,W], in [0,1] units, to 4 digits as the
    field quotes them.
    """
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0,1], the student's range."""
    return images.float().div_(255)
