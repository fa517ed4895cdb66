"""VA-VAE f16d32 (Yao et al. 2025, arXiv 2501.01423): the autoencoder whose latents LightningDiT was
trained on.

Its network is latent diffusion's AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752). Written
from the papers and from the published checkpoint's parameter names, so that it loads by name:
`encoder.*`, `quant_conv.*`, `post_quant_conv.*`, `decoder.*`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dra_ray.errors import CheckpointError, ConfigError, DataError
from dra_ray.storage import Store
from dra_ray.teachers.network import check_fit
from dra_ray.teachers.pixels import to_signed, to_uint8

GROUPS = 32
LOG_VARIANCE = (-30.0, 20.0)  # limits of the posterior
PARTS = ("encoder.", "quant_conv.", "decoder.", "post_quant_conv.")
DECODER_PARTS = ("decoder.", "post_quant_conv.")
WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile


@dataclasses.dataclass(frozen=True)
class VAESizes:
    """Sizes of the autoencoder; the defaults are VA-VAE f16d32. Raises `ConfigError` for sizes that
    do not divide.
    """

    resolution: int = 256
    channels: int = 3
    width: int = 128
    width_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    latent_channels: int = 32
    decoder: bool = True  # an encoder alone is enough for features

    def __post_init__(self) -> None:
        if not self.width_mult or self.resolution % self.factor:
            raise ConfigError(
                f"vae.resolution={self.resolution} does not halve {len(self.width_mult) - 1} "
                "times; change it or vae.width_mult"
            )
        if self.width <= 0 or self.width % GROUPS:
            raise ConfigError(
                f"vae.width={self.width} is not a multiple of {GROUPS}, the groups of its norms; "
                "use 32, 64 or 128"
            )

    @property
    def factor(self) -> int:
        """Pixels a side that one latent stands for."""
        return 2 ** (len(self.width_mult) - 1)

    @property
    def latent_resolution(self) -> int:
        return self.resolution // self.factor


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class Residual(nn.Module):
    """Two norm-SiLU-convolution layers beside a skip, which is a 1x1 convolution where the width
    changes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class SpatialAttention(nn.Module):
    """One head of self-attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part(h).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Halve(nn.Module):
    """Half the resolution by a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Twice the resolution: nearest pixel, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention if asked for, and the way to the
    next resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        *,
        attention: bool,
        resample: str | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            Residual(in_channels if index == 0 else out_channels, out_channels)
            for index in range(blocks)
        )
        self.attn = nn.ModuleList(
            SpatialAttention(out_channels) for _ in range(blocks if attention else 0)
        )
        self.downsample = Halve(out_channels) if resample == "down" else None
        self.upsample = Double(out_channels) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        after = self.downsample or self.upsample
        return x if after is None else after(x)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = Residual(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images [B,C,R,R] to twice the latent channels: what becomes mean and log-variance."""

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths = [sizes.width * mult for mult in sizes.width_mult]
        self.conv_in = nn.Conv2d(sizes.channels, sizes.width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            attention = sizes.resolution >> level in sizes.attn_resolutions
            resample = "down" if level < len(widths) - 1 else None
            before = widths[level - 1] if level else sizes.width
            self.down.append(
                Level(before, width, sizes.num_blocks, attention=attention, resample=resample)
            )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * sizes.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to images [B,C,R,R]; `up[0]` is the level of full resolution and runs last."""

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths = [sizes.width * mult for mult in sizes.width_mult]
        self.conv_in = nn.Conv2d(sizes.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            attention = sizes.resolution >> level in sizes.attn_resolutions
            before = widths[level + 1] if level < len(widths) - 1 else width
            self.up.append(
                Level(
                    before,
                    width,
                    sizes.num_blocks + 1,
                    attention=attention,
                    resample="up" if level else None,
                )
            )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], sizes.channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """The autoencoder: uint8 images to latents, latents to uint8 images. Latents are raw:
    `LatentStats` normalises them.
    """

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        latent = sizes.latent_channels
        self.encoder = Encoder(sizes)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.decoder = Decoder(sizes) if sizes.decoder else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if sizes.decoder else None

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B,Z,R/f,R/f] of the latents of `x` float32 [B,C,R,R] in
        [-1,1].
        """
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (log_variance.clamp(*LOG_VARIANCE) / 2).exp()

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of `images` uint8 [B,C,R,R]: the posterior's mean, or with standard normal
        `noise`, shaped like it, a sample.
        """
        mean, std = self.posterior(to_signed(images))
        return mean if noise is None else mean + std * noise

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 [B,C,R,R], about [-1,1]. Raises `ConfigError` if there is no decoder."""
        if self.decoder is None or self.post_quant_conv is None:
            raise ConfigError(
                "vae.decoder=False, but images are asked of this autoencoder; import it again with "
                "its decoder"
            )
        return self.decoder(self.post_quant_conv(latents))

    def decode_uint8(self, latents: Tensor) -> Tensor:
        return to_uint8(self.decode(latents))

    @property
    def architecture(self) -> dict[str, Any]:
        """What, with the weights, makes the function: plain data that `from_architecture`
        accepts.
        """
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.sizes).items()
        }

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> VAE:
        """Build the network of `architecture`; TypeError or `ConfigError` if it is not one."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in architecture.items()
        }
        return cls(VAESizes(**fields))

    @classmethod
    def from_official(cls, checkpoint: Mapping[str, Any], sizes: VAESizes | None = None) -> VAE:
        """The published checkpoint as a frozen network; `CheckpointError` names what is missing or
        misshapen.
        """
        with torch.device("meta"):
            net = cls(sizes or VAESizes())
        load_strictly(net, official_keys(checkpoint, net.sizes.decoder), "VA-VAE")
        return net.eval().requires_grad_(False)


