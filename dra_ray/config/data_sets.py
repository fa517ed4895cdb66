"""The data sets that a config may name, as data: what is known of each before it is read.

A new one is a record here, and where no reader of `dra_ray/data/` reads its files, a module there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue


@dataclass(frozen=True, kw_only=True)
class Official:
    """What every copy of a data set has: `train` and `test` images of `num_classes` classes,
    `channels` and `resolution` pixels a side, and their mean and deviation in [0,1] units.
    """

    num_classes: int
    channels: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: int
    test: int


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set by its name in a config.

    Attributes:
        reader: module of `dra_ray.data` whose `read(settings)` gives its `Parts`.
        split: official: validation images are the first training images; by_class: images lie in
            the order of their classes, so random ones; whole: there is no test part, so test and
            validation images are random ones.
        usual: values of `config.Data` that it takes where a config says nothing.
        official: None where each copy is another one.
        class_names: in the order of the labels; () where they are not known.
    """

    reader: str
    split: Literal["official", "by_class", "whole"] = "official"
    usual: Mapping[str, JsonValue] = field(default_factory=dict)
    official: Official | None = None
    class_names: tuple[str, ...] = ()

    @property
    def official_test(self) -> bool:
        """Whether test images are given by others."""
        return self.split != "whole"


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"

# mean and std of CIFAR: as DM-AT has them
DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(
        reader="digits",
        split="whole",
        usual={"validation_images": 256, "test_images": 300, "crop_pad": 1},
    ),
    "fashion-mnist": DataSet(
        reader="idx",
        usual={"uri": "/usr/share/datasets/fashion-mnist", "crop_pad": 2, "flip": True},
        official=Official(
            num_classes=10,
            channels=1,
            resolution=28,
            mean=(0.2860,),
            std=(0.3530,),
            train=60_000,
            test=10_000,
        ),
        class_names=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
    ),
    "cifar10": DataSet(
        reader="cifar",
        usual={"crop_pad": 4, "flip": True},
        official=Official(
            num_classes=10,
            channels=3,
            resolution=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2471, 0.2435, 0.2616),
            train=50_000,
            test=10_000,
        ),
        class_names=tuple(_CIFAR10.split()),
    ),
    "cifar100": DataSet(
        reader="cifar",
        usual={"crop_pad": 4, "flip": True, "rotate_degrees": 15},
        official=Official(
            num_classes=100,
            channels=3,
            resolution=32,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            train=50_000,
            test=10_000,
        ),
    ),
    "imagenet": DataSet(
        reader="folders",
        split="by_class",
        usual={"resolution": 224, "flip": True, "crop_area": 0.25},
        official=Official(
            num_classes=1000,
            channels=3,
            resolution=224,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            train=1_281_167,
            test=50_000,
        ),
    ),
    "folder": DataSet(reader="folders", split="by_class"),
}

if TYPE_CHECKING:
    DataSetName = str
else:
    DataSetName = Literal[tuple(DATA_SETS)]
