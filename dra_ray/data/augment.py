"""Augmentation of whole uint8 batches, on whatever device they live."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray import config


def augment(images: Tensor, settings: config.Data, generator: torch.Generator) -> Tensor:
    """Random crop from zero padding, then a random flip: uint8 [B,C,H,W] -> uint8 [B,C,H,W].

    All random numbers come from the CPU `generator`, one crop and one flip per image, so that a worker which holds a
    slice of the batch can draw for the whole batch and use its part: see `parameters`.
    """
    return apply(images, settings, *parameters(len(images), settings, generator))


def parameters(count: int, settings: config.Data, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crop corners int64 [count,2] and flips bool [count]."""
    corners = torch.randint(2 * settings.crop_pad + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    return corners, flips


def apply(images: Tensor, settings: config.Data, corners: Tensor, flips: Tensor) -> Tensor:
    """Crop at `corners` of the padded images and flip where `flips`, without a loop over images."""
    channels, height, width = images.shape[1:]
    if settings.crop_pad:
        padded = F.pad(images, (settings.crop_pad,) * 4)
        corners = corners.to(images.device)
        rows = corners[:, 0, None] + torch.arange(height, device=images.device)
        columns = corners[:, 1, None] + torch.arange(width, device=images.device)
        padded = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
        images = padded.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))
    if settings.flip:
        images = torch.where(flips.to(images.device)[:, None, None, None], images.flip(3), images)
    return images
