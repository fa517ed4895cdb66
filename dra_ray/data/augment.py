"""Augmentation of whole uint8 batches, on whatever device they live, without a loop over images.

In DM-AT's order (arXiv 2302.04638): random crop from a padded image, flip, and for CIFAR-100 a
rotation. ImageNet's random resized crop (Szegedy et al. 2014) comes before them.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray import config

RATIOS = (3 / 4, 4 / 3)  # aspect ratios of a random resized crop
ATTEMPTS = 10  # at a box that fits into the image, as torchvision's RandomResizedCrop makes


@dataclasses.dataclass(frozen=True)
class Draws:
    """All that is random in the augmentation of B images, on the CPU; `draws[mine]` is what a
    worker needs for its slice.
    """

    corners: Tensor  # int64 [B,2]: row and column in the padded image where the crop begins
    flips: Tensor  # bool [B]
    degrees: Tensor  # float32 [B], counter-clockwise
    # float32 [B,4]: height and width of the resized crop as parts of the image's, then its place in
    # [0,1) of those possible
    boxes: Tensor

    def __getitem__(self, index: slice | Tensor) -> Draws:
        return Draws(self.corners[index], self.flips[index], self.degrees[index], self.boxes[index])


def parameters(count: int, settings: config.Data, generator: torch.Generator) -> Draws:
    """Draw for `count` images."""
    corners = torch.randint(2 * settings.crop_pad + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    degrees = (2 * torch.rand(count, generator=generator) - 1) * settings.rotate_degrees
    return Draws(corners, flips, degrees, _boxes(count, settings.crop_area, generator))


def _boxes(count: int, smallest: float, generator: torch.Generator) -> Tensor:
    """Area uniform in [smallest, 1], logarithm of the aspect ratio uniform; of ATTEMPTS boxes the
    first that fits, else all of the image.
    """
    area = smallest + (1 - smallest) * torch.rand((count, ATTEMPTS), generator=generator)
    low, high = (math.log(ratio) for ratio in RATIOS)
    ratio = torch.exp(low + (high - low) * torch.rand((count, ATTEMPTS), generator=generator))
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2)
    sides = torch.cat([sides, torch.ones(count, 1, 2)], 1)
    first = (sides <= 1).all(2).int().argmax(1)
    return torch.cat(
        [sides[torch.arange(count), first], torch.rand((count, 2), generator=generator)], 1
    )


def apply(images: Tensor, settings: config.Data, draws: Draws) -> Tensor:
    """Augment uint8 [B,C,H,W] as drawn."""
    if settings.crop_area < 1:
        images = _resized_crop(images, draws.boxes)
    if settings.crop_pad:
        images = _padded_crop(images, settings.crop_pad, settings.fill_255, draws.corners)
    if settings.flip:
        images = torch.where(
            draws.flips.to(images.device)[:, None, None, None], images.flip(3), images
        )
    if settings.rotate_degrees:
        images = _rotated(images, settings.fill_255, draws.degrees)
    return images


def _padded_crop(images: Tensor, pad: int, fill: int, corners: Tensor) -> Tensor:
    channels, height, width = images.shape[1:]
    padded = F.pad(images, (pad,) * 4, value=fill)
    corners = corners.to(images.device)
    rows = corners[:, 0, None] + torch.arange(height, device=images.device)
    columns = corners[:, 1, None] + torch.arange(width, device=images.device)
    padded = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return padded.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def _resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Each box, in whole pixels, resized to the image's size (bilinear; never smaller, so there is
    nothing to anti-alias).
    """
    channels, height, width = images.shape[1:]
    rows, row_part = _between(height, boxes[:, 0], boxes[:, 2])
    columns, column_part = _between(width, boxes[:, 1], boxes[:, 3])
    rows, columns = rows.to(images.device), columns.to(images.device)
    row_part, column_part = row_part.to(images.device), column_part.to(images.device)
    above, below = (
        images.gather(2, r[:, None, :, None].expand(-1, channels, -1, width)).float()
        for r in rows.unbind(2)
    )
    mixed = torch.lerp(above, below, row_part[:, None, :, None])
    left, right = (
        mixed.gather(3, c[:, None, None, :].expand(-1, channels, height, -1))
        for c in columns.unbind(2)
    )
    return torch.lerp(left, right, column_part[:, None, None, :]).round().to(torch.uint8)


def _between(size: int, part: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Along one side of length `size`: the two pixels [B,size,2] that each new pixel lies between,
    and how far [B,size]; pixels end at the box.
    """
    side = (part * size).round().clamp(1, size)
    start = (place * (size - side + 1)).floor()
    at = (
        ((torch.arange(size) + 0.5) * (side / size)[:, None] - 0.5)
        .clamp(min=0)
        .minimum(side[:, None] - 1)
    )
    low = at.floor()
    high = (low + 1).minimum(side[:, None] - 1)
    return (torch.stack([low, high], 2) + start[:, None, None]).long(), at - low


def _rotated(images: Tensor, fill: int, degrees: Tensor) -> Tensor:
    """About the centre, nearest pixel, as torchvision rotates; `fill` where the image has no
    pixel.
    """
    channels, height, width = images.shape[1:]
    cosine, sine = (
        f(torch.deg2rad(degrees.double())).float().to(images.device)[:, None, None]
        for f in (torch.cos, torch.sin)
    )
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device)[None] - (width - 1) / 2
    column = (cosine * x - sine * y + (width - 1) / 2).round().long()
    row = (sine * x + cosine * y + (height - 1) / 2).round().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = (row * width + column).where(inside, 0).flatten(1)[:, None].expand(-1, channels, -1)
    rotated = images.flatten(2).gather(2, source).view_as(images)
    return torch.where(inside[:, None], rotated, fill)
