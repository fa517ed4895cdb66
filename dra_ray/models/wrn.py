"""The WideResNet of DM-AT (arXiv 2302.04638; Gowal et al., arXiv 2010.03593): pre-activation, SiLU, normalisation inside.

State-dict names are those of the released checkpoints, so they load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """BN, SiLU, 3x3, BN, SiLU, 3x3, add. A stride of 2 pads right and bottom only."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(wide_in, momentum=0.01)
        self.conv_0 = nn.Conv2d(wide_in, wide_out, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(wide_out, momentum=0.01)
        self.conv_1 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(wide_in, wide_out, 1, stride, bias=False) if wide_in != wide_out else None
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        active = F.silu(self.batchnorm_0(x))
        out = self.conv_0(F.pad(active, self.padding))
        out = self.conv_1(F.silu(self.batchnorm_1(out)))
        return out + (x if self.shortcut is None else self.shortcut(active))


class Group(nn.Module):
    def __init__(self, blocks: int, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(*(Block(wide_out if i else wide_in, wide_out, 1 if i else stride) for i in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class WideResNet(nn.Module):
    """wrn-depth-width: n=(depth-4)/6 blocks in each of three groups of 16w, 32w and 64w channels.

    Args:
        mean, std: of the data per channel, in [0,1] units; their number is the number of image channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, depth: int, width: int, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.feature_dim = 64 * width
        self.init_conv = nn.Conv2d(len(mean), 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            Group(blocks, 16, 16 * width, 1),
            Group(blocks, 16 * width, 32 * width, 2),
            Group(blocks, 32 * width, 64 * width, 2),
        )
        self.batchnorm = nn.BatchNorm2d(self.feature_dim, momentum=0.01)
        self.logits = nn.Linear(self.feature_dim, num_classes)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.logits.bias)

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float [B,C,H,W] in [0,1] -> (logits [B,K], features [B,64*width])."""
        out = self.layer(self.init_conv((x - self.mean) / self.std))
        features = F.silu(self.batchnorm(out)).mean((2, 3))
        return self.logits(features), features

    def forward(self, x: Tensor) -> Tensor:
        return self.with_features(x)[0]
