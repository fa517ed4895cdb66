"""LightningDiT (Yao et al. 2025, arXiv 2501.01423): a diffusion transformer over VA-VAE's latents,
as a frozen teacher.

Written from the paper and from the published checkpoint's parameter names, so that those load by
name. Time t runs from 0 (noise) to 1 (clean): x_t = t*clean + (1-t)*noise, and the network predicts
the velocity clean - noise. EDM's noise level of such an x_t, after division by t, is sigma =
(1-t)/t; in those terms this network can stand wherever `EDM` does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dra_ray.config import Synthesis
from dra_ray.errors import CheckpointError, ConfigError, nearest
from dra_ray.teachers.network import Network
from dra_ray.teachers.pixels import to_signed, to_uint8
from dra_ray.teachers.sampling import seeded_noise
from dra_ray.teachers.vae import VAE, LatentStats, load_strictly, unwrapped

TIME_FREQUENCIES = 128
WAVELENGTH = 10_000.0  # of the slowest sine, in every embedding
ALL_SIGMA = (0.0, math.inf)  # times between clean and pure noise


@dataclasses.dataclass(frozen=True)
class DiTSizes:
    """Sizes of a LightningDiT; the defaults are XL/1 on VA-VAE's latents. Raises `ConfigError` for
    sizes that do not fit together.
    """

    resolution: int = 16  # of the latents, or of the images of a network over pixels
    channels: int = 32
    patch: int = 1
    hidden: int = 1152
    mlp_hidden: int = 3072
    depth: int = 28
    heads: int = 16
    num_classes: int = 1000  # class number `num_classes` is the null class
    qk_norm: bool = False
    massive: tuple[
        int, ...
    ] = ()  # channels of the stream that features go without; a property of the weights

    def __post_init__(self) -> None:
        if self.patch < 1 or self.resolution % self.patch:
            raise ConfigError(
                f"net.patch={self.patch} does not divide net.resolution={self.resolution}; change "
                "either"
            )
        if self.heads < 1 or self.hidden % (4 * self.heads):
            raise ConfigError(
                f"net.hidden={self.hidden} is not a multiple of 4 * net.heads={4 * self.heads}, as "
                "rotary embedding needs; change either"
            )
        if self.depth < 1:
            raise ConfigError(f"net.depth={self.depth} is no network; set it to at least 1")
        beyond = [channel for channel in self.massive if not 0 <= channel < self.hidden]
        if beyond:
            raise ConfigError(
                f"net.massive names channel {beyond[0]}, but net.hidden={self.hidden}; remove it"
            )

    @property
    def side(self) -> int:
        """Tokens a side."""
        return self.resolution // self.patch


XL_1 = DiTSizes(
    massive=(1053, 259)
)  # the released checkpoint and its massive channels (arXiv 2602.19931, appendix D)


def to_time(sigma: Tensor) -> Tensor:
    """Time t of the linear path at EDM's noise level `sigma`."""
    return 1 / (1 + sigma)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _sine_positions(side: int, width: int) -> Tensor:
    """Fixed positions [1,side*side,width]: the first half of the channels tells the column, the
    second the row (MAE).
    """
    frequency = WAVELENGTH ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.outer(torch.arange(side, dtype=torch.float64), frequency)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = line.unsqueeze(0).expand(side, side, -1)
    rows = line.unsqueeze(1).expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, width).to(torch.float32)


