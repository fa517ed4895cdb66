"""EDM's DDPM++ and NCSN++ networks with the preconditionings of its table 1 (Karras et al. 2022,
arXiv 2206.00364, appendix F).

Written from the paper and from the published checkpoints' parameter names, so that those load by
name: parameters are `model.enc.<block>.*`, `model.dec.<block>.*` and `model.map_*`. A block is
named by its output size, such as `8x8_in1`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dra_ray.config import Synthesis, UNet
from dra_ray.errors import ConfigError, DataError, nearest
from dra_ray.teachers import sampling
from dra_ray.teachers.network import Network
from dra_ray.teachers.pixels import to_uint8

SKIP_SCALE = math.sqrt(0.5)
NEAR_ZERO = 1e-5  # gain of layers that should start as if absent
EMBEDDING_MULT = 4
FOURIER_SCALE = 16.0
BOX = (1, 1)


@dataclasses.dataclass(frozen=True)
class Style:
    """What sets the two published networks apart (Song et al. 2021, arXiv 2011.13456,
    appendix H).
    """

    noise_mult: int  # width of the noise embedding, in model_channels
    fourier: (
        bool  # random Fourier features of the noise level, instead of sines of fixed frequencies
    )
    residual: bool  # the image, resampled, joins the encoder after every down-sampling
    taps: tuple[int, ...]  # of the filter that goes with resampling, along each axis


STYLES = {"ddpmpp": Style(1, False, False, BOX), "ncsnpp": Style(2, True, True, (1, 3, 3, 1))}


# -- preconditioning -------------------------------------------------------------------------------
Factor = Tensor | float
Scaling = tuple[Factor, Factor, Factor, Tensor]
VP_STEPS, VP_BETA_D, VP_BETA_MIN, VP_FIRST_T = 1000, 19.9, 0.1, 1e-5
VE_SIGMA_MIN, VE_SIGMA_MAX = 0.02, 100.0


def _edm_scaling(sigma: Tensor, sigma_data: float) -> Scaling:
    total = (sigma**2 + sigma_data**2).sqrt()
    return (sigma_data / total) ** 2, sigma * sigma_data / total, total, sigma.log() / 4


def _vp_scaling(sigma: Tensor, sigma_data: float) -> Scaling:
    # log(1 + x), not log1p(x): the published formula, whose rounding at low noise shows in the
    # features
    time = (
        (VP_BETA_MIN**2 + 2 * VP_BETA_D * (1 + sigma**2).log()).sqrt() - VP_BETA_MIN
    ) / VP_BETA_D
    return 1.0, -sigma, (sigma**2 + 1).sqrt(), (VP_STEPS - 1) * time


def _ve_scaling(sigma: Tensor, sigma_data: float) -> Scaling:
    return 1.0, sigma, 1.0, (sigma / 2).log()


def vp_sigma(time: float) -> float:
    """Noise level of the variance-preserving process at `time` in [0,1]."""
    return math.sqrt(math.expm1(VP_BETA_D * time**2 / 2 + VP_BETA_MIN * time))


@dataclasses.dataclass(frozen=True)
class Precondition:
    """How a denoiser is made of a network F: D(x; sigma) = skip * x + out * F(x / divisor; noise
    level) (table 1).

    `scaling(sigma, sigma_data)` gives (skip, out, divisor, noise level); `sigma_range` is what such
    networks are trained on.
    """

    scaling: Callable[[Tensor, float], Scaling]
    sigma_range: tuple[float, float]


PRECONDITIONS = {
    "edm": Precondition(_edm_scaling, (0.0, math.inf)),
    "vp": Precondition(_vp_scaling, (vp_sigma(VP_FIRST_T), vp_sigma(1.0))),
    "ve": Precondition(_ve_scaling, (VE_SIGMA_MIN, VE_SIGMA_MAX)),
}


# -- layers ----------------------------------------------------------------------------------------


def _xavier(weight: Tensor, gain: float) -> None:
    nn.init.xavier_uniform_(weight, gain=gain)


class Linear(nn.Linear):
    """Xavier-uniform weight, zero bias."""

    def reset_parameters(self) -> None:
        _xavier(self.weight, 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def low_pass(taps: tuple[int, ...]) -> Tensor:
    """The resampling filter [1,1,k,k] whose rows and columns are `taps`; it sums to 1."""
    total = (
        sum(taps) ** 2
    )  # in plain numbers: on meta tensors, an outer product would first import torch's compiler
    return torch.tensor(
        [[[[above * beside / total for beside in taps] for above in taps]]], dtype=torch.float32
    )


class Conv(nn.Module):
    """A convolution of odd size that keeps the resolution, after an optional 2x resampling ("down",
    "up").

    With `filter_last`, which is for "down" only, it resamples what it has convolved, without
    padding in between.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        resample: str | None = None,
        taps: tuple[int, ...] = BOX,
        filter_last: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.resample = resample
        self.taps = taps
        self.filter_last = filter_last
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        _xavier(self.weight, gain)
        if resample:  # kept in checkpoints
            self.register_buffer("resample_filter", low_pass(taps))

    def forward(self, x: Tensor) -> Tensor:
        same, wider = self.weight.shape[-1] // 2, (len(self.taps) - 1) // 2
        if self.filter_last:
            return self._filtered(F.conv2d(x, self.weight, self.bias, padding=same + wider), 0)
        if self.resample:
            x = self._filtered(x, wider)
        return F.conv2d(x, self.weight, self.bias, padding=same)

    def _filtered(self, x: Tensor, padding: int) -> Tensor:
        if self.taps == BOX:
            return (
                F.avg_pool2d(x, 2)
                if self.resample == "down"
                else F.interpolate(x, scale_factor=2, mode="nearest")
            )
        channels = x.shape[1]
        filters = self.resample_filter.expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, filters, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * filters, stride=2, padding=padding, groups=channels)


