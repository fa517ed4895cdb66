"""EDM's augmentation of a denoiser's training images (Karras et al. 2022, arXiv 2206.00364,
appendix F.2), which the network is told of.

Mirrored, scaled, turned, stretched along an axis and shifted, in this order. A label of 9 numbers
says what was done; zeros, as when features are taken and images sampled, mean nothing. The order of
the label, and where a coin decides whether something is drawn at all, are those of the published
weights.

All of it is one map from output to source pixels, read from the image once. Where it takes pixels
to pixels (nothing, mirrored, quarter turns, whole shifts) they are moved as they are. Elsewhere the
image, reflected about its outermost pixels, is interpolated (bicubic) at twice the resolution of
the result, which a Lanczos filter then halves. Read once per pixel, an image that shrinks would
alias, and bilinear reading would blur: on waves of up to 0.35 periods per pixel, turned by 0.5,
this errs by 3 % of their deviation and bilinear reading by 22 %. A sharp edge may overshoot [-1,1]
a little; nothing is clipped.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

LABEL_DIM = 9
OCTAVES = 0.2  # deviation of log2 of scale and of stretch
SHIFT = 0.125  # deviation of a shift, as part of the image's side
LOBES = 3  # of the Lanczos filter, a pixel wide each
# where the first of the samples that make a pixel lies, in pixels from it; they are half a pixel
# apart
FIRST = 0.25 - LOBES


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is done to B images, float32 on the CPU, 0 for nothing; `draws[mine]` is what a worker
    needs for its slice.
    """

    mirrored: Tensor  # [B,2], 0 or 1: left to right, top to bottom
    scale: Tensor  # [B]: lengths grow by 2^(0.2 scale)
    turn: Tensor  # [B], radians counter-clockwise
    # [B]: lengths along the axis grow by 2^(0.2 stretch), those across it shrink by as much
    stretch: Tensor
    axis: Tensor  # [B], radians counter-clockwise from the horizontal
    shift: Tensor  # [B,2]: to the right and down, in eighths of the image's sides

    def __getitem__(self, index: slice | Tensor) -> Draws:
        return Draws(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    @property
    def label(self) -> Tensor:
        """float32 [B,9]: both mirrors, scale, cosine-1 and sine of the turn, stretch times cosine
        and sine of its axis, both shifts.
        """
        turn = self.turn.cos() - 1, self.turn.sin()
        stretch = self.stretch * self.axis.cos(), self.stretch * self.axis.sin()
        return torch.stack(
            [*self.mirrored.unbind(1), self.scale, *turn, *stretch, *self.shift.unbind(1)], 1
        )


def parameters(count: int, probability: float, generator: torch.Generator) -> Draws:
    """Draw for `count` images: each change with `probability`, but half of all images are mirrored
    left to right.
    """

    def kept(values: Tensor, chance: float = probability) -> Tensor:
        happens = torch.rand(count, generator=generator) < chance
        return values * happens.reshape(-1, *(1,) * (values.dim() - 1))

    def normal(*more: int) -> Tensor:
        return torch.randn(count, *more, generator=generator)

    def coin() -> Tensor:
        return torch.randint(2, (count,), generator=generator).float()

    def angle() -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * math.pi

    mirrored = torch.stack(
        [coin(), kept(coin())], 1
    )  # so half of the chosen images are mirrored top to bottom
    # half of the axes stay horizontal
    return Draws(
        mirrored, kept(normal()), kept(angle()), kept(normal()), kept(angle(), 0.5), kept(normal(2))
    )


def apply(images: Tensor, draws: Draws) -> Tensor:
    """Change `images` float32 [B,C,H,W] as drawn; an image's result depends on nothing else in its
    batch.
    """
    source = _source(draws, *images.shape[2:])
    whole = source.round()
    moves = ((source - whole).abs() < 1e-4).flatten(1).all(1) & (
        whole[:, :, :2].abs().sum(1) == 1
    ).all(1)
    changed = torch.empty_like(images)
    for rows, read in ((moves.nonzero()[:, 0], _moved), ((~moves).nonzero()[:, 0], _resampled)):
        here = rows.to(images.device)
        changed[here] = read(images[here], source[rows].to(images.device, torch.float32))
    return changed


def _source(draws: Draws, height: int, width: int) -> Tensor:
    """float64 [B,2,3]: (column, row, 1) of a result's pixel to (column, row) in the image, rows
    counted from the top.
    """
    parts = (getattr(draws, field.name).double() for field in dataclasses.fields(draws))
    mirrored, scale, turn, stretch, axis, shift = parts
    along = _rotation(axis)
    by = torch.stack([-stretch, stretch], 1).mul(OCTAVES).exp2()
    inverse = (
        _rotation(turn)
        @ along.mT
        @ (by[:, :, None] * along)
        * (-OCTAVES * scale).exp2()[:, None, None]
    )
    inverse = (1 - 2 * mirrored)[:, :, None] * inverse
    sides = torch.tensor([width, height], dtype=torch.float64)
    centre = (sides - 1) / 2
    start = centre - (inverse @ (centre + SHIFT * sides * shift)[:, :, None])[:, :, 0]
    return torch.cat([inverse, start[:, :, None]], 2)


def _rotation(angle: Tensor) -> Tensor:
    """[B,2,2] for (column, row)."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).unflatten(
        1, (2, 2)
    )


def _read_at(source: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """[B,2,h,w]: column and row in the image of the result's points. No matrix product, which a GPU
    may round to 10 bits.
    """
    by_column, by_row, start = source[:, :, :, None, None].unbind(2)
    return by_column * columns + by_row * rows[:, None] + start


def _moved(images: Tensor, source: Tensor) -> Tensor:
    channels, height, width = images.shape[1:]
    at = (
        _read_at(
            source,
            torch.arange(width, device=images.device),
            torch.arange(height, device=images.device),
        )
        .round()
        .long()
    )
    place = _reflected(at[:, 1], height) * width + _reflected(at[:, 0], width)
    return (
        images.flatten(2)
        .gather(2, place.flatten(1)[:, None].expand(-1, channels, -1))
        .view_as(images)
    )


def _reflected(at: Tensor, size: int) -> Tensor:
    """Any whole position as one of 0 to size-1."""
    last = size - 1
    return last - (last - at.remainder(max(2 * last, 1))).abs()


def _resampled(images: Tensor, source: Tensor) -> Tensor:
    height, width = images.shape[2:]
    columns, rows = (
        torch.arange(2 * side + 4 * LOBES - 2, device=images.device) / 2 + FIRST
        for side in (width, height)
    )
    last = torch.tensor([width - 1, height - 1], device=images.device)
    grid = (_read_at(source, columns, rows) * (2 / last)[:, None, None] - 1).permute(0, 2, 3, 1)
    fine = F.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=True
    )
    return _halved(_halved(fine, width).mT, height).mT


def _halved(fine: Tensor, width: int) -> Tensor:
    """[...,2*width+4*LOBES-2] to [...,width], by a sum in fixed order: no image's rounding depends
    on its batch.
    """
    at = torch.arange(4 * LOBES, dtype=torch.float64) / 2 + FIRST
    taps = torch.sinc(at) * torch.sinc(at / LOBES)
    total = torch.zeros_like(fine[..., :width])
    for start, tap in enumerate((taps / taps.sum()).tolist()):
        total.add_(fine[..., start : start + 2 * width : 2], alpha=tap)
    return total