class Rotary(nn.Module):
    """Rotates pairs of neighbouring channels of a head: the first half of them by the row, the
    second by the column.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, side: int, head_width: int) -> None:
        super().__init__()
        half = head_width // 2
        frequency = WAVELENGTH ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        line = torch.outer(torch.arange(side, dtype=torch.float32), frequency).repeat_interleave(
            2, dim=1
        )
        rows = line.unsqueeze(1).expand(side, side, half)
        columns = line.unsqueeze(0).expand(side, side, half)
        angle = torch.cat([rows, columns], dim=2).reshape(side * side, head_width)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack([-odd, even], dim=-1).flatten(-2) * self.freqs_sin


class Attention(nn.Module):
    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        head_width = sizes.hidden // sizes.heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.proj = nn.Linear(sizes.hidden, sizes.hidden)
        self.q_norm = nn.RMSNorm(head_width, eps=1e-6) if sizes.qk_norm else None
        self.k_norm = nn.RMSNorm(head_width, eps=1e-6) if sizes.qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(rotary(q), rotary(k), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm that the condition shifts and scales, and a gate
    (AdaLN-zero).
    """

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(sizes.hidden, eps=1e-6)
        self.attn = Attention(sizes)
        self.norm2 = nn.RMSNorm(sizes.hidden, eps=1e-6)
        self.mlp = SwiGLU(sizes.hidden, sizes.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.hidden, 6 * sizes.hidden))

    def forward(self, x: Tensor, condition: Tensor, rotary: Rotary) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(
            6, dim=1
        )
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1), rotary)
        return x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))

    def entry(self, x: Tensor, condition: Tensor) -> Tensor:
        """What its attention sees of the stream `x` [B,N,D]."""
        shift, scale = self.adaLN_modulation(condition).chunk(6, dim=1)[:2]
        return _modulate(self.norm1(x), shift, scale)