class Fourier(nn.Module):
    """Angles of random frequencies, which belong to the weights: noise levels [B] to [B,
    width/2].
    """

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2).mul_(FOURIER_SCALE))

    def forward(self, noise_level: Tensor) -> Tensor:
        return noise_level[:, None] * (2 * math.pi * self.freqs)


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ConfigError(
            f"net.model_channels gives a group norm of {channels} channels, which {groups} groups "
            "do not divide; use 32, 64 or 128"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Residual block with additive embedding, and one head of self-attention if asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        resample: str | None = None,
        taps: tuple[int, ...] = BOX,
        attention: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.dropout = dropout
        self.norm0 = _norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample=resample, taps=taps)
        self.affine = Linear(embedding, out_channels)
        self.norm1 = _norm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, gain=NEAR_ZERO)
        reshapes = bool(resample) or in_channels != out_channels
        self.skip = (
            Conv(in_channels, out_channels, 1, resample=resample, taps=taps) if reshapes else None
        )
        self.attention = attention
        if attention:
            self.norm2 = _norm(out_channels)
            self.qkv = Conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv(out_channels, out_channels, 1, gain=NEAR_ZERO)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        y = (h + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return (self._attend(y) + y) * SKIP_SCALE if self.attention else y

    def _attend(self, y: Tensor) -> Tensor:
        batch, channels, height, width = y.shape
        qkv = self.qkv(self.norm2(y)).reshape(
            batch, channels, 3, height * width
        )  # checkpoints interleave q, k, v per channel
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, channels, height, width))


