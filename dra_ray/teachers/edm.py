"""EDM's DDPM++ network with its preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1 and appendix F).

Written from the paper and from the published checkpoints' parameter names, so that those load by name: parameters are
`model.enc.<block>.*`, `model.dec.<block>.*` and `model.map_*`. A block is named by its output size, such as `8x8_in1`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dra_ray.config import UNet
from dra_ray.errors import ConfigError, nearest

SKIP_SCALE = math.sqrt(0.5)
NEAR_ZERO = 1e-5  # gain of layers that should start as if absent
EMBEDDING_MULT = 4


def _xavier(weight: Tensor, gain: float) -> None:
    nn.init.xavier_uniform_(weight, gain=gain)


class Linear(nn.Linear):
    """Xavier-uniform weight, zero bias."""

    def reset_parameters(self) -> None:
        _xavier(self.weight, 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv(nn.Module):
    """A convolution of odd size that keeps the resolution, after an optional 2x resampling (box filter)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, resample: str | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.resample = resample
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        _xavier(self.weight, gain)
        if resample:  # kept in checkpoints; the box filter itself needs no weights
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ConfigError(f"net.model_channels gives a group norm of {channels} channels, which {groups} groups do not divide; use 32, 64 or 128")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Residual block with additive embedding, and one head of self-attention if asked for."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int, *, resample: str | None = None, attention: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.dropout = dropout
        self.norm0 = _norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample=resample)
        self.affine = Linear(embedding, out_channels)
        self.norm1 = _norm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, gain=NEAR_ZERO)
        self.skip = Conv(in_channels, out_channels, 1, resample=resample) if resample or in_channels != out_channels else None
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
        qkv = self.qkv(self.norm2(y)).reshape(batch, channels, 3, height * width)  # checkpoints interleave q, k, v per channel
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, channels, height, width))


class SongUNet(nn.Module):
    """The raw network F of EDM: positional noise embedding, plain encoder and decoder, skips joined by concatenation."""

    def __init__(self, config: UNet, resolution: int, channels: int, num_classes: int) -> None:
        super().__init__()
        levels = len(config.channel_mult)
        if not levels or resolution % 2 ** (levels - 1):
            raise ConfigError(f"net.channel_mult has {levels} levels, which halve a resolution of {resolution} unevenly; use fewer levels")
        width = config.model_channels
        hidden = EMBEDDING_MULT * width
        self.num_classes = num_classes
        self.map_label = Linear(num_classes, width) if num_classes else None
        self.map_augment = Linear(config.augment_dim, width, bias=False) if config.augment_dim else None
        self.map_layer0 = Linear(width, hidden)
        self.map_layer1 = Linear(hidden, hidden)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()

        def block(inputs: int, outputs: int, **kind: Any) -> Block:
            return Block(inputs, outputs, hidden, dropout=config.dropout, **kind)

        skips = [width]
        now = width
        for level, mult in enumerate(config.channel_mult):
            side = resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(channels, width, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(now, now, resample="down")
                skips.append(now)
            for index in range(config.num_blocks):
                self.enc[f"{side}x{side}_block{index}"] = block(now, width * mult, attention=side in config.attn_resolutions)
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
                self.dec[f"{side}x{side}_block{index}"] = block(now + skips.pop(), outputs, attention=attention)
                now = outputs
        self.dec[f"{resolution}x{resolution}_aux_norm"] = _norm(now)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = Conv(now, channels, 3, gain=NEAR_ZERO)

    def layers(self) -> dict[str, int]:
        """Names of the layers whose output can be a feature, in the order of computation, with their widths."""
        named = {f"enc.{name}": part for name, part in self.enc.items()} | {f"dec.{name}": part for name, part in self.dec.items()}
        return {name: part.out_channels for name, part in named.items() if isinstance(part, Block | Conv) and "_aux_" not in name}

    def forward(self, x: Tensor, noise_level: Tensor, labels: Tensor | None, augment: Tensor | None, stop_at: str | None = None) -> Tensor:
        """F(x; c_noise, labels) [B,C,H,W], or the output of layer `stop_at`, after which nothing is computed."""
        embedding = self._embed(noise_level, labels, augment)
        skips = []
        for name, part in self.enc.items():
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
        half = self.map_layer0.in_features // 2
        frequency = 10_000.0 ** -(torch.arange(half, dtype=torch.float32, device=noise_level.device) / (half - 1))
        angle = noise_level[:, None] * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.map_label is not None:
            if labels is None:
                labels = embedding.new_zeros(1, self.num_classes)
            embedding = embedding + self.map_label(labels * math.sqrt(self.num_classes))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))


