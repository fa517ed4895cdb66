"""Spatial frequencies of adversarial perturbations and of input gradients (arXiv 2602.19931,
figures 3a and 10).

The paper's transform, normalisation and bands are not in the text we have (UNVERIFIED). Ours: every
image's map has unit length, so that all count alike; power is averaged over channels and images.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dra_ray.errors import DataError

LOW, MID = 4 / 16, 10 / 16  # upper ends of the bands, as shares of the highest frequency


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Mean power spectrum of maps of unit length.

    Attributes:
        power: float64 [H,W], zero frequency at [H//2,W//2]; its sum is H * W / channels.
        radial: mean power at each rounded radius 0 .. min(H,W)//2; corners are left out.
        low, mid, high: shares of the power at radii up to a quarter, up to ten sixteenths, and
            above, of the highest frequency along an axis; corners belong to high.
        images: that count; skipped: images whose map is zero.
    """

    power: Tensor
    radial: list[float]
    low: float
    mid: float
    high: float
    images: int
    skipped: int


def spectrum(maps: Tensor) -> Spectrum:
    """Of perturbations or gradients float [N,C,H,W]. Raises `DataError` for other shapes, values
    that are not finite, and where all maps are zero.
    """
    if maps.ndim != 4 or not maps.numel():
        raise DataError(f"maps are {list(maps.shape)}; give [N,C,H,W]")
    maps = maps.double()
    if not bool(maps.isfinite().all()):
        raise DataError("maps are not all finite; check the model and its images")
    lengths = maps.flatten(1).norm(dim=1)
    kept = maps[lengths > 0] / lengths[lengths > 0, None, None, None]
    if not len(kept):
        raise DataError("every map is zero: the attack changed nothing, or gradients vanish")
    power = torch.fft.fftshift(torch.fft.fft2(kept), dim=(2, 3)).abs().square().mean((0, 1))
    radius, highest = _radii(power.shape[0], power.shape[1])
    below_mid, low = (
        float(power[radius <= edge * highest].sum() / power.sum()) for edge in (MID, LOW)
    )
    rings = radius.round().long()
    radial = [float(power[rings == ring].mean()) for ring in range(highest + 1)]
    bands = {"low": low, "mid": below_mid - low, "high": 1 - below_mid}
    return Spectrum(power, radial, **bands, images=len(kept), skipped=len(maps) - len(kept))


def _radii(height: int, width: int) -> tuple[Tensor, int]:
    """Distance of each frequency from zero float64 [H,W], in cycles per image, and the highest
    along the shorter axis.
    """
    rows = torch.arange(height, dtype=torch.float64) - height // 2
    columns = torch.arange(width, dtype=torch.float64) - width // 2
    return (rows[:, None].square() + columns[None].square()).sqrt(), min(height, width) // 2


def log_ratio(first: Spectrum, second: Spectrum) -> Tensor:
    """log2 of the power of `second` over that of `first` at each frequency, float64 [H,W]: above 0
    where `second` has more. `DataError` for images of other sizes.
    """
    if first.power.shape != second.power.shape:
        raise DataError(
            f"spectra are {list(first.power.shape)} and {list(second.power.shape)}; compare models "
            "of one image size"
        )
    return (second.power.clamp_min(1e-300) / first.power.clamp_min(1e-300)).log2()