class SongUNet(nn.Module):
    """The raw network F: the noise level's embedding, an encoder, and a decoder that joins skips by
    concatenation.

    `style` names one of `STYLES`.
    """

    def __init__(
        self, config: UNet, resolution: int, channels: int, num_classes: int, style: str = "ddpmpp"
    ) -> None:
        super().__init__()
        kind = STYLES[style]
        levels = len(config.channel_mult)
        if not levels or resolution % 2 ** (levels - 1):
            raise ConfigError(
                f"net.channel_mult has {levels} levels, which halve a resolution of {resolution} "
                "unevenly; use fewer levels"
            )
        width = config.model_channels
        noise_width, hidden = kind.noise_mult * width, EMBEDDING_MULT * width
        self.num_classes = num_classes
        self.map_noise = Fourier(noise_width) if kind.fourier else None
        self.map_label = Linear(num_classes, noise_width) if num_classes else None
        self.map_augment = (
            Linear(config.augment_dim, noise_width, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = Linear(noise_width, hidden)
        self.map_layer1 = Linear(hidden, hidden)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()

        def block(inputs: int, outputs: int, **options: Any) -> Block:
            return Block(inputs, outputs, hidden, dropout=config.dropout, taps=kind.taps, **options)

        skips = [width]
        now, joined = width, channels
        for level, mult in enumerate(config.channel_mult):
            side = resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(channels, width, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(now, now, resample="down")
                skips.append(now)
                if kind.residual:
                    self.enc[f"{side}x{side}_aux_residual"] = Conv(
                        joined, now, 3, resample="down", taps=kind.taps, filter_last=True
                    )
                    joined = now
            for index in range(config.num_blocks):
                self.enc[f"{side}x{side}_block{index}"] = block(
                    now, width * mult, attention=side in config.attn_resolutions
                )
                now = width * mult
                skips.append(now)

        for level in reversed(range(levels)):
            side = resolution >> level
            outputs = width * config.channel_mult[level]
            if level == levels - 1:
                self.dec[f"{side}x{side}_in0"] = block(now, now, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(now, now)
                self.default_layer = f"dec.{side}x{side}_in1"
            else:
                self.dec[f"{side}x{side}_up"] = block(now, now, resample="up")
            for index in range(config.num_blocks + 1):
                attention = index == config.num_blocks and side in config.attn_resolutions
                self.dec[f"{side}x{side}_block{index}"] = block(
                    now + skips.pop(), outputs, attention=attention
                )
                now = outputs
        self.dec[f"{resolution}x{resolution}_aux_norm"] = _norm(now)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = Conv(now, channels, 3, gain=NEAR_ZERO)

    def layers(self) -> dict[str, int]:
        """Names of the layers whose output can be a feature, in the order of computation, with
        their widths.
        """
        named = {f"enc.{name}": part for name, part in self.enc.items()} | {
            f"dec.{name}": part for name, part in self.dec.items()
        }
        return {
            name: part.out_channels
            for name, part in named.items()
            if isinstance(part, Block | Conv) and not name.endswith("_aux_conv")
        }

    def cut_after(self, layer: str) -> None:
        """Drop every part that is computed after `layer`, which becomes the default and the
        output.
        """
        half, name = layer.split(".")
        if half == "enc":
            self.dec.clear()
        parts = self.enc if half == "enc" else self.dec
        names = list(parts)
        for later in names[names.index(name) + 1 :]:
            del parts[later]
        self.default_layer = layer

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        labels: Tensor | None,
        augment: Tensor | None,
        stop_at: str | None = None,
    ) -> Tensor:
        """F(x; c_noise, labels) [B,C,H,W], or the output of layer `stop_at`, after which nothing is
        computed.
        """
        embedding = self._embed(noise_level, labels, augment)
        skips: list[Tensor] = []
        joined = x
        for name, part in self.enc.items():
            if name.endswith("_aux_residual"):
                x = joined = skips[-1] = (x + part(joined)) * SKIP_SCALE
            else:
                x = part(x, embedding) if isinstance(part, Block) else part(x)
                skips.append(x)
            if stop_at == f"enc.{name}":
                return x
        for name, part in self.dec.items():
            if isinstance(part, Block):
                x = part(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, embedding)
                if stop_at == f"dec.{name}":
                    return x
            else:
                x = F.silu(part(x)) if name.endswith("_aux_norm") else part(x)
        return x

    def _embed(self, noise_level: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        if self.map_noise is not None:
            angle = self.map_noise(noise_level)
        else:
            half = self.map_layer0.in_features // 2
            frequency = 10_000.0 ** -(
                torch.arange(half, dtype=torch.float32, device=noise_level.device) / (half - 1)
            )
            angle = noise_level[:, None] * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.map_label is not None:
            if labels is None:
                labels = embedding.new_zeros(1, self.num_classes)
            embedding = embedding + self.map_label(labels * math.sqrt(self.num_classes))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))


# -- encoders of noisy images ----------------------------------------------------------------------
class UNetEncoder(Network):
    """A U-Net over noisy images, from whose layers features are taken; what it was trained for is
    up to its subclass.

    `resolution` in pixels a side, `channels` of the images, `num_classes` of the labels that it
    takes as input (0 for none), `sigma_data` the standard deviation of the training data in [-1,1]
    ("edm" only), `precondition` one of `PRECONDITIONS`, `style` one of `STYLES`, `sigma_range` the
    noise levels it was trained on where they are not the precondition's. Raises `ConfigError` for
    sizes that do not divide and for unknown names.
    """

    optional: ClassVar[tuple[str, ...]] = (
        "precondition",
        "style",
        "sigma_range",
    )  # fields that an architecture may leave out

    def __init__(
        self,
        config: UNet,
        resolution: int,
        channels: int,
        num_classes: int,
        sigma_data: float = 0.5,
        *,
        precondition: str = "edm",
        style: str = "ddpmpp",
        sigma_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        for field, value, known in (
            ("precondition", precondition, PRECONDITIONS),
            ("style", style, STYLES),
        ):
            if value not in known:
                raise ConfigError(
                    f"{field}='{value}' is not a kind of diffusion network; "
                    f"{nearest(str(value), known)}"
                )
        self.config = config
        self.resolution = resolution
        self.channels = channels
        self.num_classes = num_classes
        self.sigma_data = sigma_data
        self.precondition = precondition
        self.style = style
        self.sigma_range = sigma_range or PRECONDITIONS[precondition].sigma_range
        self.model = SongUNet(config, resolution, channels, num_classes, style)
        self.model.to(memory_format=torch.channels_last)  # about 4 times faster on a CPU

    def features(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        layer: str | None = None,
        pooled: bool = True,
    ) -> Tensor:
        """Output of `layer` for a noisy `x` [B,C,H,W], averaged over space [B,D] or, not `pooled`,
        whole [B,D,h,w].

        Computes nothing after that layer. The default is the decoder block after the bottleneck,
        `dec.<lowest>_in1`: one reading of "bottleneck block before the upsampling layers" (arXiv
        2602.19931, appendix D; UNVERIFIED). `sigma` [B]; `labels` one-hot [B,K], None for no class.
        Raises `ConfigError` for an unknown layer, `DataError` for labels of another number of
        classes.
        """
        _, _, divisor, noise_level = self._scaling(sigma)
        output = self._run(x / divisor, noise_level, labels, None, self.check_layer(layer))
        return output.mean(dim=(2, 3)) if pooled else output

    def _scaling(self, sigma: Tensor) -> Scaling:
        return PRECONDITIONS[self.precondition].scaling(sigma.reshape(-1, 1, 1, 1), self.sigma_data)

    def _run(
        self,
        scaled: Tensor,
        noise_level: Tensor,
        labels: Tensor | None,
        augment: Tensor | None,
        stop_at: str | None,
    ) -> Tensor:
        if labels is not None and self.num_classes and labels.shape[1:] != (self.num_classes,):
            raise DataError(
                f"labels are {list(labels.shape)}, but the teacher takes {self.num_classes} "
                "classes; use a teacher of this data"
            )
        return self.model(
            scaled.contiguous(memory_format=torch.channels_last),
            noise_level.flatten(),
            labels,
            augment,
            stop_at,
        )

    def layers(self) -> dict[str, int]:
        return self.model.layers()

    @property
    def default_layer(self) -> str:  # type: ignore[override]  # it moves when the network is cut
        return self.model.default_layer

    @property
    def architecture(self) -> dict[str, Any]:
        """As `Network` has it; usual values, the kind "edm" among them, are left out."""
        fields = self.config.model_dump(
            mode="json",
            include={
                "model_channels",
                "channel_mult",
                "num_blocks",
                "attn_resolutions",
                "augment_dim",
            },
        )
        fields |= {
            "resolution": self.resolution,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "sigma_data": self.sigma_data,
        }
        named = {
            "kind": (self.kind, "edm"),
            "precondition": (self.precondition, "edm"),
            "style": (self.style, "ddpmpp"),
        }
        fields |= {name: value for name, (value, usual) in named.items() if value != usual}
        if self.sigma_range != PRECONDITIONS[self.precondition].sigma_range:
            fields["sigma_range"] = list(self.sigma_range)
        return fields

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> Self:
        fields = {name: value for name, value in architecture.items() if name != "kind"}
        resolution, channels, num_classes = (
            int(fields.pop(name)) for name in ("resolution", "channels", "num_classes")
        )
        sigma_data = float(fields.pop("sigma_data"))
        options = {name: fields.pop(name) for name in cls.optional if name in fields}
        if "sigma_range" in options:
            low, high = options["sigma_range"]
            options["sigma_range"] = (float(low), float(high))
        return cls(UNet(**fields), resolution, channels, num_classes, sigma_data, **options)


class EDM(UNetEncoder):
    """The denoiser D(x; sigma), conditional on a class where `num_classes` is not 0."""

    kind = "edm"

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Denoise `x` float32 [B,C,H,W] (clean image in [-1,1] plus noise of deviation `sigma`
        [B]).

        `labels` one-hot float32 [B,K], zeros or None for no class; `augment` float32
        [B,augment_dim], None for not augmented.
        """
        skip, out, divisor, noise_level = self._scaling(sigma)
        return skip * x + out * self._run(x / divisor, noise_level, labels, augment, None)

    # an `ImageSampler`, by Heun's method
    def check_sampling(self, config: Synthesis) -> None:
        self.check_sigma(torch.tensor([config.sigma_min, config.sigma_max]))

    def sampler_facts(self, config: Synthesis) -> dict[str, Any]:
        fields = {"steps", "sigma_min", "sigma_max", "rho"}
        if config.churn:
            fields |= {"churn", "churn_min", "churn_max", "churn_noise"}
        return {"name": "heun"} | config.model_dump(include=fields)

    def calls_per_image(self, config: Synthesis) -> int:
        return sampling.heun_calls(config.steps)

    def decoding(self) -> None:
        return None

    def to_images(self, state: Tensor) -> Tensor:
        return to_uint8(state)

    def sample_images(
        self, config: Synthesis, seeds: Sequence[int], labels: Tensor | None
    ) -> Tensor:
        levels = sampling.noise_levels(config.steps, config.sigma_min, config.sigma_max, config.rho)
        churn = None
        if config.churn:
            churn = sampling.Churn(
                config.churn, config.churn_min, config.churn_max or math.inf, config.churn_noise
            )
        return sampling.sample(self, seeds, labels, levels, churn)