class EDM(nn.Module):
    """The denoiser D(x; sigma): `SongUNet` with EDM's preconditioning.

    `resolution` in pixels a side, `channels` of the images, `num_classes` 0 for an unconditional network, `sigma_data` the
    standard deviation of the training data in [-1,1]. Raises `ConfigError` for sizes that do not divide.
    """

    def __init__(self, config: UNet, resolution: int, channels: int, num_classes: int, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.config = config
        self.resolution = resolution
        self.channels = channels
        self.num_classes = num_classes
        self.sigma_data = sigma_data
        self.model = SongUNet(config, resolution, channels, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # about 4 times faster on a CPU

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Denoise `x` float32 [B,C,H,W] (clean image in [-1,1] plus noise of deviation `sigma` [B]).

        `labels` one-hot float32 [B,K], zeros or None for no class; `augment` float32 [B,augment_dim], None for not augmented.
        """
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        raw = self._run(x, sigma, total, labels, augment, None)
        return (self.sigma_data / total) ** 2 * x + sigma * self.sigma_data / total * raw

    def features(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, layer: str | None = None) -> Tensor:
        """Spatial average [B,D] of the output of `layer` for a noisy `x` [B,C,H,W]; computes nothing after that layer.

        The default is the block before the decoder's first up-sampling (arXiv 2602.19931, appendix D).
        """
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return self._run(x, sigma, total, labels, None, self.check_layer(layer)).mean(dim=(2, 3))

    def _run(self, x: Tensor, sigma: Tensor, total: Tensor, labels: Tensor | None, augment: Tensor | None, stop_at: str | None) -> Tensor:
        scaled = (x / total).contiguous(memory_format=torch.channels_last)
        return self.model(scaled, sigma.flatten().log() / 4, labels, augment, stop_at)

    def check_layer(self, layer: str | None) -> str:
        """The layer's full name; `ConfigError` with the nearest name if there is no such layer."""
        name = layer or self.model.default_layer
        if name not in self.model.layers():
            raise ConfigError(f"teacher.layer='{name}' is not a layer of this network; {nearest(name, self.model.layers())}")
        return name

    def feature_dim(self, layer: str | None = None) -> int:
        return self.model.layers()[self.check_layer(layer)]

    def one_hot(self, labels: Tensor) -> Tensor:
        """Class indices int64 [B] as float32 [B,K]."""
        return F.one_hot(labels, self.num_classes).to(torch.float32)

    @property
    def architecture(self) -> dict[str, Any]:
        """What, with the weights, makes the function: plain data that `from_architecture` accepts."""
        fields = self.config.model_dump(mode="json", include={"model_channels", "channel_mult", "num_blocks", "attn_resolutions", "augment_dim"})
        return fields | {"resolution": self.resolution, "channels": self.channels, "num_classes": self.num_classes, "sigma_data": self.sigma_data}

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> EDM:
        """Build the network of `architecture`; KeyError or pydantic's ValidationError if it is not one."""
        fields = dict(architecture)
        resolution, channels, num_classes = (int(fields.pop(name)) for name in ("resolution", "channels", "num_classes"))
        sigma_data = float(fields.pop("sigma_data"))
        return cls(UNet(**fields), resolution, channels, num_classes, sigma_data)
