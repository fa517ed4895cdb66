"""EDM's training loss and the pace of its weight average (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dra_ray.teachers.edm import VE_SIGMA_MAX, VE_SIGMA_MIN, VP_BETA_D, VP_BETA_MIN, VP_FIRST_T

LN_SIGMA_MEAN, LN_SIGMA_STD = -1.2, 1.2  # table 1


def draw_sigma(count: int, generator: torch.Generator, precondition: str = "edm") -> Tensor:
    """Training noise levels float32 [count]: ln sigma ~ N(-1.2, 1.2^2) for "edm"; for "vp" the time
    is uniform, for "ve" ln sigma (table 1).
    """
    if precondition == "edm":
        return (torch.randn(count, generator=generator) * LN_SIGMA_STD + LN_SIGMA_MEAN).exp()
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    if precondition == "vp":
        time = 1 + draws * (VP_FIRST_T - 1)
        return torch.expm1(VP_BETA_D * time**2 / 2 + VP_BETA_MIN * time).sqrt().to(torch.float32)
    return (VE_SIGMA_MIN * (VE_SIGMA_MAX / VE_SIGMA_MIN) ** draws).to(torch.float32)


def loss_weight(level: Tensor, sigma_data: float, precondition: str = "edm") -> Tensor:
    """lambda(sigma) of table 1."""
    if precondition == "edm":
        return (level**2 + sigma_data**2) / (level * sigma_data) ** 2
    return 1 / level**2


def edm_loss(
    net: nn.Module,
    clean: Tensor,
    sigma: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    *,
    sigma_data: float,
    precondition: str = "edm",
    augment: Tensor | None = None,
) -> Tensor:
    """Weighted denoising error per image [B], summed over pixels (section 5).

    `clean` float32 [B,C,H,W] in [-1,1], `sigma` [B], `noise` standard normal like `clean`, `labels`
    one-hot [B,K] or None; `augment` [B,9] tells the network what was done to `clean`
    (`augment.Draws.label`), None where it has no such input.
    """
    told = (labels,) if augment is None else (labels, augment)
    level = sigma.reshape(-1, 1, 1, 1)
    weight = loss_weight(level, sigma_data, precondition)
    return (weight * (net(clean + level * noise, sigma, *told) - clean) ** 2).sum(dim=(1, 2, 3))


def ema_decay(
    batch: int, images_seen: int, halflife_images: float, ramp: float | None = 0.05
) -> float:
    """Decay of the weight average for one step of `batch` images; the half-life is at most `ramp`
    of what was seen, if that is not None.
    """
    halflife = halflife_images if ramp is None else min(halflife_images, images_seen * ramp)
    return 0.5 ** (batch / max(halflife, 1e-8))