# -- official checkpoints --------------------------------------------------------------------------
def official_keys(checkpoint: Mapping[str, Any], decoder: bool = True) -> dict[str, Tensor]:
    """Weights float32 of a VA-VAE checkpoint by our names, without what only its training needed
    (losses, DINOv2, its projection).
    """
    kept = PARTS if decoder else tuple(part for part in PARTS if part not in DECODER_PARTS)
    return {
        name: tensor
        for name, tensor in unwrapped(checkpoint, ("state_dict",)).items()
        if name.startswith(kept)
    }


def unwrapped(checkpoint: Mapping[str, Any], parts: Iterable[str]) -> dict[str, Tensor]:
    """The tensors, as float32, of the first of `parts` that `checkpoint` has, else of itself; names
    lose wrappers' prefixes.

    Raises `CheckpointError` if there are none.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"the checkpoint is a {type(checkpoint).__name__}, not a dictionary of weights; give "
            "the file that the authors published"
        )
    weights = next(
        (checkpoint[part] for part in parts if isinstance(checkpoint.get(part), Mapping)),
        checkpoint,
    )
    named = {
        _plain(name): tensor.to(torch.float32)
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)
    }
    if not named:
        raise CheckpointError(
            f"the checkpoint holds no weights (found: {', '.join(map(str, list(weights)[:4]))}); "
            "give the file that the authors published"
        )
    return named


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def load_strictly(net: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Make `weights` those of `net`, which may be on the meta device; `CheckpointError` unless
    names and shapes are exactly its own.
    """
    check_fit(weights, net, f"check the file and the sizes: the checkpoint is not of this {what}")
    net.load_state_dict(weights, assign=True)


# -- statistics of the latents ---------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, eq=False)
class LatentStats:
    """Mean and standard deviation float32 [Z] of raw latents, per channel. Raises `DataError` if
    they are not.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise DataError(
                f"latent statistics are {list(self.mean.shape)} and {list(self.std.shape)}; give a "
                "mean and a std per channel"
            )
        if self.mean.is_meta:  # of a network that is only being planned
            return
        if not bool(
            self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()
        ):
            raise DataError(
                "latent statistics must be finite, and every std above 0; measure them again"
            )


def read_stats(store: Store) -> LatentStats:
    """`latents_stats.pt` as published, or a .safetensors file, with tensors `mean` and `std` of one
    value per channel.

    Raises `DataError` if it lacks them, `StorageError` if it is not there.
    """
    tensors = store.read_tensors() if store.name.endswith(".safetensors") else store.read_torch()
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensors.get(name), Tensor) for name in ("mean", "std")
    ):
        raise DataError(
            f"'{store}' lacks the tensors 'mean' and 'std'; give the latents_stats.pt of the "
            "published model"
        )
    return LatentStats(*(tensors[name].to(torch.float32).flatten() for name in ("mean", "std")))


@torch.no_grad()
def measure_stats(vae: VAE, batches: Iterable[Tensor]) -> LatentStats:
    """Statistics of the posterior's samples over `batches` of images uint8 [B,C,R,R]; no sampling,
    but the law of total variance.

    The published ones are of 10,000 training images. Raises `DataError` for no images.
    """
    count = 0
    total = square = torch.zeros(vae.sizes.latent_channels, dtype=torch.float64)
    for images in batches:
        mean, std = (part.to("cpu", torch.float64) for part in vae.posterior(to_signed(images)))
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum(dim=(0, 2, 3))
        square = square + (mean**2 + std**2).sum(dim=(0, 2, 3))
    if not count:
        raise DataError("no images to measure latent statistics on; give at least one batch")
    centre = total / count
    return LatentStats(
        centre.to(torch.float32), (square / count - centre**2).sqrt().to(torch.float32)
    )
