"""Sampling from a denoiser with EDM's second-order method (Karras et al. 2022, arXiv 2206.00364,
algorithms 1 and 2). Every image is a function of its own seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dra_ray.data.random import derive
from dra_ray.teachers.network import Network
from dra_ray.teachers.pixels import to_uint8

LN_SIGMA_MEAN, LN_SIGMA_STD = -1.2, 1.2  # table 1


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Sampling grid float64 [steps+1], from sigma_max to sigma_min and then 0 (equation 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (
        sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    ) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float64 [len(seeds), *shape]; row i comes from its own CPU generator with
    seed `seeds[i]`.
    """
    generator = torch.Generator()
    return torch.stack(
        [
            torch.randn(shape, generator=generator.manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )


@dataclasses.dataclass(frozen=True)
class Churn:
    """Fresh noise between steps (algorithm 2): S_churn, S_min, S_max and S_noise."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    deviation: float = 1.0

    def raised(self, level: Tensor, steps: int) -> Tensor:
        """The noise level that a step of a sampler of `steps` steps starts from instead of
        `level`.
        """
        inside = self.low <= float(level) <= self.high
        return level * (1 + (min(self.amount / steps, math.sqrt(2) - 1) if inside else 0.0))


def step_noise(seeds: Sequence[int], step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float64 [len(seeds), *shape] for a sampler's step, a pure function of each
    image's own seed.
    """
    return seeded_noise([derive(seed, step + 1) for seed in seeds], shape)


def heun_calls(steps: int) -> int:
    """Network calls of `heun` per image: two a step, but one in the last."""
    return 2 * steps - 1


@torch.no_grad()
def heun(
    net: Network,
    noise: Tensor,
    labels: Tensor | None,
    levels: Tensor,
    churn: Churn | None = None,
    seeds: Sequence[int] = (),
) -> Tensor:
    """2nd-order sampler: `heun_calls` network calls. Deterministic (algorithm 1), or with `churn`
    (algorithm 2) by `seeds`, one per image.

    `noise` standard normal [B,C,H,W], `labels` one-hot [B,K] or None, `levels` from `noise_levels`.
    The state is float64, the network float32. Returns float64 [B,C,H,W], about [-1,1].
    """

    slope = slope_of(lambda x, sigma: net(x, sigma, labels))
    x = noise.to(torch.float64) * levels[0]
    for step, (now, after) in enumerate(itertools.pairwise(levels)):
        if churn and (raised := churn.raised(now, len(levels) - 1)) > now:
            fresh = step_noise(seeds, step, tuple(x.shape[1:])).to(x.device)
            x = x + (raised**2 - now**2).sqrt() * churn.deviation * fresh
            now = raised
        x = heun_step(slope, x, now, after)
    return x


Slope = Callable[[Tensor, Tensor], Tensor]


def slope_of(denoise: Callable[[Tensor, Tensor], Tensor]) -> Slope:
    """dx/dsigma of the probability flow (equation 1 with sigma(t) = t), of a state float64
    [B,C,H,W] at one noise level, where `denoise` takes float32 [B,C,H,W] and noise levels [B].
    """

    def slope(x: Tensor, level: Tensor) -> Tensor:
        sigma = level.to(x.device, torch.float32).expand(len(x))
        return (x - denoise(x.to(torch.float32), sigma).to(torch.float64)) / level

    return slope


def heun_step(slope: Slope, x: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """From one noise level to the next, up or down; Euler's step to 0, where there is no slope."""
    first = slope(x, now)
    ahead = x + (after - now) * first
    return ahead if after == 0 else x + (after - now) * (first + slope(ahead, after)) / 2


def sample(
    net: Network,
    seeds: Sequence[int],
    labels: Tensor | None,
    levels: Tensor,
    churn: Churn | None = None,
) -> Tensor:
    """Images uint8 [B,C,H,W] on the CPU for `seeds` and class indices `labels` int64 [B]; equal for
    equal batches.

    Raises `ConfigError` for levels that the network was not trained on; the last one is the 0 that
    it need not know.
    """
    net.check_sigma(levels[:-1])
    device = next(net.parameters()).device
    noise = seeded_noise(seeds, net.noise_shape).to(device)
    one_hot = None if labels is None else net.one_hot(labels).to(device)
    return to_uint8(heun(net, noise, one_hot, levels, churn, seeds)).cpu()
