"""Image sets as uint8 tensors in memory, the stateless batch plan, and batched augmentation."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from dra_ray import config
from dra_ray.errors import DataError


@dataclasses.dataclass(frozen=True)
class Split:
    """images uint8 [N,C,H,W], labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set split into training, validation (for selection and sweeps) and test images."""

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def resolution(self) -> int:
        return self.train.images.shape[2]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(split.images.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()

    def facts(self) -> dict[str, object]:
        """What a manifest records."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "num_classes": self.num_classes,
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
        }


def load(settings: config.Data) -> Images:
    """Read and split the data set that `settings` names. Raises `DataError` when it is too small for the split."""
    from dra_ray.data import digits

    images, labels = digits.read()  # the one set embedded today; others join here
    held_out = settings.validation_images + settings.test_images
    if held_out >= len(labels):
        raise DataError(f"data.validation_images + data.test_images = {held_out}, but '{settings.name}' has {len(labels)} images; lower one of them")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(settings.split_seed))
    whole = Split(images[order], labels[order])
    test = settings.test_images
    return Images(
        name=settings.name,
        num_classes=int(labels.max()) + 1,
        test=whole[:test],
        validation=whole[test:held_out],
        train=whole[held_out:],
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0,1], the student's range."""
    return images.float().div_(255)
