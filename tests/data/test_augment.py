"""Augmentation of a batch against loops over its images, by torch and by torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from dra_ray import config
from dra_ray.data import augment
from dra_ray.data.random import generator


def pictures(count: int, side: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator(0))


@pytest.mark.parametrize("fill", [0, 128])
def test_crops_and_flips_equal_a_loop_over_images(fill: int) -> None:
    settings = config.Data(crop_pad=2, flip=True, fill_255=fill)
    images = pictures(32)
    draws = augment.parameters(32, settings, generator(1))
    fast = augment.apply(images, settings, draws)
    for index in range(32):
        padded = F.pad(images[index], (2, 2, 2, 2), value=fill)
        row, column = draws.corners[index].tolist()
        slow = padded[:, row : row + 8, column : column + 8]
        assert torch.equal(fast[index], slow.flip(2) if draws.flips[index] else slow)


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("degrees", [15, 180])
def test_rotations_are_those_of_torchvision(side: int, degrees: float) -> None:
    settings = config.Data(crop_pad=0, rotate_degrees=degrees, fill_255=7)
    images = pictures(64, side)
    draws = augment.parameters(64, settings, generator(1))
    assert draws.degrees.abs().max() <= degrees < 1.2 * draws.degrees.abs().max()
    fast = augment.apply(images, settings, draws)
    for index in range(64):
        slow = reference.rotate(
            images[index], draws.degrees[index].item(), InterpolationMode.NEAREST, fill=[7]
        )
        assert torch.equal(fast[index], slow)


def test_dm_at_crops_flips_and_rotates_in_this_order() -> None:
    settings = config.Data(name="cifar100")
    images = pictures(16, 32)
    draws = augment.parameters(16, settings, generator(1))
    fast = augment.apply(images, settings, draws)
    for index in range(16):
        row, column = draws.corners[index].tolist()
        slow = reference.crop(reference.pad(images[index], [4]), row, column, 32, 32)
        slow = reference.hflip(slow) if draws.flips[index] else slow
        assert torch.equal(
            fast[index],
            reference.rotate(slow, draws.degrees[index].item(), InterpolationMode.NEAREST),
        )


def test_resized_crops_are_those_of_torchvision() -> None:
    settings = config.Data(crop_pad=0, crop_area=0.25)
    images = pictures(64, 32)
    draws = augment.parameters(64, settings, generator(1))
    fast = augment.apply(images, settings, draws)
    for index in range(64):
        height, width = (round(side * 32) for side in draws.boxes[index, :2].tolist())
        top, left = (
            math.floor(place * (33 - side))
            for place, side in zip(draws.boxes[index, 2:].tolist(), (height, width), strict=True)
        )
        slow = reference.resized_crop(
            images[index].float(),
            top,
            left,
            height,
            width,
            [32, 32],
            InterpolationMode.BILINEAR,
            antialias=False,
        )
        assert (
            fast[index].float() - slow
        ).abs().max() <= 0.5 + 1e-3  # half a step is the rounding to uint8


def test_boxes_keep_the_area_and_the_aspect_ratio() -> None:
    boxes = augment.parameters(5000, config.Data(crop_area=0.25), generator(1)).boxes
    height, width = boxes[:, 0], boxes[:, 1]
    assert height.max() <= 1
    assert width.max() <= 1
    assert 0.25 <= (height * width).min() < 0.26
    assert 0.74 < (width / height).min() < 0.76
    assert 1.32 < (width / height).max() < 1.34
    assert boxes[:, 2:].min() >= 0
    assert boxes[:, 2:].max() < 1
    whole = augment.parameters(100, config.Data(crop_area=1), generator(1))
    assert torch.equal(augment.apply(pictures(100), config.Data(crop_pad=0), whole), pictures(100))


@pytest.mark.parametrize(
    "settings",
    [
        config.Data(name="digits"),
        config.Data(name="cifar100"),
        config.Data(name="imagenet", crop_pad=1),
    ],
)
def test_a_slice_of_the_draws_is_the_slice_of_the_batch(settings: config.Data) -> None:
    images = pictures(16)
    draws = augment.parameters(16, settings, generator(1))
    whole = augment.apply(images, settings, draws)
    assert torch.equal(whole[4:9], augment.apply(images[4:9], settings, draws[4:9]))
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
