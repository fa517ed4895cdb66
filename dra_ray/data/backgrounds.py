"""Backgrounds behind the objects of sets whose own is plain, such as digits and Fashion-MNIST: an
offline test of what a classifier heeds, after the Backgrounds Challenge (Xiao et al., arXiv
2006.09994). Train with `data.background=class`, where the background gives the class away, and
evaluate with `class`, `random` and `none`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dra_ray.data.pictures import Split
from dra_ray.data.random import Stream, derive, generator
from dra_ray.errors import DataError

PLAIN_SHARE = 0.1  # of all pixels that must be background at least
GRID = 4  # pixels a side that a texture is drawn at, before it is enlarged
DARK, BRIGHT = 16.0, 160.0


def textures(num_classes: int, shape: tuple[int, ...]) -> Tensor:
    """One texture per class, uint8 [K,C,H,W]: smooth noise, equal for all sets of that shape."""
    channels, height, width = shape
    coarse = torch.stack(
        [
            torch.rand(channels, GRID, GRID, generator=generator(0, Stream.BACKGROUND, label))
            for label in range(num_classes)
        ]
    )
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (DARK + (BRIGHT - DARK) * smooth).round().to(torch.uint8)


def painted(pictures: Split, kind: str, num_classes: int, part: int) -> Split:
    """The same images with a texture where all channels are 0: that of their class ("class"), or of
    a class drawn for each image by its place in its part ("random"), which `part` numbers.

    Raises `DataError` for images without a plain background.
    """
    images, labels = pictures.images, pictures.labels
    behind = (images == 0).all(1, keepdim=True)
    if float(behind.float().mean()) < PLAIN_SHARE:
        raise DataError(
            f"data.background={kind} paints where pixels are 0, and next to none are; set "
            "data.background=none, or give a set with a plain background, such as fashion-mnist"
        )
    chosen = labels
    if kind == "random":
        draws = torch.Generator().manual_seed(derive(0, Stream.BACKGROUND, num_classes + part))
        chosen = torch.randint(num_classes, (len(labels),), generator=draws)
    known = textures(num_classes, pictures.picture_shape)
    return Split(torch.where(behind, known[chosen], images), labels)
