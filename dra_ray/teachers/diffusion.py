"""EDM's training loss, weight averaging and deterministic sampler (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dra_ray.teachers.edm import EDM

LN_SIGMA_MEAN, LN_SIGMA_STD = -1.2, 1.2  # table 1


def to_signed(images: Tensor) -> Tensor:
    """uint8 [B,C,H,W] to float32 in [-1,1], the range that teachers see."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1,1] to uint8, clipped: the inverse of `to_signed`."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Training noise levels float32 [count], ln sigma ~ N(-1.2, 1.2^2)."""
    return (torch.randn(count, generator=generator) * LN_SIGMA_STD + LN_SIGMA_MEAN).exp()


def edm_loss(net: nn.Module, clean: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None, sigma_data: float) -> Tensor:
    """Weighted denoising error per image [B], summed over pixels (section 5).

    `clean` float32 [B,C,H,W] in [-1,1], `sigma` [B], `noise` standard normal like `clean`, `labels` one-hot [B,K] or None.
    """
    level = sigma.reshape(-1, 1, 1, 1)
    weight = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
    return (weight * (net(clean + level * noise, sigma, labels) - clean) ** 2).sum(dim=(1, 2, 3))


def ema_decay(batch: int, images_seen: int, halflife_images: float, ramp: float = 0.05) -> float:
    """Decay of the weight average for one step of `batch` images; the half-life is at most `ramp` of what was seen."""
    return 0.5 ** (batch / max(min(halflife_images, images_seen * ramp), 1e-8))


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards `net`'s: a = decay*a + (1-decay)*n."""
    for mean, parameter in zip(average.parameters(), net.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Sampling grid float64 [steps+1], from sigma_max to sigma_min and then 0 (equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float64 [len(seeds), *shape]; row i comes from its own CPU generator with seed `seeds[i]`."""
    generator = torch.Generator()
    return torch.stack([torch.randn(shape, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds])


@torch.no_grad()
def heun(net: EDM, noise: Tensor, labels: Tensor | None, levels: Tensor) -> Tensor:
    """Deterministic 2nd-order sampler (algorithm 1 with S_churn 0): 2*steps-1 network calls.

    `noise` standard normal [B,C,H,W], `labels` one-hot [B,K] or None, `levels` from `noise_levels`. The state is float64, the
    network float32. Returns float64 [B,C,H,W], about [-1,1].
    """

    def slope(x: Tensor, level: Tensor) -> Tensor:
        sigma = level.to(torch.float32).expand(len(x))
        return (x - net(x.to(torch.float32), sigma, labels).to(torch.float64)) / level

    x = noise.to(torch.float64) * levels[0]
    for now, after in itertools.pairwise(levels):
        first = slope(x, now)
        ahead = x + (after - now) * first
        x = ahead if after == 0 else x + (after - now) * (first + slope(ahead, after)) / 2
    return x


def sample(net: EDM, seeds: Sequence[int], labels: Tensor | None, levels: Tensor) -> Tensor:
    """Images uint8 [B,C,H,W] for `seeds` and class indices `labels` int64 [B]; equal for equal batches.

    Raises `ConfigError` for levels that the network was not trained on; the last one is the 0 that it need not know.
    """
    net.check_sigma(levels[:-1])
    noise = seeded_noise(seeds, (net.channels, net.resolution, net.resolution))
    one_hot = None if labels is None else net.one_hot(labels)
    return to_uint8(heun(net, noise, one_hot, levels))
