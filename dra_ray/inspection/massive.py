"""Massive activations: the few channels of a transformer's residual stream that dwarf all others on
every image.

They drown a pooled feature, so DRA zeroes them before the feature's AdaLN (arXiv 2602.19931,
appendix D, after Gan et al. 2025); it names two of the published LightningDiT. This finds those of
any network.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dra_ray import data
from dra_ray.errors import ConfigError, DataError
from dra_ray.inspection.probe import check_fits, data_of, first_images
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.network import TokenStream
from dra_ray.teachers.sampling import seeded_noise

RATIO = 20.0  # UNVERIFIED: the papers give no threshold
SHARE = 0.5  # UNVERIFIED: "consistently" is taken as in most images


def channel_ratios(activations: Tensor) -> Tensor:
    """Each channel's mean |activation| over an image's tokens, relative to the image's median
    channel: [B,N,D] -> float32 [B,D].

    The median hardly notices the massive channels themselves, as a mean would. Raises `DataError`
    for another shape.
    """
    if activations.ndim != 3 or not activations.numel():
        raise DataError(
            f"activations are {list(activations.shape)}; give [images, tokens, channels]"
        )
    size = activations.detach().to(torch.float32).abs().mean(dim=1)
    middle = size.median(dim=1, keepdim=True).values
    return (size / middle).nan_to_num(
        nan=0.0, posinf=torch.inf
    )  # 0/0: a silent channel beside a silent median


def massive_channels(
    activations: Tensor | Iterable[Tensor], ratio: float = RATIO, share: float = SHARE
) -> tuple[int, ...]:
    """Channels of the stream [B,N,D] (or of batches of it) that exceed `ratio` times the median in
    more than `share` of the images.

    The most massive first. Raises `DataError` if there are no activations, or of unequal width.
    """
    batches = [activations] if isinstance(activations, Tensor) else activations
    parts = [channel_ratios(batch).cpu() for batch in batches]
    if len({part.shape[1] for part in parts}) != 1:
        raise DataError(
            f"activations have {sorted({part.shape[1] for part in parts})} channels; give one or "
            "more batches of one layer"
        )
    ratios = torch.cat(parts)
    often = (ratios > ratio).to(torch.float32).mean(dim=0) > share
    strength = ratios.median(dim=0).values
    return tuple(
        sorted(
            often.nonzero().flatten().tolist(),
            key=lambda channel: (-float(strength[channel]), channel),
        )
    )


@torch.no_grad()
def find_massive(
    net: TokenStream,
    clean: Tensor,
    sigma: float,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    layer: str | None = None,
    batch: int = 32,
    ratio: float = RATIO,
    share: float = SHARE,
) -> tuple[int, ...]:
    """`massive_channels` of the stream that enters `layer` of `net`, for clean inputs [B,C,H,W]
    noised at `sigma`.

    `noise` is standard normal like `clean`, `labels` one-hot [B,K] or None for the null class.
    """
    hot = itertools.repeat(None) if labels is None else labels.split(batch)
    pairs = zip((clean + sigma * noise).split(batch), hot, strict=False)
    return massive_channels(
        [net.stream(x, x.new_full((len(x),), sigma), label, layer) for x, label in pairs],
        ratio,
        share,
    )


def teacher_massive_channels(
    teacher: Store, settings: Sequence[str], sigma: float, layer: str | None, images: int
) -> tuple[int, ...]:
    """Massive channels of the stream that enters `layer` of a transformer, on training images;
    `ConfigError` for other networks.
    """
    net = checkpoint.load(teacher)
    if not isinstance(net, TokenStream):
        raise ConfigError(
            f"'{teacher}' is of kind '{net.kind}', which has no residual stream of tokens; give a "
            "LightningDiT"
        )
    found = data.load(data_of(checkpoint.read_card(teacher), settings))
    check_fits(net, found)
    clean: Tensor = torch.cat(
        [net.clean(part) for part in first_images(found.train, images).images.split(32)]
    )
    noise = seeded_noise(range(len(clean)), net.noise_shape).to(torch.float32)
    return find_massive(net, clean, sigma, noise, layer=layer)
