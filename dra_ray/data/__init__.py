"""Labelled images in memory or on disk, the stateless batch plan, and batched augmentation."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from pydantic import JsonValue
from torch import Tensor

from dra_ray import config
from dra_ray.data import cifar, digits, folders, idx
from dra_ray.data.batches import BatchPlan
from dra_ray.data.pictures import OnDisk, Pictures, Shape, Split, in_memory
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


# official sets: shape, and the sizes of their training and test parts (mean and std of CIFAR: as
# DM-AT has them)
OFFICIAL: dict[str, tuple[Shape, int, int]] = {
    "fashion-mnist": (Shape(10, 1, 28, (0.2860,), (0.3530,)), 60_000, 10_000),
    "cifar10": (
        Shape(10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        50_000,
        10_000,
    ),
    "cifar100": (
        Shape(100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        50_000,
        10_000,
    ),
    "imagenet": (
        Shape(1000, 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        1_281_167,
        50_000,
    ),
}


def load(settings: config.Data) -> Images:
    """Read and split the data set that `settings` names; images of files are listed, and decoded
    only when they are used.

    Raises `DataError` when files are missing, damaged or do not fit the set, or when it is too
    small for the split.
    """
    if settings.name == "digits":
        return _split_at_random(settings, Split(*digits.read()))
    if settings.name == "fashion-mnist":
        return _official(settings, *idx.read(settings.uri))
    if settings.name in cifar.ARCHIVES:
        return _official(
            settings, *cifar.read(settings.name, settings.uri, OFFICIAL[settings.name][0])
        )
    return _in_class_order(settings, folders.read(settings))


def outline(settings: config.Data) -> Outline:
    """What is known of the data set without reading it; one that has no official size is read, or
    listed if it is a folder.
    """
    if settings.name not in OFFICIAL:
        images = load(settings)
        return Outline(images.shape, len(images.train), len(images.validation), len(images.test))
    shape, train, test = OFFICIAL[settings.name]
    if settings.resolution and settings.name == "imagenet":
        shape = dataclasses.replace(shape, resolution=settings.resolution)
    train -= settings.validation_images
    return Outline(
        shape,
        min(train, settings.train_images or train),
        settings.validation_images,
        min(test, settings.test_images or test),
    )


def _official(settings: config.Data, train: Split, test: Split) -> Images:
    """The first training images are the validation set (DM-AT); official test images stay apart."""
    _require(settings, len(train))
    held_out, shape = settings.validation_images, OFFICIAL[settings.name][0]
    used = slice(held_out, held_out + settings.train_images if settings.train_images else None)
    return Images(settings.name, shape, train[used], train[:held_out], test[: settings.test_images])


def _in_class_order(settings: config.Data, listing: folders.Listing) -> Images:
    """ImageNet and folders lie in the order of their classes, so that their first images are of one
    class. So validation and training images are the first of a permutation that `data.split_seed`
    alone decides, and so are fewer than all test images.

    A folder's mean and deviation are those of ImageNet, the custom for natural images: its own are
    known only once all is decoded.
    """
    train, test, num_classes = listing
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
    shape = dataclasses.replace(
        OFFICIAL["imagenet"][0], num_classes=num_classes, resolution=train.picture_shape[1]
    )
    return Images(settings.name, shape, train[used], train[order[:held_out]], tested)


def _require(settings: config.Data, count: int) -> None:
    if settings.validation_images >= count:
        raise DataError(
            f"data.validation_images={settings.validation_images}, but '{settings.name}' has "
            f"{count} training images; lower it"
        )


def _split_at_random(settings: config.Data, whole: Split) -> Images:
    """Without an official test set: test, validation and training images of one random order."""
    assert settings.test_images
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
    shape = Shape(digits.NUM_CLASSES, whole.images.shape[1], whole.images.shape[2], mean, std)
    return Images(settings.name, shape, used, whole[test:held_out], whole[:test])


def batch_plan(experiment: config.Experiment, train: int, synthetic: int) -> BatchPlan:
    """The batches of a run over `train` real and `synthetic` images.

    An epoch counts the training images before any were held out for validation, as DM-AT's does,
    unless the config limits them or, as with digits, no training set is given by others.
    """
    settings, optim = experiment.data, experiment.optim
    held_out = (
        0 if settings.name == "digits" or settings.train_images else settings.validation_images
    )
    return BatchPlan(
        experiment.shared_seed,
        train,
        synthetic,
        optim.batch,
        experiment.synthetic.fraction,
        train + held_out,
    )


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