class FinalLayer(nn.Module):
    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.norm_final = nn.RMSNorm(sizes.hidden, eps=1e-6)
        self.linear = nn.Linear(sizes.hidden, sizes.patch**2 * sizes.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(sizes.hidden, 2 * sizes.hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(self.entry(x, condition))

    def entry(self, x: Tensor, condition: Tensor) -> Tensor:
        return _modulate(self.norm_final(x), *self.adaLN_modulation(condition).chunk(2, dim=1))


class PatchEmbedder(nn.Module):
    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.proj = nn.Conv2d(sizes.channels, sizes.hidden, sizes.patch, stride=sizes.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Time t [B] in [0,1], unscaled, to [B,D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        frequency = WAVELENGTH ** -(
            torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device) / TIME_FREQUENCIES
        )
        angle = t.unsqueeze(1) * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """One-hot labels [B,K] to [B,D]; rows of zeros are the null class, which training dropped a
    tenth of the labels to.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor | None) -> Tensor:
        """[B,D], or [1,D] for labels None."""
        if labels is None:
            return self.embedding_table.weight[self.num_classes :]
        return self.embedding_table(
            torch.where(labels.any(dim=1), labels.argmax(dim=1), self.num_classes)
        )


class LightningDiT(Network):
    """A LightningDiT, over latents or pixels, with the interface of `EDM`.

    Its layers are the points where the stream enters a block, `blocks.0` to `blocks.<depth-1>`, and
    `final_layer`. As a feature, the stream there goes without its massive channels through the norm
    and AdaLN at that point (arXiv 2602.19931, appendix D, following Gan et al. 2025), which of the
    norms and whether "layer 14" counts from 0 being UNVERIFIED; `<layer>.stream` skips norm and
    AdaLN.
    """

    kind = "lightning-dit"
    sigma_range = ALL_SIGMA
    pos_embed: Tensor

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.resolution = sizes.resolution
        self.channels = sizes.channels
        self.num_classes = sizes.num_classes
        self.default_layer = f"blocks.{sizes.depth // 2}"
        self.x_embedder = PatchEmbedder(sizes)
        self.t_embedder = TimeEmbedder(sizes.hidden)
        self.y_embedder = LabelEmbedder(sizes.num_classes, sizes.hidden)
        self.register_buffer("pos_embed", _sine_positions(sizes.side, sizes.hidden))
        self.feat_rope = Rotary(sizes.side, sizes.hidden // sizes.heads)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.final_layer = FinalLayer(sizes)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Every block and the output start as if absent."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        for part in (
            self.y_embedder.embedding_table,
            self.t_embedder.mlp[0],
            self.t_embedder.mlp[2],
        ):
            nn.init.normal_(part.weight, std=0.02)  # type: ignore[arg-type]
        absent = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)] + [
            self.final_layer.linear
        ]
        for parameter in itertools.chain.from_iterable(part.parameters() for part in absent):
            nn.init.zeros_(parameter)

    # -- as a generative model ---------------------------------------------------------------------
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise `x` float32 [B,C,H,W] (clean plus noise of deviation `sigma` [B]), as `EDM` does;
        `labels` one-hot [B,K] or None.
        """
        t = to_time(sigma)
        x_t = x * t.reshape(-1, 1, 1, 1)
        return x_t + (1 - t).reshape(-1, 1, 1, 1) * self.velocity(x_t, t, labels)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicted clean - noise [B,C,H,W] for `x_t` float32 [B,C,H,W] at times `t` float32 [B];
        `labels` one-hot [B,K] or None.
        """
        h, condition = self._enter(x_t, t, labels, len(self.blocks))
        return self._to_pixels(self.final_layer(h, condition))

    def _to_pixels(self, tokens: Tensor) -> Tensor:
        side, patch = self.sizes.side, self.sizes.patch
        grid = tokens.reshape(len(tokens), side, side, patch, patch, self.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tokens), self.channels, self.resolution, self.resolution
        )

    # -- as an encoder -----------------------------------------------------------------------------
    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        layer: str | None = None,
        pooled: bool = True,
    ) -> Tensor:
        """The feature at `layer` for a noisy `x` [B,C,H,W], as for `forward`; runs no block beyond.

        The tokens' average [B,D], or, not `pooled`, all of them as a map [B,D,h,w].
        """
        name = self.check_layer(layer)
        h, condition = self._enter_noisy(x, sigma, labels, name)
        h = self._without_massive(h)
        if not name.endswith(".stream"):
            h = self._part(name).entry(h, condition)
        return (
            h.mean(dim=1)
            if pooled
            else h.transpose(1, 2).unflatten(2, (self.sizes.side, self.sizes.side))
        )

    def _without_massive(self, stream: Tensor) -> Tensor:
        """With them, the norm would spread their energy over all channels."""
        stream = stream.clone()
        for channel in self.sizes.massive:
            stream[:, :, channel] = 0
        return stream

    def stream(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, layer: str | None = None
    ) -> Tensor:
        """The residual stream [B,N,D] that enters `layer`, massive channels and all; arguments as
        for `features`.
        """
        return self._enter_noisy(x, sigma, labels, self.check_layer(layer))[0]

    def _enter_noisy(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None, layer: str
    ) -> tuple[Tensor, Tensor]:
        t = to_time(sigma)
        blocks = len(self.blocks) if layer.startswith("final_layer") else int(layer.split(".")[1])
        return self._enter(x * t.reshape(-1, 1, 1, 1), t, labels, blocks)

    def _enter(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """The stream [B,N,D] after so many blocks, and the condition [B,D]."""
        condition = self.t_embedder(t) + self.y_embedder(labels)
        h = self.x_embedder(x_t) + self.pos_embed
        for block in self.blocks[:blocks]:
            h = block(h, condition, self.feat_rope)
        return h, condition

    def _part(self, layer: str) -> Any:
        return (
            self.final_layer
            if layer.startswith("final_layer")
            else self.blocks[int(layer.split(".")[1])]
        )

    def clean(self, inputs: Tensor) -> Tensor:
        """What noise is added to: images uint8 [B,C,H,W] in [-1,1]; normalised latents float32 as
        they are.
        """
        return to_signed(inputs) if inputs.dtype == torch.uint8 else inputs

    def layers(self) -> dict[str, int]:
        """Names of the layers, in the order of computation, with their widths."""
        places = [f"blocks.{index}" for index in range(self.sizes.depth)] + ["final_layer"]
        return {f"{place}{kind}": self.sizes.hidden for place in places for kind in (".stream", "")}

    # -- as a checkpoint ---------------------------------------------------------------------------
    # an `ImageSampler`, by integrating the flow
    def check_sampling(self, config: Synthesis) -> None:
        """Every flow that the config allows can be integrated."""

    def sampler_facts(self, config: Synthesis) -> dict[str, Any]:
        return {"name": "flow"} | config.flow.model_dump(mode="json")

    def calls_per_image(self, config: Synthesis) -> int:
        return _sampling(config).calls()

    def decoding(self) -> None:
        return None

    def sample_images(
        self, config: Synthesis, seeds: Sequence[int], labels: Tensor | None
    ) -> Tensor:
        return self.to_images(sample(self, seeds, labels, _sampling(config))).cpu()

    def to_images(self, state: Tensor) -> Tensor:
        return to_uint8(state)

    @property
    def architecture(self) -> dict[str, Any]:
        """What, with the weights, makes the function: plain data that `from_architecture`
        accepts.
        """
        return (
            {"kind": self.kind}
            | dataclasses.asdict(self.sizes)
            | {"massive": list(self.sizes.massive)}
        )

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> LightningDiT:
        """Build the network of `architecture`; KeyError, TypeError or `ConfigError` if it is not
        one.
        """
        fields = {name: value for name, value in architecture.items() if name != "kind"}
        return cls(DiTSizes(**fields | {"massive": tuple(fields["massive"])}))

    @classmethod
    def from_official(
        cls, checkpoint: Mapping[str, Any], massive: Sequence[int] = XL_1.massive
    ) -> LightningDiT:
        """A published checkpoint, of any size, as a frozen network; `CheckpointError` names what is
        missing or misshapen.

        `massive` are its massive channels: the default is for the released XL/1, `find_massive`
        finds those of others.
        """
        weights = official_keys(checkpoint)
        with torch.device("meta"):
            net = cls(dataclasses.replace(sizes_of(weights), massive=tuple(massive)))
        load_strictly(net, weights, "LightningDiT")
        return net.eval().requires_grad_(False)


def official_keys(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights float32 of a LightningDiT checkpoint by our names: the averaged ones (`ema`) if it
    has them.

    Raises `CheckpointError` if there are no weights.
    """
    return unwrapped(checkpoint, ("ema", "model"))


def sizes_of(weights: Mapping[str, Tensor]) -> DiTSizes:
    """Sizes that official weights have, without massive channels; `CheckpointError` if they are of
    another network.
    """
    try:
        hidden, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens, head_width = weights["feat_rope.freqs_cos"].shape
        mlp_hidden = weights["blocks.0.mlp.w3.weight"].shape[1]
        rows = len(weights["y_embedder.embedding_table.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint is not a LightningDiT with RoPE and SwiGLU (at {error}); give one of "
            "the authors' XL/1 files"
        ) from None
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    return DiTSizes(
        resolution=round(tokens**0.5) * patch,
        channels=channels,
        patch=patch,
        hidden=hidden,
        mlp_hidden=mlp_hidden,
        depth=depth,
        heads=hidden // head_width,
        num_classes=rows - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
    )


# -- sampling --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How velocities are integrated; the defaults are the published ones of XL/1 after 800 epochs
    (FID 1.35).

    The paper of DRA does not say how its 4 million images were sampled: that it is so is
    UNVERIFIED.
    """

    times: int = 250  # grid points from 0 to 1, so one step fewer
    method: Literal["euler", "heun"] = "euler"
    guidance: float = 6.7  # 1 for none
    guided_channels: int = 3  # guidance acts on the first so many channels only
    guided_from: float = 0.125  # time before which there is no guidance
    shift: float = 0.3  # below 1 puts more of the steps near the noise; 1 for equal steps

    def __post_init__(self) -> None:
        if self.times < 2:
            raise ConfigError(f"sampling.times={self.times} makes no step; set it to at least 2")
        if self.shift <= 0:
            raise ConfigError(
                f"sampling.shift={self.shift:g} is not above 0; set it to 1 for equal steps"
            )
        if self.method not in ("euler", "heun"):
            raise ConfigError(
                f"sampling.method='{self.method}' is unknown; "
                f"{nearest(self.method, ['euler', 'heun'])}"
            )

    def grid(self) -> Tensor:
        """Times float64 [times], from 0 to 1."""
        even = torch.linspace(0, 1, self.times, dtype=torch.float64)
        return self.shift * even / (self.shift * even + (1 - even))

    def calls(self) -> int:
        """Network calls per image, where one with guidance counts twice: for the null class too."""
        times = self.grid().tolist()
        evaluated = times[:-1] + (times[1:] if self.method == "heun" else [])
        return sum(
            2 if self.guidance != 1 and time >= self.guided_from else 1 for time in evaluated
        )


def _sampling(config: Synthesis) -> Sampling:
    return Sampling(**config.flow.model_dump())


def guided_velocity(
    net: LightningDiT, x_t: Tensor, t: Tensor, labels: Tensor | None, sampling: Sampling
) -> Tensor:
    """Velocity [B,C,H,W] with classifier-free guidance: null + guidance * (conditional - null) in
    the guided channels.

    `t` is one time for all, a scalar; `labels` one-hot [B,K], None for no class and no guidance.
    """
    times = t.to(x_t).expand(len(x_t))
    if labels is None or sampling.guidance == 1 or float(t) < sampling.guided_from:
        return net.velocity(x_t, times, labels)
    both = net.velocity(
        x_t.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, torch.zeros_like(labels)])
    )
    conditional, null = both.chunk(2)
    cut = sampling.guided_channels
    guided = null[:, :cut] + sampling.guidance * (conditional[:, :cut] - null[:, :cut])
    return torch.cat([guided, conditional[:, cut:]], dim=1)


@torch.no_grad()
def integrate(
    net: LightningDiT, noise: Tensor, labels: Tensor | None, sampling: Sampling
) -> Tensor:
    """Follow the velocity from `noise` [B,C,H,W] at time 0 to time 1; the state is float64, the
    network float32.

    Returns float64 [B,C,H,W]: normalised latents, or images in about [-1,1].
    """

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return guided_velocity(net, x.to(torch.float32), t, labels, sampling).to(torch.float64)

    x = noise.to(torch.float64)
    for now, after in itertools.pairwise(sampling.grid()):
        first = slope(x, now)
        ahead = x + (after - now) * first
        x = (
            ahead
            if sampling.method == "euler"
            else x + (after - now) * (first + slope(ahead, after)) / 2
        )
    return x


def sample(
    net: LightningDiT, seeds: Sequence[int], labels: Tensor | None, sampling: Sampling
) -> Tensor:
    """What `integrate` makes of `seeds` and class indices `labels` int64 [B]; equal for equal
    batches, on the network's device.
    """
    device = net.pos_embed.device
    one_hot = None if labels is None else net.one_hot(labels).to(device)
    return integrate(net, seeded_noise(seeds, net.noise_shape).to(device), one_hot, sampling)


# -- behind an autoencoder -------------------------------------------------------------------------
class LatentDiT(Network):
    """A LightningDiT behind its autoencoder, with the interface of `EDM`: `clean` makes the latents
    that noise is added to.

    `stats` normalise the latents; `resolution` is that of the images, which are resized where the
    autoencoder wants another (the paper's students see 224 pixels, VA-VAE 256; that it resized is
    UNVERIFIED). Raises `ConfigError` if the parts do not fit.
    """

    kind = "latent-dit"
    sigma_range = ALL_SIGMA
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self, dit: LightningDiT, vae: VAE, stats: LatentStats, resolution: int | None = None
    ) -> None:
        super().__init__()
        made = (vae.sizes.latent_channels, vae.sizes.latent_resolution, vae.sizes.latent_resolution)
        if made != dit.noise_shape:
            raise ConfigError(
                f"the autoencoder makes latents {list(made)}, but the transformer takes "
                f"{list(dit.noise_shape)}; use parts that belong together"
            )
        if len(stats.mean) != dit.channels:
            raise ConfigError(
                f"the latent statistics are of {len(stats.mean)} channels, but latents have "
                f"{dit.channels}; use those of this autoencoder"
            )
        self.dit = dit
        self.vae = vae
        self.register_buffer("latent_mean", stats.mean.reshape(1, -1, 1, 1).clone())
        self.register_buffer("latent_std", stats.std.reshape(1, -1, 1, 1).clone())
        self.resolution = resolution or vae.sizes.resolution
        self.channels = vae.sizes.channels
        self.num_classes = dit.num_classes
        self.default_layer = dit.default_layer

    def clean(self, inputs: Tensor) -> Tensor:
        """Normalised latents [B,Z,h,w] of `inputs` uint8 [B,C,R,R], by the posterior's mean;
        float32 latents as they are.

        The mean keeps a feature a pure function of its request; the transformer was trained on
        samples (UNVERIFIED that it matters not).
        """
        if inputs.dtype != torch.uint8:
            return inputs
        pixels = to_signed(inputs).to(self.latent_mean.device)
        return (self.vae.posterior(self._resized(pixels))[0] - self.latent_mean) / self.latent_std

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return self.dit.noise_shape

    def _resized(self, x: Tensor) -> Tensor:
        wanted = self.vae.sizes.resolution
        if x.shape[-1] == wanted:
            return x
        return F.interpolate(
            x, size=(wanted, wanted), mode="bicubic", antialias=True, align_corners=False
        ).clamp(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [B,C,R',R'] of normalised latents, at the autoencoder's resolution."""
        return self.vae.decode_uint8(latents.to(torch.float32) * self.latent_std + self.latent_mean)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoised latents; see `LightningDiT.forward`."""
        return self.dit(x, sigma, labels)

    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        layer: str | None = None,
        pooled: bool = True,
    ) -> Tensor:
        """Features of noisy latents; see `LightningDiT.features`."""
        return self.dit.features(x, sigma, labels, layer, pooled)

    def stream(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, layer: str | None = None
    ) -> Tensor:
        return self.dit.stream(x, sigma, labels, layer)

    def layers(self) -> dict[str, int]:
        return self.dit.layers()

    @property
    def architecture(self) -> dict[str, Any]:
        """What, with the weights (the latent statistics among them), makes the function."""
        return {
            "kind": self.kind,
            "dit": self.dit.architecture,
            "vae": self.vae.architecture,
            "resolution": self.resolution,
        }

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> LatentDiT:
        """Build the network of `architecture`; KeyError, TypeError or `ConfigError` if it is not
        one.
        """
        dit = LightningDiT.from_architecture(architecture["dit"])
        unit = torch.ones(dit.channels)
        return cls(
            dit,
            VAE.from_architecture(architecture["vae"]),
            LatentStats(0 * unit, unit),
            int(architecture["resolution"]),
        )

    # an `ImageSampler`, by integrating the flow
    def check_sampling(self, config: Synthesis) -> None:
        if self.vae.decoder is None:
            raise ConfigError(
                f"teacher='{config.teacher}' has no decoder; import it again with `dra teacher "
                "import-dit --decoder`"
            )

    def sampler_facts(self, config: Synthesis) -> dict[str, Any]:
        return {"name": "flow"} | config.flow.model_dump(mode="json")

    def calls_per_image(self, config: Synthesis) -> int:
        return _sampling(config).calls()

    def decoding(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.vae.decoder is None else self.vae.decode

    @torch.no_grad()
    def sample_images(
        self, config: Synthesis, seeds: Sequence[int], labels: Tensor | None
    ) -> Tensor:
        return self.to_images(sample(self.dit, seeds, labels, _sampling(config))).cpu()

    @torch.no_grad()
    def to_images(self, state: Tensor) -> Tensor:
        images = self.decode(state)
        if images.shape[-1] == self.resolution:
            return images
        resized = F.interpolate(
            images.float(),
            size=(self.resolution, self.resolution),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        return resized.round().clamp(0, 255).to(torch.uint8)
