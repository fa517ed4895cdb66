"""A linear head on a frozen teacher, under attack (arXiv 2602.19931, figure 3b and appendix C).

The noise that the teacher sees is one stored draw for all images, so that the classifier is a
function and attacks see its gradient. With fresh noise in every pass it is randomised instead, and
only attacks that average over passes measure it: EOT (Athalye et al., arXiv 1707.07397).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dra_ray import config, data
from dra_ray.attacks.pgd import evaluate_pgd, frozen, noise_like
from dra_ray.attacks.randomised import eot_pgd
from dra_ray.data.random import Stream, generator
from dra_ray.errors import ConfigError
from dra_ray.inspection.probe import Head, fitted
from dra_ray.teachers.network import Network

EPS_255 = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # the paper's are not in the text (UNVERIFIED)
EOT = (1, 5, 20)
BATCH = 250


class FrozenProbe(nn.Module):
    """Images float [B,C,H,W] in [0,1] -> logits [B,K], by a head on a frozen network's pooled
    feature.

    `noise` float [C,H,W] is the same for every image; None draws fresh noise in every pass. Raises
    `ConfigError` for a network that sees latents, whose gradient is not that of the pixels.
    """

    noise: Tensor | None

    def __init__(
        self, net: Network, head: Head, sigma: float, layer: str | None, noise: Tensor | None
    ) -> None:
        super().__init__()
        require_pixels(net)
        self.net, self.sigma, self.layer = net.eval().requires_grad_(False), sigma, layer
        self.register_buffer("noise", noise)
        self.head = nn.Linear(head.weight.shape[1], len(head.weight)).requires_grad_(False)
        with torch.no_grad():  # the features' standardisation is part of the layer
            self.head.weight.copy_(head.weight / head.scale)
            self.head.bias.copy_(head.bias - (head.weight / head.scale) @ head.mean)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) if self.noise is None else self.noise
        logits: Tensor = self.head(_features(self.net, 2 * x - 1, noise, self.sigma, self.layer))
        return logits


def _features(
    net: Network, clean: Tensor, noise: Tensor, sigma: float, layer: str | None
) -> Tensor:
    levels = torch.full((len(clean),), sigma, device=clean.device)
    return net.features(clean + sigma * noise, levels, None, layer)


def require_pixels(net: Network) -> None:
    """`ConfigError` for a network that adds its noise to something else than pixels."""
    if net.noise_shape != (net.channels, net.resolution, net.resolution):
        raise ConfigError(
            f"a teacher of kind '{net.kind}' sees latents, of which an attack on pixels has no "
            "gradient here; give one that sees pixels, such as an EDM"
        )


@torch.no_grad()
def train(
    net: Network,
    images: data.Split,
    sigma: float,
    layer: str | None = None,
    *,
    fresh: bool = False,
    seed: int = 0,
) -> FrozenProbe:
    """The classifier whose head is fitted to `images`, as `probe` fits it; with `fresh` noise per
    image and pass, else with one stored draw.
    """
    require_pixels(net)
    draws = generator(seed, Stream.ANALYSIS, 1)
    stored = torch.randn(net.noise_shape, generator=draws)
    clean = net.clean(images.images)
    noise = torch.randn(clean.shape, generator=draws) if fresh else stored.expand_as(clean)
    pairs = zip(clean.split(BATCH), noise.split(BATCH), strict=True)
    features = torch.cat([_features(net, x, n, sigma, layer) for x, n in pairs])
    head = fitted(features, images.labels)
    return FrozenProbe(net, head, sigma, layer, None if fresh else stored)


def by_radius(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: config.Threat,
    radii_255: Sequence[float] = EPS_255,
    *,
    steps: int = 20,
    eot: int | None = None,
    seed: int = 0,
) -> list[float]:
    """Accuracy under PGD within each radius; images float [N,C,H,W], labels int64 [N].

    With `eot` gradients are averaged over so many passes and the score is that of fresh passes, as
    a randomised student needs.
    """
    noise = noise_like(images.shape, threat, generator(seed, Stream.ANALYSIS, 2))
    return [
        _accuracy(student, images, labels, _within(threat, radius), noise, steps=steps, eot=eot)
        for radius in radii_255
    ]


def _within(threat: config.Threat, eps_255: float) -> config.Threat:
    changes = {"eps_255": eps_255, "step_255": eps_255 / 4}
    return threat.model_copy(update=changes)  # a radius of 0 is no config


def _accuracy(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: config.Threat,
    noise: Tensor,
    *,
    steps: int,
    eot: int | None,
) -> float:
    right = []
    with frozen(student):
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            x, y, draw = images[rows], labels[rows], noise[rows]
            if eot:
                score = eot_pgd(student, x, y, threat, draw[None], steps, eot=eot).mean
            else:
                score = evaluate_pgd(student, x, y, threat, draw, steps).float()
            right.append(score)
    return float(torch.cat(right).mean())
