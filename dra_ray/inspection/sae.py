"""TopK sparse autoencoders on a classifier's features (arXiv 2602.19931, figure 6).

After Gao et al. (arXiv 2406.04093): z = relu(TopK(W_e (x - b_pre) + b_e)), x' = W_d z + b_pre, unit
columns of W_d, an auxiliary loss by which latents that died learn what is left over. Widths, layer,
list of k and length of training are not in the text of the paper that we have (UNVERIFIED).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dra_ray.data.random import Stream, generator
from dra_ray.errors import DataError

AUXILIARY = 1 / 32  # weight of the auxiliary loss
MEDIAN_ROWS, MEDIAN_STEPS = 32_768, 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an autoencoder is trained.

    Attributes:
        k: latents that an image may use; width: latents; steps, batch, lr: of Adam.
        dead_images: images without use after which a latent counts as dead; revived: dead latents
            that learn from what is left over at a time.
    """

    k: int = 32
    width: int = 512
    steps: int = 2000
    batch: int = 512
    lr: float = 1e-3
    dead_images: int = 100_000
    revived: int = 256


@dataclasses.dataclass(frozen=True)
class Quality:
    """On features that training has not seen.

    Attributes:
        error: mean squared error, as a share of that of the mean feature: 0 is exact, 1 says
            nothing.
        relative_error: mean over images of |x' - x|^2 / |x|^2.
        dead: share of latents that no image uses; used: mean latents of an image above 0.
    """

    error: float
    relative_error: float
    dead: float
    used: float


class TopKAutoencoder(nn.Module):
    """Features [B,D] -> reconstruction [B,D]; `centre` [D] is where it starts."""

    def __init__(self, centre: Tensor, k: int, width: int, draws: torch.Generator) -> None:
        super().__init__()
        columns = F.normalize(torch.randn(width, len(centre), generator=draws), dim=1)
        self.k = k
        self.centre = nn.Parameter(centre.clone())
        self.decoder = nn.Parameter(columns)  # [width,D]: a latent's direction each
        self.encoder = nn.Parameter(columns.clone())
        self.bias = nn.Parameter(torch.zeros(width))

    def before(self, x: Tensor) -> Tensor:
        """Latents [B,width] before the largest are chosen."""
        return (x - self.centre) @ self.encoder.T + self.bias

    def decode(self, chosen: Tensor) -> Tensor:
        """From latents [B,width] of which the rest are 0."""
        return chosen @ self.decoder + self.centre

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(largest(self.before(x), self.k))

    @torch.no_grad()
    def project(self) -> None:
        """Before a step: the decoder's gradient leaves its columns' length alone."""
        if self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    @torch.no_grad()
    def normalise(self) -> None:
        """After a step: columns of length 1."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))


def largest(latents: Tensor, k: int) -> Tensor:
    """The k largest of each row [B,width], as far as they are above 0; 0 in all other places."""
    values, places = latents.topk(k, dim=1)
    return torch.zeros_like(latents).scatter(1, places, values.relu())


def train(features: Tensor, settings: Settings, seed: int = 0) -> TopKAutoencoder:
    """An autoencoder of features [N,D]; a pure function of its arguments.

    Raises `DataError` for values that are not finite, features that are constant, and k that is not
    between 1 and width.
    """
    if not 1 <= settings.k <= settings.width:
        raise DataError(f"k={settings.k} must be between 1 and width={settings.width}")
    rows = _checked(features)
    draws = generator(seed, Stream.ANALYSIS, 3)
    net = TopKAutoencoder(median(rows[:MEDIAN_ROWS]), settings.k, settings.width, draws)
    variance = (rows - rows.mean(0)).square().mean()
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr, eps=6.25e-10)
    unused = torch.zeros(settings.width)  # images since a latent was used
    for _ in range(settings.steps):
        x = rows[torch.randint(len(rows), (settings.batch,), generator=draws)]
        latents = net.before(x)
        chosen = largest(latents, settings.k)
        rebuilt = net.decode(chosen)
        loss = (rebuilt - x).square().mean() / variance
        dead = unused >= settings.dead_images
        loss = loss + AUXILIARY * _left_over(net, latents, x - rebuilt.detach(), dead, settings)
        optimizer.zero_grad()
        loss.backward()
        net.project()
        optimizer.step()
        net.normalise()
        unused = torch.where((chosen > 0).any(0), 0, unused + len(x))
    net.zero_grad()
    return net.requires_grad_(False)


def _left_over(
    net: TopKAutoencoder, latents: Tensor, rest: Tensor, dead: Tensor, settings: Settings
) -> Tensor:
    """How badly the dead latents alone rebuild what the others left, relative to its variance."""
    count = min(settings.revived, int(dead.sum()))
    if not count:
        return latents.new_zeros(())
    chosen = largest(latents.masked_fill(~dead, -math.inf), count)
    spread = (rest - rest.mean(0)).square().mean()
    error = (chosen @ net.decoder - rest).square().mean() / spread
    return error.nan_to_num(0.0)


@torch.no_grad()
def quality(net: TopKAutoencoder, features: Tensor) -> Quality:
    """Of a trained autoencoder on features [N,D] that it has not seen; raises as `train` does."""
    rows = _checked(features)
    chosen = largest(net.before(rows), net.k)
    rest, used = (net.decode(chosen) - rows).square(), chosen > 0
    return Quality(
        float(rest.mean() / (rows - rows.mean(0)).square().mean()),
        float((rest.sum(1) / rows.square().sum(1).clamp_min(1e-30)).mean()),
        float((~used.any(0)).double().mean()),
        float(used.sum(1).double().mean()),
    )


def median(rows: Tensor) -> Tensor:
    """Geometric median [D] of rows [N,D] (Weiszfeld's algorithm)."""
    centre = rows.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights = 1 / (rows - centre).norm(dim=1).clamp_min(1e-8)
        centre = (weights[:, None] * rows).sum(0) / weights.sum()
    return centre


def _checked(features: Tensor) -> Tensor:
    rows = features.float()
    if rows.ndim != 2 or len(rows) < 2 or not bool(rows.isfinite().all()):
        raise DataError(
            f"features are {list(features.shape)}; give finite ones [N,D] of 2 images or more"
        )
    if not bool((rows != rows[0]).any()):
        raise DataError("the features are the same for all images; there is nothing to learn")
    return rows
